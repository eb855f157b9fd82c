"""Real engines on exports: llama.cpp twice, its quantizer, and transformers' tokenizer.

The weights are random. Bounds are shares of the logits' own deviation: what an engine adds at Q8_0
is the rounding of its activations, and every mistake in a file costs several times as much. At
random weights any rounding now and then swaps two experts, so the median over positions counts.
"""

import io
import json
import pydoc_data.topics
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from engines import MISTAKES, asked, differing, logits, shares, swapped, texts, with_mistake
from exports import WIDE, exported, gguf_of
from golden import score_logits

from grokctl.checkpoint.gguf import read_gguf
from grokctl.checkpoint.miniature import write_miniature
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.tensor_source import ReleaseSource
from grokctl.infer import infer
from grokctl.inference.plan import EngineOptions
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute

pytestmark = pytest.mark.engines

CONFIG = replace(WIDE, attn_output_multiplier=16**-0.5, num_layers=2, num_experts=4)
DEEP = replace(CONFIG, num_layers=11)
"""Layers whose numeric order is not that of the release."""
TOKENS = np.random.default_rng(0).integers(260, CONFIG.vocab_size, 24).tolist()
BOUNDS = {"q8_0": 0.04, "bf16": 0.04, "f32": 0.002, "q4_0": 0.4}
"""Shares of the logits' deviation, by the type of the weights."""
LIKE_GROK_1 = [
    *("\n" * count for count in range(1, 11)),
    *"0123456789",
    *("\t" * count for count in range(1, 9)),
    *(" " * count for count in range(2, 17)),
    "<|separator|>",
]
"""The user-defined pieces of Grok-1's tokenizer."""


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = tmp_path_factory.mktemp("release") / "wide"
    write_miniature(root, CONFIG)
    return open_release(root)


def logits_here(release):
    """Logits of grokctl at float32."""
    options = EngineOptions(mesh=MeshShape(1, 1), compute=Compute.FLOAT32)
    return score_logits(infer(ReleaseSource(release), options), TOKENS)


@pytest.fixture(scope="module")
def reference(release):
    return logits_here(release)


@pytest.fixture(scope="module", params=["q8_0", "f32", "bf16", "q4_0"])
def made(request, release, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    return request.param, gguf_of(exported(release, out, request.param))[0]


def test_a_file_gives_the_logits_of_the_release(made, reference, tmp_path):
    kind, path = made

    found = logits(path, TOKENS, tmp_path)

    assert np.median(shares(found, reference)) < BOUNDS[kind]
    is_same = found.argmax(axis=1) == reference.argmax(axis=1)
    assert kind == "q4_0" or is_same.mean() > 0.9


def test_the_newest_llama_cpp_agrees(made, reference, tmp_path):
    kind, path = made
    places = [1, 8, 23]
    job = {"prompts": [TOKENS[: place + 1] for place in places], "vocab": CONFIG.vocab_size}

    found = np.load(asked("mainline_engine.py", path, job, tmp_path, "logprobs.npy"))

    wanted = reference[places].astype(np.float64)
    wanted -= np.log(np.exp(wanted).sum(axis=1, keepdims=True))
    assert np.median(shares(found, wanted)) < BOUNDS[kind]


def test_files_of_a_split_are_one_model(release, reference, tmp_path):
    made = exported(release, tmp_path / "out", "f32", split=5 * 10**6)
    first, *rest = gguf_of(made)
    assert rest

    assert np.median(shares(logits(first, TOKENS, tmp_path), reference)) < BOUNDS["f32"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_shows(release, reference, tmp_path, mistake):
    (path,) = gguf_of(exported(release, tmp_path / "out"))
    with_mistake(path, mistake, CONFIG)

    assert np.median(shares(logits(path, TOKENS, tmp_path), reference)) > 4 * BOUNDS["q8_0"]


def test_layers_are_in_numeric_order(tmp_path):
    write_miniature(tmp_path / "deep", DEEP, tokenizer=False)
    deep = open_release(tmp_path / "deep")
    (path,) = gguf_of(exported(deep, tmp_path / "out", "f32"))
    wanted = logits_here(deep)

    assert np.median(shares(logits(path, TOKENS, tmp_path), wanted)) < 0.02
    header, data = read_gguf(path), bytearray(path.read_bytes())
    for tensor in header.tensors:
        if tensor.name.startswith("blk.1."):
            swapped(data, header, tensor.name, tensor.name.replace("blk.1.", "blk.10."))
    path.write_bytes(data)
    assert np.median(shares(logits(path, TOKENS, tmp_path), wanted)) > 0.2


def test_llama_quantize_takes_the_file(release, tmp_path):
    (path,) = gguf_of(exported(release, tmp_path / "out"))
    import ik_llama_cpp  # noqa: PLC0415 (only here is it installed)

    program = Path(ik_llama_cpp.__file__).parent / "bin" / "llama-quantize"
    command = [program, "--allow-requantize", path, tmp_path / "k.gguf", "Q4_K_M"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)

    assert done.returncode == 0, done.stderr[-2000:]
    assert np.isfinite(logits(tmp_path / "k.gguf", TOKENS, tmp_path)).all()


# --- tokens


@cache
def like_grok_1() -> bytes:
    """A tokenizer with user-defined newlines, tabs, digits and spaces, as Grok-1's has."""
    out = io.BytesIO()
    lines = [line for text in pydoc_data.topics.topics.values() for line in text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines if line.strip()][:4000]),
        model_writer=out,
        model_type="bpe",
        vocab_size=2000,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=LIKE_GROK_1,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


@pytest.fixture(scope="module", params=["miniature", "like-grok-1"])
def tokenized(request, tmp_path_factory):
    """A release with a tokenizer, and the tokens of all texts."""
    root = tmp_path_factory.mktemp("tokens") / "wide"
    config = replace(CONFIG, num_layers=1, vocab_size=2048)
    write_miniature(root, config, tokenizer=request.param == "miniature")
    if request.param != "miniature":
        (root / "tokenizer.model").write_bytes(like_grok_1())
    processor = sentencepiece.SentencePieceProcessor(
        model_proto=(root / "tokenizer.model").read_bytes()
    )
    return open_release(root), [processor.encode(text) for text in texts()]


def test_llama_cpp_tokenises_as_sentencepiece_does(tokenized, tmp_path):
    release, wanted = tokenized
    (path,) = gguf_of(exported(release, tmp_path / "out"))

    answer = asked("ik_engine.py", path, {"texts": texts()}, tmp_path, "tokens.json")

    assert not differing(json.loads(answer.read_text()), wanted)


def test_transformers_tokenises_as_sentencepiece_does(tokenized, tmp_path):
    from transformers import AutoTokenizer  # noqa: PLC0415 (only here is it installed)

    release, wanted = tokenized
    made = exported(release, tmp_path / "out", "bf16", form="hf", embedding="bf16")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(made.root / name, folder)

    tokenizer = AutoTokenizer.from_pretrained(folder)

    found = [tokenizer.encode(text) for text in texts()]
    assert not differing(found, wanted)
    assert [tokenizer.decode(tokens) for tokens in found[:500]] == texts()[:500]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, GROK_1.pad_token)
