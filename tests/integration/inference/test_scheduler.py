"""Continuous batching: what comes out is what every prompt alone would give, in order of ending."""

from dataclasses import replace

import numpy as np
import pytest
from golden import load_golden

from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.release import Release, open_release
from grokctl.checkpoint.tensor_source import ReleaseSource
from grokctl.errors import CorruptCheckpointError, UsageError
from grokctl.events import Advanced, Finished, Stage, Started, Unit
from grokctl.infer import infer
from grokctl.inference.engine import Engine
from grokctl.inference.generation import FinishReason, Request
from grokctl.inference.plan import EngineOptions
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute, KvType
from grokctl.model.sampling import Sampling

SMALL = replace(MINIATURE, vocab_size=512, emb_size=96, key_size=8, num_layers=2, sequence_len=64)
GREEDY = Sampling(temperature=0)
EVENTS = []


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Release:
    root = tmp_path_factory.mktemp("release") / "small"
    write_miniature(root, SMALL)
    return open_release(root)


def start(release, mesh="model=1", *, slots=3, kv=KvType.COMPUTE, observe=EVENTS.append) -> Engine:
    options = EngineOptions(mesh=MeshShape.parse(mesh), compute=Compute.FLOAT32, slots=slots, kv=kv)
    source = ReleaseSource(release)
    return infer(source, options, tokenizer=release.tokenizer, observe=observe)


@pytest.fixture(scope="module")
def engine(release) -> Engine:
    return start(release)


def request(index: int, length: int, max_tokens: int, **options) -> Request:
    ids = np.random.default_rng(index).integers(3, SMALL.vocab_size, length)
    options = {"sampling": GREEDY, "ignore_eos": True, **options}
    return Request(prompt=tuple(ids.tolist()), max_tokens=max_tokens, **options)


def alone(engine, wanted: Request):
    generation = engine.generate(
        wanted.prompt,
        sampling=wanted.sampling,
        max_tokens=wanted.max_tokens,
        stop=wanted.stop,
        ignore_eos=wanted.ignore_eos,
    )
    list(generation)
    return generation


WANTED = [
    request(0, 5, 20),
    request(1, 40, 3),
    request(2, 1, 9, sampling=Sampling(temperature=1.0, seed=8)),
    request(3, 17, 0),
    request(4, 3, 1),
    request(5, 60, 50),
    request(6, 16, 7, sampling=Sampling(temperature=0.8, top_k=20, seed=1)),
]


@pytest.fixture(scope="module")
def one_by_one(engine):
    return [alone(engine, wanted) for wanted in WANTED]


@pytest.mark.parametrize("mesh", ["model=1", "expert=2,model=2"])
def test_every_prompt_gets_what_it_would_get_alone(release, one_by_one, mesh):
    found = dict(start(release, mesh).generate_many(WANTED))

    assert sorted(found) == list(range(len(WANTED)))
    for index, expected in enumerate(one_by_one):
        assert found[index].ids == expected.ids
        assert found[index].text == expected.text
        reason = FinishReason.CONTEXT if index == 5 else FinishReason.LENGTH
        assert found[index].finish_reason is expected.finish_reason is reason
        assert found[index].seed == WANTED[index].sampling.seed
        assert found[index].prompt_tokens == len(WANTED[index].prompt)
    assert len(found[5].ids) == SMALL.sequence_len - 60 + 1  # the context ends it


def test_padding_of_a_batch_changes_no_stream(release):
    runner = start(release, slots=7).runner
    prompts = [request(60 + index, 4 + index, 1).prompt for index in range(7)]
    made = np.random.default_rng(60).integers(3, SMALL.vocab_size, (3, 7)).tolist()

    def decoded(streams, slots):
        for stream, slot in zip(streams, slots, strict=True):
            runner.prefill(slot, prompts[stream])
        return [
            runner.decode(
                slots,
                [tokens[stream] for stream in streams],
                [len(prompts[stream]) + step for stream in streams],
            )
            for step, tokens in enumerate(made)
        ]

    alone = np.stack([decoded([stream], [0]) for stream in range(7)], axis=2)[:, 0]
    for streams in (range(5), range(7)):  # run as 6 and as 8
        found = np.stack(decoded(streams, streams))

        np.testing.assert_allclose(found, alone[:, list(streams)], atol=1e-5)


def test_two_generations_at_a_time_are_refused_and_not_mixed_up(engine):
    first, second = (
        iter(engine.generate(request(index, 6, 5).prompt, sampling=GREEDY, max_tokens=5))
        for index in (70, 71)
    )
    next(first)
    next(second)

    with pytest.raises(UsageError, match="another generation began"):
        next(first)
    batch = iter(engine.generate_many([request(72, 4, 2), request(73, 4, 9)]))
    next(batch)
    with pytest.raises(UsageError, match="another generation began"):
        next(second)
    engine.score([5, 6, 7])
    with pytest.raises(UsageError, match="another generation began"):
        next(batch)


def test_a_batch_that_was_left_can_go_on_only_if_nothing_else_began(engine):
    wanted = [request(80, 4, 2), request(81, 4, 9)]
    left, given_up = engine.generate_many(wanted), engine.generate_many(wanted)
    next(iter(left))
    (rest,) = left
    next(iter(given_up))
    engine.score([5, 6, 7])

    assert rest[1].ids == alone(engine, wanted[1]).ids
    with pytest.raises(UsageError, match="another generation began"):
        list(given_up)


