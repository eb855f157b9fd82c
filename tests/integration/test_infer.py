"""Generation and scoring as a caller meets them: limits, ends, stop strings, and independence."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from golden import FLOAT32_BOUND, load_golden

from grokctl.checkpoint import pickle_writer
from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.release import Release, open_release
from grokctl.checkpoint.tensor_source import ReleaseSource
from grokctl.errors import CorruptCheckpointError, PlacementError, UsageError
from grokctl.events import Finished, Stage, Started, Unit
from grokctl.infer import infer
from grokctl.inference.engine import Engine
from grokctl.inference.generation import FinishReason
from grokctl.inference.plan import EngineOptions
from grokctl.inference.stop_filter import StopFilter
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute
from grokctl.model.sampling import Sampling
from grokctl.model.tokenizer import Tokenizer

CONTEXT = 32
SMALL = replace(MINIATURE, vocab_size=512, emb_size=96, key_size=8, num_layers=1, sequence_len=64)
GREEDY = Sampling(temperature=0)
WARM = Sampling(temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Release:
    root = tmp_path_factory.mktemp("release") / "small"
    write_miniature(root, SMALL)
    return open_release(root)


def start(release: Release, mesh: str = "model=1", **options) -> Engine:
    observe = options.pop("observe", lambda _event: None)
    options = {"compute": Compute.FLOAT32, "context": CONTEXT, **options}
    return infer(
        ReleaseSource(release),
        EngineOptions(mesh=MeshShape.parse(mesh), **options),
        tokenizer=release.tokenizer,
        observe=observe,
    )


@pytest.fixture(scope="module")
def engine(release) -> Engine:
    return start(release)


@pytest.fixture(scope="module")
def words(release) -> Tokenizer:
    return Tokenizer(release.tokenizer, vocab_size=SMALL.vocab_size)


@pytest.fixture(scope="module")
def prompt(words) -> list[int]:
    return words.encode("The import statement")


def finished(stream):
    """The result of a stream that was taken to its end."""
    list(stream)
    return stream.result


def forced(monkeypatch, ids: list[int]) -> None:
    """Choose these tokens, whatever the logits are."""
    monkeypatch.setattr(Sampling, "choose", lambda _self, _logits, step: ids[step])


# --- lengths


def test_a_generation_ends_with_length_after_as_many_tokens_as_asked_for(engine, prompt):
    generation = finished(engine.generate(prompt, sampling=WARM, max_tokens=5, ignore_eos=True))

    assert len(generation.ids) == 5
    assert generation.finish_reason is FinishReason.LENGTH
    assert generation.prompt_tokens == len(prompt)
    assert generation.seed == 5


def test_no_tokens_can_be_asked_for(engine, prompt):
    generation = finished(engine.generate(prompt, sampling=GREEDY, max_tokens=0))

    assert generation.ids == ()
    assert generation.text == ""
    assert generation.finish_reason is FinishReason.LENGTH


def test_fewer_than_no_tokens_cannot(engine, prompt):
    with pytest.raises(UsageError, match="max_tokens -1: expected at least 0"):
        engine.generate(prompt, sampling=GREEDY, max_tokens=-1)


@pytest.mark.parametrize(("length", "room"), [(CONTEXT, 1), (CONTEXT - 1, 2), (CONTEXT - 3, 4)])
def test_the_context_ends_a_generation(engine, length, room):
    prompt = [5 + index % 300 for index in range(length)]

    generation = finished(engine.generate(prompt, sampling=WARM, max_tokens=50, ignore_eos=True))

    assert len(generation.ids) == room
    assert generation.finish_reason is FinishReason.CONTEXT


def test_as_many_tokens_as_asked_for_are_no_end_of_the_context(engine):
    prompt = [5 + index % 300 for index in range(CONTEXT - 1)]

    generation = finished(engine.generate(prompt, sampling=WARM, max_tokens=2, ignore_eos=True))

    assert len(generation.ids) == 2
    assert generation.finish_reason is FinishReason.LENGTH


def test_a_token_at_the_end_of_the_context_is_that_of_a_longer_context(release, engine):
    prompt = [5 + index * 7 % 300 for index in range(CONTEXT - 2)]
    longer = start(release, context=64)

    short, long = (
        finished(each.generate(prompt, sampling=GREEDY, max_tokens=3, ignore_eos=True)).ids
        for each in (engine, longer)
    )

    assert short == long


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        pytest.param([], "the prompt is empty", id="empty"),
        pytest.param([4] * (CONTEXT + 1), "the prompt is 33 tokens, the context 32", id="long"),
        pytest.param([4, 512], "token id 512 lies outside the vocabulary of 512", id="above"),
        pytest.param([4, -1], "token id -1 lies outside the vocabulary of 512", id="negative"),
        pytest.param([2**40], f"token id {2**40} lies outside", id="huge"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_a_usage_error_at_once(engine, prompt, problem):
    with pytest.raises(UsageError, match=problem):
        engine.generate(prompt, sampling=GREEDY, max_tokens=1)
    with pytest.raises(UsageError, match=problem):
        engine.score(prompt)


@pytest.mark.parametrize("context", [0, -1, 65])
def test_a_context_that_the_model_does_not_have_is_refused(release, context):
    with pytest.raises(UsageError, match=f"context {context}: expected 1 to 64"):
        start(release, context=context)


def test_the_context_is_the_model_s_own_by_default(release):
    assert start(release, context=None).context == 64


def test_an_impossible_mesh_is_refused(release):
    with pytest.raises(PlacementError):
        start(release, "model=3")


# --- the end token


def test_the_end_token_ends_a_generation_and_is_no_text(engine, prompt, words, monkeypatch):
    said = words.encode("words")
    forced(monkeypatch, [*said, SMALL.eos_token, *said])

    generation = finished(engine.generate(prompt, sampling=GREEDY, max_tokens=20))

    assert generation.ids == (*said, SMALL.eos_token)  # it was sampled
    assert generation.text == " words"
    assert generation.ended_by is None
    assert generation.finish_reason is FinishReason.STOP


def test_the_end_token_can_come_first(engine, prompt, monkeypatch):
    forced(monkeypatch, [SMALL.eos_token])

    generation = finished(engine.generate(prompt, sampling=GREEDY, max_tokens=20))

    assert (generation.ids, generation.text) == ((SMALL.eos_token,), "")
    assert generation.finish_reason is FinishReason.STOP


def test_the_end_token_can_be_ignored(engine, prompt, words, monkeypatch):
    said = words.encode("words")
    ids = [*said, SMALL.eos_token, *said]
    forced(monkeypatch, ids)

    generation = finished(
        engine.generate(prompt, sampling=GREEDY, max_tokens=len(ids), ignore_eos=True)
    )

    assert generation.ids == tuple(ids)
    assert generation.text == " words words"
    assert generation.finish_reason is FinishReason.LENGTH


def test_half_a_character_at_the_end_is_said_in_the_end(engine, prompt, monkeypatch):
    first, second, _ = (4 + byte for byte in "中".encode())
    forced(monkeypatch, [first, second, SMALL.eos_token])

    tokens = list(engine.generate(prompt, sampling=GREEDY, max_tokens=20))

    assert [token.id for token in tokens] == [first, second, SMALL.eos_token, None]
    assert [token.text for token in tokens] == ["", "", "", "\ufffd\ufffd"]


def test_half_a_character_of_a_text_that_was_cancelled_is_not_said(engine, prompt, monkeypatch):
    forced(monkeypatch, [*(4 + byte for byte in "中".encode())][:2] * 4)
    stream = engine.generate(prompt, sampling=GREEDY, max_tokens=8)
    next(iter(stream))

    stream.cancel()

    assert (stream.result.text, stream.result.finish_reason) == ("", FinishReason.INTERRUPTED)


# --- stop strings


def cut_by(engine, prompt, words, monkeypatch, text, stop):
    ids = words.encode(text)
    forced(monkeypatch, ids)
    generation = engine.generate(
        prompt, sampling=GREEDY, max_tokens=len(ids), stop=stop, ignore_eos=True
    )
    return finished(generation), ids


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        pytest.param(["statement"], " the import ", id="a-word"),
        pytest.param(["ort stat"], " the imp", id="across-words"),
        pytest.param([" "], "", id="the-first-character"),
        pytest.param(["tement words"], " the import sta", id="at-the-end"),
        pytest.param(["statement", "import"], " the ", id="the-first-of-two"),
        pytest.param(["port", "import"], " the ", id="the-longer-of-two"),
        pytest.param(["", "words"], " the import statement ", id="empty-ones-do-not-count"),
    ],
)
def test_a_generation_ends_before_a_stop_string_across_tokens(
    engine, prompt, words, monkeypatch, stop, expected
):
    generation, ids = cut_by(engine, prompt, words, monkeypatch, "the import statement words", stop)

    assert generation.text == expected
    assert generation.finish_reason is FinishReason.STOP
    assert tuple(ids[: len(generation.ids)]) == generation.ids


@pytest.mark.parametrize("stop", [[], [""], ["wordsx"], ["xyz"], [" the import statement words."]])
def test_what_only_looks_like_a_stop_string_is_said(engine, prompt, words, monkeypatch, stop):
    generation, ids = cut_by(engine, prompt, words, monkeypatch, "the import statement words", stop)

    assert generation.text == " the import statement words"
    assert generation.ids == tuple(ids)
    assert generation.finish_reason is FinishReason.LENGTH


def test_a_stop_string_is_not_looked_for_in_the_prompt(engine, words, monkeypatch):
    prompt = words.encode("some words")

    generation, _ = cut_by(engine, prompt, words, monkeypatch, "and more", ["some", "words and"])

    assert generation.text == " and more"


def test_a_stop_string_of_characters_in_many_tokens_is_found(engine, prompt, words, monkeypatch):
    generation, _ = cut_by(engine, prompt, words, monkeypatch, "a 中文 😀 b", ["文 😀"])

    assert generation.text == " a 中"
    assert generation.finish_reason is FinishReason.STOP


def pieces_of(text: str, places: tuple[int, ...]) -> Iterator[str]:
    for low, high in zip((0, *places), (*places, len(text)), strict=True):
        yield text[low:high]


@pytest.mark.parametrize("text", ["aabaabaaab", "abababac", "aaaaaaab", "xyz"])
@pytest.mark.parametrize("stop", [("aab",), ("aaab", "ba"), ("abac",), ("zz", "b"), ("aba", "b")])
def test_a_stop_filter_says_what_comes_before_the_first_stop_however_it_is_cut(text, stop):
    found = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
    expected = text[: min(found)[1]] if found else text

    for first in range(len(text)):
        for second in range(first, len(text)):
            held, said = StopFilter(stop), ""
            for piece in pieces_of(text, (first, second)):
                said += held.push(piece)
                assert expected.startswith(said)
            assert said + held.finish() == expected
            single, one_by_one = StopFilter(stop), ""
            for character in text:
                one_by_one += single.push(character)

            assert one_by_one + single.finish() == expected
            assert said + held.finish() == expected
            assert held.has_stopped == single.has_stopped == bool(found)


# --- independence


def test_two_generations_on_one_engine_know_nothing_of_each_other(release, engine, prompt):
    options = {"sampling": WARM, "max_tokens": 8, "ignore_eos": True}
    other = [400 - index for index in range(25)]

    first = finished(engine.generate(prompt, **options)).ids
    finished(engine.generate(other, **options))
    engine.score(other)
    again = finished(engine.generate(prompt, **options)).ids

    assert again == first
    assert finished(start(release).generate(prompt, **options)).ids == first


def test_a_generation_that_was_given_up_leaves_no_trace(engine, prompt):
    options = {"sampling": WARM, "max_tokens": 8, "ignore_eos": True}
    first = finished(engine.generate(prompt, **options)).ids

    for _ in zip(range(3), engine.generate([9, 8, 7], **options), strict=False):
        pass

    assert finished(engine.generate(prompt, **options)).ids == first


def test_seeds_differ_and_are_repeatable(engine, prompt):
    texts = [
        finished(
            engine.generate(
                prompt,
                sampling=Sampling(temperature=1.5, seed=seed),
                max_tokens=10,
                ignore_eos=True,
            )
        ).ids
        for seed in (1, 2, 1)
    ]

    assert texts[0] == texts[2] != texts[1]


def test_sampled_text_is_the_same_on_every_mesh(release, engine, prompt):
    options = {"sampling": Sampling(temperature=0.9, top_p=0.95, seed=7), "max_tokens": 20}
    expected = finished(engine.generate(prompt, ignore_eos=True, **options))
    assert len(set(expected.ids)) > 5

    for mesh in ("model=4", "model=8", "model=16"):
        other = finished(start(release, mesh).generate(prompt, ignore_eos=True, **options))
        assert other.ids == expected.ids
        assert other.text == expected.text


def test_each_token_s_text_together_is_the_text(engine, prompt, words):
    stream = engine.generate(prompt, sampling=WARM, max_tokens=20, ignore_eos=True)

    tokens = list(stream)
    generation = stream.result

    assert "".join(token.text for token in tokens) == generation.text
    assert tuple(token.id for token in tokens if token.id is not None) == generation.ids
    assert words.decode(prompt) + generation.text == words.decode([*prompt, *generation.ids])


def test_without_a_tokenizer_there_are_ids_and_no_text(release):
    source = ReleaseSource(release)
    mesh = MeshShape(1, 1)
    engine = infer(source, EngineOptions(mesh=mesh, compute=Compute.FLOAT32, context=CONTEXT))

    generation = finished(engine.generate([5, 6], sampling=GREEDY, max_tokens=2, ignore_eos=True))

    assert len(generation.ids) == 2
    assert generation.text == ""
    assert engine.tokenizer is None


def test_another_model_s_tokenizer_is_refused_before_anything_is_loaded(release, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"junk")
    events = []

    with pytest.raises(CorruptCheckpointError, match=r"tokenizer\.model"):
        infer(
            ReleaseSource(release),
            EngineOptions(mesh=MeshShape(1, 1)),
            tokenizer=tmp_path / "tokenizer.model",
            observe=events.append,
        )

    assert events == []


# --- damaged weights


def test_weights_that_are_no_numbers_are_noticed(two_layers):
    path = two_layers / "ckpt-0/tensor00001_000"
    with path.open("wb") as file:
        # finite themselves, as far as the structure goes
        pickle_writer.write(file, np.full(64, np.finfo(np.float32).max, np.float32), None)
    engine = start(open_release(two_layers))

    with pytest.raises(CorruptCheckpointError, match="values that are not finite") as caught:
        list(engine.generate([5, 6, 7], sampling=GREEDY, max_tokens=2))
    with pytest.raises(CorruptCheckpointError, match="values that are not finite"):
        engine.score([5, 6, 7])

    assert caught.value.hint.startswith("grokctl verify")


# --- numbers


def weights_read_for_a_token(config, *, devices: int) -> int:
    """From the sizes alone, for one layer on the model axis."""
    copies = max(1, devices // config.num_kv_heads)
    rows = max(1, devices // 8)
    emb, ffn, chosen = config.emb_size, config.ffn_size, config.num_selected_experts
    floats = 4 * (config.vocab_size * emb + devices * (emb + 4 * emb + emb * config.num_experts))
    attention = 2 * config.q_size * emb + 2 * config.q_size + 2 * 8 * rows * emb
    keys = 2 * copies * (config.kv_size * emb + 2 * config.kv_size)
    experts = chosen * (3 * emb * ffn + 2 * 2 * ffn + 2 * 8 * rows * emb)
    return floats + attention + keys + experts


def test_statistics_are_filled_in(release, engine, prompt):
    generation = finished(engine.generate(prompt, sampling=GREEDY, max_tokens=6, ignore_eos=True))

    stats = generation.stats
    assert stats.load_s > 0
    assert stats.compile_s == 0  # this engine has compiled what it takes
    assert 0 < stats.first_token_s < 60
    ran = len(prompt) - stats.cached_tokens
    assert stats.prefill_tokens_per_s == pytest.approx(ran / stats.first_token_s)
    assert stats.decode_tokens_per_s > 0
    assert stats.bandwidth_fraction is None
    assert stats.bytes_per_token == weights_read_for_a_token(SMALL, devices=1)
    for devices in (4, 16):
        other = start(release, f"model={devices}")
        found = finished(
            other.generate(prompt, sampling=GREEDY, max_tokens=0)
        ).stats.bytes_per_token
        expected = weights_read_for_a_token(SMALL, devices=devices)
        # the release has 8 scale rows whatever the mesh: fewer than 8 devices repeat none
        assert found == expected


def test_the_memory_s_bandwidth_is_measured_when_asked(engine, prompt):
    generation = finished(engine.generate(prompt, sampling=GREEDY, max_tokens=4, ignore_eos=True))

    assert 0 < engine.measured(generation).stats.bandwidth_fraction < 1


def test_nothing_is_compiled_between_tokens_nor_twice(release, prompt):
    events = []
    engine = start(release, observe=events.append)
    generation = engine.generate(prompt, sampling=GREEDY, max_tokens=4, ignore_eos=True)
    iterator = iter(generation)

    next(iterator)
    before = events.count(Started(stage=Stage.COMPILE, unit=Unit.NOTHING))
    list(iterator)
    assert generation.result.stats.compile_s > 0
    finished(engine.generate(prompt, sampling=GREEDY, max_tokens=4, ignore_eos=True))

    assert events.count(Started(stage=Stage.COMPILE, unit=Unit.NOTHING)) == before == 2
    assert events.count(Finished(stage=Stage.COMPILE)) == 2
    assert events[0].stage is Stage.LOAD


def test_many_layers_on_many_virtual_devices_end(tmp_path):
    config = replace(SMALL, emb_size=48, widening_factor=1, num_layers=40)
    write_miniature(tmp_path / "deep", config)
    engine = start(open_release(tmp_path / "deep"), "model=8")

    generation = finished(engine.generate([7], sampling=GREEDY, max_tokens=8, ignore_eos=True))

    # programs that were called without waiting held each other up here, for ever
    assert len(generation.ids) == 8


# --- scores


def negative_log_likelihood(logits, tokens):
    wide = logits.astype(np.float64)
    return sum(
        math.log(sum(math.exp(value - row.max()) for value in row)) + row.max() - row[target]
        for row, target in zip(wide[:-1], tokens[1:], strict=True)
    )


def test_a_score_is_that_of_its_own_logits_and_of_the_reference():
    golden = load_golden("two-layers")
    engine = start(golden.release, context=None)
    logits = np.zeros((len(golden.tokens), 256), np.float32)

    score = engine.score(golden.tokens, logits_out=logits)

    assert score.tokens == len(golden.tokens)
    assert score.nll == pytest.approx(negative_log_likelihood(logits, golden.tokens), rel=1e-12)
    assert engine.score(golden.tokens).nll == pytest.approx(score.nll, rel=1e-6)
    assert score.nll == pytest.approx(
        negative_log_likelihood(golden.float32, golden.tokens),
        abs=2 * FLOAT32_BOUND * len(golden.tokens),
    )
    assert score.perplexity == pytest.approx(math.exp(score.nll / (len(golden.tokens) - 1)))


def test_a_score_does_not_depend_on_the_chunks(engine):
    tokens = [5 + index * 11 % 400 for index in range(CONTEXT)]
    whole = engine.score(tokens)

    runner = engine.runner
    chunk, runner.longest_chunk = runner.longest_chunk, 16
    try:
        parts = engine.score(tokens)
    finally:
        runner.longest_chunk = chunk

    assert parts.nll == pytest.approx(whole.nll, rel=1e-6)


def test_a_single_token_is_certain(engine):
    score = engine.score([7])

    assert (score.tokens, score.nll, score.perplexity) == (1, 0.0, 1.0)


def test_greedy_text_is_the_likeliest_by_its_own_score(engine, prompt):
    ids = finished(engine.generate(prompt, sampling=GREEDY, max_tokens=6, ignore_eos=True)).ids
    logits = np.zeros((len(prompt) + 6, SMALL.vocab_size), np.float32)

    engine.score([*prompt, *ids], logits_out=logits)

    assert tuple(logits[len(prompt) - 1 : -1].argmax(axis=1).tolist()) == ids
