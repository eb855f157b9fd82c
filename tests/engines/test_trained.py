"""Real engines on exports of the trained miniature: its logits, its text, its tokens.

Bounds are shares of the logits' deviation over all positions. What an engine adds at Q8_0 is the
rounding of its activations.
"""

import json
import math
import pydoc_data.topics
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from cuts import cut
from engines import MISTAKES, asked, differing, logits, note, texts, with_mistake
from exports import exported, gguf_of
from golden import score_logits, start

from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.tensor_source import ReleaseSource
from grokctl.checkpoint.trained import UNSEEN, copy_trained
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.model.sampling import Sampling

pytestmark = pytest.mark.engines


BOUNDS = {"q8_0": 0.04, "bf16": 0.04, "f32": 0.002, "q4_0": 0.04}
LENGTH = 64
PROMPTS = 10


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained") / "miniature"
    copy_trained(root)
    return open_release(root)


@pytest.fixture(scope="module")
def processor(release):
    path = release.root / "tokenizer.model"
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def tokens(processor):
    """Of a text that training did not see."""
    return processor.encode(UNSEEN)


@pytest.fixture(scope="module")
def engine(release):
    return start(ReleaseSource(release), "model=1")


@pytest.fixture(scope="module")
def reference(engine, tokens):
    """Logits of grokctl at float32."""
    return score_logits(engine, tokens)


@pytest.fixture(scope="module")
def int4(release, tmp_path_factory):
    """The same at int4, in the groups of Q4_0."""
    out = tmp_path_factory.mktemp("int4") / "out"
    ready = cut(release, MeshShape(1, 1), out, precision=Precision.INT4, group_size=32)
    return start(ready, "model=1")


@pytest.fixture(scope="module", params=["q8_0", "f32", "bf16", "q4_0"])
def made(request, release, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    return request.param, gguf_of(exported(release, out, request.param))[0]


def share(found, wanted):
    """The root mean square error, as a share of the logits' deviation."""
    return math.sqrt(((found - wanted) ** 2).mean()) / wanted.std()


def perplexity(found, tokens):
    """Of logits, on the tokens that follow."""
    wide = found[:-1].astype(np.float64)
    likely = wide[range(len(wide)), tokens[1:]] - np.log(np.exp(wide).sum(axis=1))
    return math.exp(-likely.mean())


def test_a_file_gives_the_logits_of_the_release(made, tokens, reference, int4, tmp_path):
    kind, path = made
    wanted = score_logits(int4, tokens) if kind == "q4_0" else reference

    found = logits(path, tokens, tmp_path)

    is_same = (found.argmax(axis=1) == wanted.argmax(axis=1)).mean()
    note(
        f"{kind}: {share(found, wanted):.2%} of the deviation, {is_same:.1%} of the likeliest, "
        f"perplexity {perplexity(found, tokens):.3f} and {perplexity(wanted, tokens):.3f} here"
    )
    assert share(found, wanted) < BOUNDS[kind]
    assert is_same > 0.95


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_shows(release, tokens, reference, tmp_path, mistake):
    (path,) = gguf_of(exported(release, tmp_path / "out"))
    with_mistake(path, mistake, release.config)

    found = share(logits(path, tokens, tmp_path), reference)

    note(f"{mistake.__name__}: {found:.1%}")
    assert found > 4 * BOUNDS["q8_0"]


def test_greedy_text_is_the_same(made, engine, processor, tmp_path):
    kind, path = made
    drawn = random.Random(0)
    topics = sorted(pydoc_data.topics.topics)
    prompts = [
        processor.encode(pydoc_data.topics.topics[name])[:24]
        for name in drawn.sample(topics, PROMPTS)
    ]
    job = {"prompts": prompts, "length": LENGTH}

    answer = asked("ik_engine.py", path, job, tmp_path, "greedy.json")

    found = json.loads(answer.read_text())
    wanted = [greedy(engine, prompt) for prompt in prompts]
    same = sum(one == other for one, other in zip(found, wanted, strict=True))
    note(f"{kind}: {same} of {PROMPTS}")
    assert {len(tokens) for tokens in found} == {LENGTH}
    if kind == "f32":
        assert same >= PROMPTS - 1


def greedy(engine, prompt):
    """The likeliest tokens after a prompt, by grokctl."""
    stream = engine.generate(prompt, sampling=Sampling(), max_tokens=LENGTH, ignore_eos=True)
    list(stream)
    return list(stream.result.ids)


def test_engines_tokenise_as_sentencepiece_does(release, made, processor, tmp_path):
    from transformers import AutoTokenizer  # noqa: PLC0415 (only here is it installed)

    wanted = [processor.encode(text) for text in texts()]
    hf = exported(release, tmp_path / "hf", "bf16", form="hf", embedding="bf16")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hf.root / name, folder)

    answer = asked("ik_engine.py", made[1], {"texts": texts()}, tmp_path, "tokens.json")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    assert not differing(json.loads(answer.read_text()), wanted)
    assert not differing([tokenizer.encode(text) for text in texts()], wanted)


def test_llama_quantize_comes_as_close_as_int4(release, tokens, reference, int4, tmp_path):
    import ik_llama_cpp  # noqa: PLC0415 (only here is it installed)

    (path,) = gguf_of(exported(release, tmp_path / "out"))
    program = Path(ik_llama_cpp.__file__).parent / "bin" / "llama-quantize"
    command = [program, "--allow-requantize", path, tmp_path / "k.gguf", "Q4_K_M"]
    subprocess.run(command, capture_output=True, check=True, timeout=240)

    theirs = perplexity(logits(tmp_path / "k.gguf", tokens, tmp_path), tokens)

    ours, exact = (perplexity(one, tokens) for one in (score_logits(int4, tokens), reference))
    note(f"perplexity of Q4_K_M {theirs:.3f}, of our int4 {ours:.3f}, at float32 {exact:.3f}")
    assert theirs < 1.25 * exact
    assert ours < 1.25 * exact