def test_a_long_one_does_not_hold_the_short_ones(engine):
    wanted = [request(10, 4, 40), *[request(11 + index, 4, 3) for index in range(6)]]

    order = [index for index, _ in engine.generate_many(wanted)]

    assert order == [1, 2, 3, 4, 5, 6, 0]


def test_what_a_stream_held_before_is_never_seen_by_the_next(engine):
    long = [request(20 + index, 50, 10) for index in range(3)]
    short = [request(30 + index, 3, 12) for index in range(3)]

    found = dict(engine.generate_many([*long, *short]))

    for index, wanted in enumerate(short):
        assert found[3 + index].ids == alone(engine, wanted).ids


def test_texts_end_where_they_would_end_alone(engine):
    (first, *_), _ = zip(*engine.generate_many([request(40, 6, 12)]), strict=True), None
    whole = alone(engine, request(40, 6, 12))
    stop = whole.text[4:7]
    wanted = [request(40, 6, 12, stop=(stop,)), request(41, 6, 12)]

    found = dict(engine.generate_many(wanted))

    assert first == (0,)
    assert found[0].finish_reason is FinishReason.STOP
    assert found[0].text == whole.text[: whole.text.index(stop)]
    assert found[1].finish_reason is FinishReason.LENGTH


def test_statistics_are_those_of_all_prompts_together(engine):
    batch = engine.generate_many(WANTED)

    found = dict(batch)

    stats = batch.stats
    assert stats.tokens == sum(len(generation.ids) for generation in found.values())
    assert stats.prompt_tokens == sum(len(wanted.prompt) for wanted in WANTED)
    assert stats.prefilled == sum(len(wanted.prompt) for wanted in WANTED if wanted.max_tokens)
    begun = sum(wanted.max_tokens > 0 for wanted in WANTED)
    assert stats.decoded == stats.tokens - begun
    assert stats.decoded / engine.runner.slots <= stats.steps < stats.decoded
    assert 0 < stats.prefill_s + stats.decode_s <= stats.seconds
    one, every = engine.runner.step_nbytes(0), engine._loader.nbytes
    assert one < stats.bytes_per_step < every
    engine.measure_bandwidth(stats)
    assert 0 < stats.bandwidth_fraction < 1
    assert all(
        generation.stats.first_token_s > 0 for index, generation in found.items() if index != 3
    )


def test_one_stream_reads_as_much_as_a_token_takes(release):
    engine = start(release, slots=1)

    batch = engine.generate_many([request(50, 4, 6)])
    ((_, generation),) = batch

    assert batch.stats.bytes_per_step == generation.stats.bytes_per_token


def test_progress_counts_prompts(engine):
    EVENTS.clear()

    list(engine.generate_many(WANTED))

    ours = [event for event in EVENTS if event.stage is Stage.DECODE]
    assert ours[0] == Started(stage=Stage.DECODE, total=len(WANTED), unit=Unit.PROMPTS)
    assert ours[-1] == Finished(stage=Stage.DECODE)
    done = [event.done for event in ours if isinstance(event, Advanced)]
    assert done == sorted(done)
    assert done[-1] == len(WANTED)


def test_nothing_to_do_is_done_at_once(engine):
    batch = engine.generate_many([])

    assert list(batch) == []
    assert batch.stats.decode_tokens_per_s == batch.stats.bytes_per_step == 0


def test_a_prompt_that_cannot_be_read_is_refused_before_any_runs(engine):
    with pytest.raises(UsageError, match="the prompt is empty"):
        engine.generate_many([request(0, 5, 3), request(1, 0, 3)])


@pytest.mark.parametrize("slots", [-1, 0, 257, 2**40])
def test_there_are_slots_but_not_too_many(release, slots):
    with pytest.raises(UsageError, match=f"slots {slots}: expected 1 to 256"):
        start(release, slots=slots)


def test_damaged_weights_end_the_batch(release):
    engine = start(release)
    layer = engine.runner._parameters.layers[0]
    norms = replace(layer.norms, pre_moe=layer.norms.pre_moe * np.float32(np.nan))
    broken = replace(layer, norms=norms)
    layers = (broken, *engine.runner._parameters.layers[1:])
    engine.runner._parameters = replace(engine.runner._parameters, layers=layers)

    with pytest.raises(CorruptCheckpointError, match="not finite"):
        list(engine.generate_many(WANTED))


# --- keys and values as int8


@pytest.mark.parametrize("name", ["two-layers", "three-layers", "eleven-layers"])
def test_an_int8_cache_changes_the_score_little_and_no_greedy_token(name):
    golden = load_golden(name)
    options = EngineOptions(mesh=MeshShape(1, 1), compute=Compute.FLOAT32, kv=KvType.INT8)
    engine = infer(ReleaseSource(golden.release), options)
    logits = np.zeros(golden.float32.shape, np.float32)

    score = engine.score(golden.tokens, logits_out=logits)

    # now and then the router chooses another expert, so the largest error says little
    assert 0 < np.sqrt(np.mean((logits - golden.float32) ** 2)) < 0.2 * golden.float32.std()
    whole = infer(ReleaseSource(golden.release), replace(options, kv=KvType.COMPUTE))
    assert score.nll == pytest.approx(whole.score(golden.tokens).nll, rel=1e-3)
    wanted = Request(
        prompt=tuple(golden.tokens),
        sampling=GREEDY,
        max_tokens=len(golden.greedy),
        ignore_eos=True,
    )
    assert alone(engine, wanted).ids == golden.greedy
