"""Small checkpoints in exactly the released format, for demos, tests and benchmarks."""

import io
import json
import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint import pickle_writer, pickles
from grokctl.checkpoint.release_files import file_nbytes, released_payloads
from grokctl.errors import UsageError
from grokctl.events import Advanced, Finished, Observer, Stage, Started, ignore
from grokctl.model.config import GROK_1, GrokConfig
from grokctl.model.tensors import TensorSpec, tensor_specs
from grokctl.paths import CKPT, CONFIG, TOKENIZER

MINIATURE = replace(
    GROK_1,
    vocab_size=1024,
    sequence_len=256,
    emb_size=128,
    key_size=16,
    num_q_heads=16,
    num_layers=3,
)
"""A model of 5 MB that fits every mesh of 1 to 16 devices."""

_SMALLEST_VOCABULARY = 400
"""The 256 bytes, and the characters of the training text."""
_BYTES = slice(4, 260)
"""Tokens of single bytes; small rows make them rare, so that random text consists of words."""
_BLOCK = 16 * 2**20
"""Random bytes, generated once and repeated: a full-width layer takes seconds."""


def write_miniature(
    root: Path,
    config: GrokConfig = MINIATURE,
    *,
    seed: int = 0,
    tokenizer: bool = True,
    observe: Observer = ignore,
) -> list[str]:
    """Write a release of random weights with logits of order one, in which every layer matters.

    Args:
        root: A new or empty folder.
        config: Any size; `dataclasses.replace(GROK_1, num_layers=1)` is one layer of full width.
        seed: The same seed gives the same bytes.
        tokenizer: Whether to train a tokenizer, which needs a vocabulary of at least 400.
        observe: Receives progress in bytes.

    Returns:
        The files written, `/`-separated and relative to `root`.

    Raises:
        UsageError: The folder is not empty.
    """
    if tokenizer and config.vocab_size < _SMALLEST_VOCABULARY:
        raise UsageError(
            f"vocabulary of {config.vocab_size}: a tokenizer needs at least {_SMALLEST_VOCABULARY}"
        )
    _require_empty(root)
    rng = np.random.default_rng(seed)
    block = rng.integers(-127, 128, _BLOCK, dtype=np.int8)
    model = train_tokenizer(config) if tokenizer else None
    return write_release(
        root, config, lambda spec: _tensor(spec, rng, block), model, observe=observe
    )


Stored = tuple[NDArray[Any], NDArray[Any] | None]
"""A float32 tensor and None, or its int8 weight and bfloat16 scales."""


def write_release(
    root: Path,
    config: GrokConfig,
    tensor: Callable[[TensorSpec], Stored],
    tokenizer: bytes | None,
    *,
    observe: Observer = ignore,
) -> list[str]:
    """Write a release, one tensor after the other.

    Args:
        root: A new or empty folder.
        config: The model.
        tensor: Gives each tensor as it is stored, in the order of the release.
        tokenizer: A serialized sentencepiece model.
        observe: Receives progress in bytes.

    Returns:
        The files written, `/`-separated and relative to `root`.

    Raises:
        UsageError: The folder is not empty.
    """
    _require_empty(root)
    (root / CKPT).mkdir(parents=True, exist_ok=True)
    specs = tensor_specs(config)
    files, done = [], 0
    observe(Started(stage=Stage.MINIATURE, total=sum(map(file_nbytes, specs))))
    for spec in specs:
        with (root / CKPT / spec.file).open("xb") as file:
            pickle_writer.write(file, *tensor(spec))
        files.append(f"{CKPT}/{spec.file}")
        done += file_nbytes(spec)
        observe(Advanced(stage=Stage.MINIATURE, done=done))
    (root / CONFIG).write_text(json.dumps(config.to_dict(), indent=2))
    files.append(CONFIG)
    if tokenizer is not None:
        (root / TOKENIZER).write_bytes(tokenizer)
        files.append(TOKENIZER)
    observe(Finished(stage=Stage.MINIATURE))
    return files


def quantised(spec: TensorSpec, values: NDArray[np.float32]) -> Stored:
    """Round trained weights as the release stores them: int8 with a bfloat16 scale for each group.

    Args:
        spec: The tensor; those without scales stay float32.
        values: `spec.shape`.
    """
    if not spec.is_quantized:
        return np.ascontiguousarray(values, np.float32), None
    *lead, inputs, outputs = spec.shape
    groups = values.reshape(*lead, spec.scale_groups, inputs // spec.scale_groups, outputs)
    scales = (np.abs(groups).max(axis=-2) / 127).astype(pickles.BFLOAT16)
    divisors = np.maximum(scales.astype(np.float32), np.finfo(np.float32).tiny)
    codes = np.rint(groups / divisors[..., None, :]).clip(-127, 127)
    return codes.astype(np.int8).reshape(spec.shape), scales


def _require_empty(root: Path) -> None:
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UsageError(f"{root}: expected an empty folder for a miniature, found files")


def train_tokenizer(config: GrokConfig) -> bytes:
    """Train a sentencepiece model with byte fallback on Python's own language reference.

    Returns:
        A serialized model of exactly `config.vocab_size` pieces, with Grok-1's special ids.
    """
    import sentencepiece  # noqa: PLC0415 (only miniatures with text need it)

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_sentences()),
        model_writer=model,
        model_type="bpe",
        vocab_size=config.vocab_size,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=config.pad_token,
        bos_id=1,
        eos_id=config.eos_token,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _sentences() -> Iterator[str]:
    for topic in sorted(pydoc_data.topics.topics):
        yield from filter(None, map(str.strip, pydoc_data.topics.topics[topic].splitlines()))


def _tensor(spec: TensorSpec, rng: np.random.Generator, block: NDArray[np.int8]) -> Stored:
    weight, scales = released_payloads(spec)
    if scales is None:
        return _float_tensor(spec, rng), None
    *_, inputs, _ = spec.shape
    # int8 uniform in ±127 has a deviation of 73; unit inputs give unit outputs
    mean = 1.0 / (73.3 * np.sqrt(inputs))
    values = rng.uniform(0.8 * mean, 1.2 * mean, scales.shape).astype(pickles.BFLOAT16)
    start = int(rng.integers(block.size))
    return np.resize(np.roll(block, -start), weight.shape), values


def _float_tensor(spec: TensorSpec, rng: np.random.Generator) -> NDArray[np.float32]:
    if spec.name == "embedding":
        deviation, center = 0.0127, 0.0
    elif spec.name == "final_norm":
        deviation, center = 0.5, 8.0
    elif spec.name.endswith("router"):
        deviation, center = 1.0 / np.sqrt(spec.shape[0]), 0.0
    else:
        deviation, center = 0.1, 1.0
    count = min(prod(spec.shape), _BLOCK // 4)
    values = rng.standard_normal(count, dtype=np.float32) * np.float32(deviation) + np.float32(
        center
    )
    tensor = np.resize(values, spec.shape)
    if spec.name == "embedding" and spec.shape[0] > _SMALLEST_VOCABULARY:
        tensor[_BYTES] *= np.float32(0.1)
    return tensor
