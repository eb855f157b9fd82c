"""Real engines on exports: llama.cpp twice, its quantizer, and transformers' tokenizer.

The weights are random. Bounds are shares of the logits' own deviation: what an engine adds at Q8_0
is the rounding of its activations, and every mistake in a file costs several times as much. At
random weights any rounding now and then swaps two experts, so the median over positions counts.
"""

import io
import json
import pydoc_data.topics
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
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
HERE = Path(__file__).parent
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


def asked(script, model, job, folder, name):
    """What an engine answers in a process of its own; its log if it fails."""
    question, answer = folder / "question.json", folder / name
    question.write_text(json.dumps(job))
    command = [sys.executable, str(HERE / script), str(model), str(question), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return answer


def logits(model, folder):
    return np.load(asked("ik_engine.py", model, {"tokens": TOKENS}, folder, "logits.npy"))


def shares(found, wanted):
    """The root mean square error of each position, as a share of the logits' deviation."""
    return np.sqrt(((found - wanted) ** 2).mean(axis=1)) / wanted.std()


def test_a_file_gives_the_logits_of_the_release(made, reference, tmp_path):
    kind, path = made

    found = logits(path, tmp_path)

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

    assert np.median(shares(logits(first, tmp_path), reference)) < BOUNDS["f32"]


# --- mistakes, each of which passes every check of shapes


def swapped(data, header, first, second):
    """Exchange the values of two tensors."""
    places = {one.name: (at, one) for one, at in zip(header.tensors, header.offsets, strict=True)}
    (left, one), (right, other) = places[first], places[second]
    assert one.nbytes == other.nbytes
    part = data[left : left + one.nbytes]
    data[left : left + one.nbytes] = data[right : right + one.nbytes]
    data[right : right + one.nbytes] = part


def gate_and_up(data, header):
    for layer in range(CONFIG.num_layers):
        swapped(
            data, header, f"blk.{layer}.ffn_gate_exps.weight", f"blk.{layer}.ffn_up_exps.weight"
        )


def norms(data, header):
    """The norm after the attention, and that after the experts."""
    for layer in range(CONFIG.num_layers):
        names = (f"blk.{layer}.{name}_norm.weight" for name in ("attn_output", "layer_output"))
        swapped(data, header, *names)


def rotary_pairs(data, header):
    """Queries and keys permuted as for a rotary embedding of neighbouring pairs."""
    for tensor, at in zip(header.tensors, header.offsets, strict=True):
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            rows = np.frombuffer(bytes(data[at : at + tensor.nbytes]), np.uint8)
            heads = rows.reshape(-1, 2, CONFIG.key_size // 2, tensor.nbytes // tensor.shape[0])
            data[at : at + tensor.nbytes] = heads.swapaxes(1, 2).tobytes()


def scale_groups(data, header):
    """The scales of inputs in reverse."""
    for tensor, at in zip(header.tensors, header.offsets, strict=True):
        if "attn_output.weight" in tensor.name or "ffn_down" in tensor.name:
            part = bytes(data[at : at + tensor.nbytes])
            blocks = np.frombuffer(part, np.dtype([("scale", "<f2"), ("codes", "i1", 32)])).copy()
            rows = blocks.reshape(-1, tensor.shape[-1] // 32)
            rows["scale"] = rows["scale"][:, ::-1].copy()
            data[at : at + tensor.nbytes] = rows.tobytes()


@pytest.mark.parametrize("mistake", [gate_and_up, norms, rotary_pairs, scale_groups])
def test_every_mistake_shows(release, reference, tmp_path, mistake):
    (path,) = gguf_of(exported(release, tmp_path / "out"))
    header, data = read_gguf(path), bytearray(path.read_bytes())
    mistake(data, header)
    path.write_bytes(data)

    assert np.median(shares(logits(path, tmp_path), reference)) > 4 * BOUNDS["q8_0"]


def test_layers_are_in_numeric_order(tmp_path):
    write_miniature(tmp_path / "deep", DEEP, tokenizer=False)
    deep = open_release(tmp_path / "deep")
    (path,) = gguf_of(exported(deep, tmp_path / "out", "f32"))
    wanted = logits_here(deep)

    assert np.median(shares(logits(path, tmp_path), wanted)) < 0.02
    header, data = read_gguf(path), bytearray(path.read_bytes())
    for tensor in header.tensors:
        if tensor.name.startswith("blk.1."):
            swapped(data, header, tensor.name, tensor.name.replace("blk.1.", "blk.10."))
    path.write_bytes(data)
    assert np.median(shares(logits(path, tmp_path), wanted)) > 0.2


def test_llama_quantize_takes_the_file(release, tmp_path):
    (path,) = gguf_of(exported(release, tmp_path / "out"))
    import ik_llama_cpp  # noqa: PLC0415 (only here is it installed)

    program = Path(ik_llama_cpp.__file__).parent / "bin" / "llama-quantize"
    command = [program, "--allow-requantize", path, tmp_path / "k.gguf", "Q4_K_M"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)

    assert done.returncode == 0, done.stderr[-2000:]
    assert np.isfinite(logits(tmp_path / "k.gguf", tmp_path)).all()


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


def texts() -> list[str]:
    """A thousand texts: parts of Python's reference, and random characters."""
    drawn = random.Random(0)
    whole = "\n".join(pydoc_data.topics.topics.values())
    starts = [drawn.randrange(len(whole) - 300) for _ in range(500)]
    found = [whole[start : start + drawn.randrange(1, 300)] for start in starts]
    letters = "ab 1\n\t ,.éß日本語🙂▁[]\r<|>"
    found += ["".join(drawn.choices(letters, k=drawn.randrange(1, 60))) for _ in range(500)]
    return [text for text in found if "<|separator|>" not in text]


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


def differing(found, wanted):
    return [
        (text, one, other)
        for text, one, other in zip(texts(), found, wanted, strict=True)
        if one != other
    ]


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
