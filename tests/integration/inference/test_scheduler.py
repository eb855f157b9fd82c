"""Continuous batching: what comes out is what every prompt alone would give, in order of ending."""

import collections
import itertools
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from golden import load_golden

from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.release import Release, open_release
from grokctl.checkpoint.tensor_source import ReleaseSource
from grokctl.errors import CorruptCheckpointError, HardwareError, UsageError
from grokctl.events import Advanced, Finished, Stage, Started, Unit
from grokctl.infer import infer
from grokctl.inference.chunks import chunks
from grokctl.inference.compiled_steps import Programs
from grokctl.inference.engine import Engine
from grokctl.inference.generation import Ended, Failed, FinishReason, PromptOutput, Request
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


def start(release, mesh="model=1", *, observe=EVENTS.append, **options) -> Engine:
    options = EngineOptions(
        mesh=MeshShape.parse(mesh), compute=Compute.FLOAT32, **{"slots": 3, **options}
    )
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
    stream = engine.fulfil(replace(wanted, cache_prompt=False))
    list(stream)
    return stream.result


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


ODD = {
    "bias": Sampling(temperature=1.0, seed=3, logit_bias=((7, 30.0), (8, -100.0))),
    "penalties": Sampling(temperature=0, frequency_penalty=1.5, presence_penalty=2.0),
    "hot": Sampling(temperature=2.0, seed=4),
    "top-k": Sampling(temperature=1.0, top_k=3, seed=5),
    "min-p": Sampling(temperature=1.0, min_p=0.2, seed=6),
    "nucleus": Sampling(temperature=0.9, top_p=0.5, seed=7),
}


def test_penalties_count_what_was_generated(engine):
    plain = alone(engine, request(200, 4, 12)).ids
    once = request(200, 4, 12, sampling=Sampling(temperature=0, presence_penalty=2.0))
    often = request(200, 4, 12, sampling=Sampling(temperature=0, frequency_penalty=2.0))

    assert len(set(plain)) < len(set(alone(engine, once).ids)) <= 12
    assert len(set(plain)) < len(set(alone(engine, often).ids)) <= 12


@pytest.mark.parametrize("mesh", ["model=1", "expert=2,model=2"])
def test_tokens_drawn_from_what_the_devices_find_are_those_of_whole_rows(release, engine, mesh):
    wanted = [
        request(100 + index, 5, 12, sampling=sampling, logprobs=5)
        for index, sampling in enumerate(ODD.values())
    ]
    wanted += [
        request(110, 4, 8, min_tokens=6, stop_token_ids=tuple(range(0, 512, 2)), ignore_eos=False),
        request(111, 1, 8, sampling=Sampling(temperature=0.7, top_p=0.95, seed=1)),
    ]
    devices = start(release, mesh, draws_on_device=True)

    streams = [(devices.fulfil(each), engine.fulfil(each)) for each in wanted]

    for each, (found, expected) in zip(wanted, streams, strict=True):
        tokens, others = list(found), list(expected)
        assert found.result.ids == expected.result.ids
        assert found.result.text == expected.result.text
        for token, other in zip(tokens, others, strict=True):
            assert [id_ for id_, _ in token.top] == [id_ for id_, _ in other.top]
            assert (token.logprob is None) == (each.logprobs is None or token.id is None)
            numbers = [token.logprob or 0.0, *[value for _, value in token.top]]
            expected_numbers = [other.logprob or 0.0, *[value for _, value in other.top]]
            assert numbers == pytest.approx(expected_numbers, abs=1e-4)
    assert len(streams[0][0].result.ids) == 12


def test_log_probabilities_are_the_model_s_own(engine):
    sampling = Sampling(temperature=2.0, seed=9, logit_bias=((9, 5.0),))
    wanted = request(120, 6, 8, sampling=sampling, logprobs=3)
    tokens = [token for token in engine.fulfil(wanted) if token.id is not None]
    ids = [*wanted.prompt, *[token.id for token in tokens]]
    logits = np.zeros((len(ids), SMALL.vocab_size), np.float32)

    engine.score(ids, logits_out=logits)

    rows = logits[len(wanted.prompt) - 1 : -1].astype(np.float64)
    expected = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    for row, token in zip(expected, tokens, strict=True):
        assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
        likeliest = np.argsort(-row, kind="stable")[:3]
        assert [id_ for id_, _ in token.top] == likeliest.tolist()
        assert [value for _, value in token.top] == pytest.approx(row[likeliest], abs=1e-4)


def test_a_stop_token_ends_a_text_but_not_too_early(engine):
    plain = alone(engine, request(130, 4, 8))
    stop = plain.ids[2]
    ended = alone(engine, request(130, 4, 8, stop_token_ids=(stop,)))
    first = plain.ids.index(stop)

    assert ended.ids == plain.ids[: first + 1]
    assert (ended.finish_reason, ended.ended_by) == (FinishReason.STOP, stop)
    later = alone(engine, request(130, 4, 8, stop_token_ids=(stop,), min_tokens=first + 1))
    assert stop not in later.ids[: first + 1]
    assert len(later.ids) > first + 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"stop_token_ids": (512,)}, "stop_token_ids 512: expected a token id from 0 to 511"),
        ({"sampling": Sampling(logit_bias=((600, 1.0),))}, "logit_bias 600: expected a token id"),
    ],
)
def test_settings_that_name_no_token_are_refused(engine, options, problem):
    with pytest.raises(UsageError, match=problem):
        engine.fulfil(request(0, 3, 1, **options))


def test_padding_of_a_batch_changes_no_stream(release):
    runner = start(release, slots=7).runner
    prompts = [request(60 + index, 4 + index, 1).prompt for index in range(7)]
    made = np.random.default_rng(60).integers(3, SMALL.vocab_size, (3, 7)).tolist()

    def decoded(streams, slots):
        for stream, slot in zip(streams, slots, strict=True):
            for chunk in chunks(
                0, len(prompts[stream]), longest=runner.longest_chunk, past=runner.past
            ):
                runner.read(slot, prompts[stream], chunk)
        return [
            runner.decode(
                slots,
                [tokens[stream] for stream in streams],
                [len(prompts[stream]) + step for stream in streams],
            ).on_host()
            for step, tokens in enumerate(made)
        ]

    alone = np.stack([decoded([stream], [0]) for stream in range(7)], axis=2)[:, 0]
    for streams in (range(5), range(7)):  # run as 6 and as 8
        found = np.stack(decoded(streams, streams))

        np.testing.assert_allclose(found, alone[:, list(streams)], atol=1e-5)


def test_generations_at_the_same_time_are_not_mixed_up(engine):
    wanted = [request(index, 6, 5) for index in range(70, 75)]  # more than slots
    streams = [engine.fulfil(each) for each in wanted]
    batch = engine.generate_many([request(75, 4, 2), request(76, 4, 9)])
    taken = [[] for _ in streams]

    for each in itertools.zip_longest(*streams):  # a token of each in turn
        for tokens, token in zip(taken, each, strict=True):
            tokens.extend([token.id] if token else [])
    score = engine.score([5, 6, 7])

    for tokens, stream, each in zip(taken, streams, wanted, strict=True):
        assert tuple(tokens) == stream.result.ids == alone(engine, each).ids
    assert dict(batch)[1].ids == alone(engine, request(76, 4, 9)).ids
    # the last token is read alone now, and a CPU's kernel rounds those differently
    assert engine.score([5, 6, 7]).nll == pytest.approx(score.nll, rel=1e-6)


def test_a_batch_that_was_left_goes_on_where_it_was(engine):
    wanted = [request(80, 4, 2), request(81, 4, 9)]
    left = engine.generate_many(wanted)
    next(iter(left))
    engine.score([5, 6, 7])

    (rest,) = left

    assert rest[1].ids == alone(engine, wanted[1]).ids


def test_what_nobody_waits_for_is_not_computed(engine):
    stream, batch = engine.fulfil(request(90, 4, 60)), engine.generate_many(WANTED)
    next(iter(stream))
    next(iter(batch))

    del stream, batch
    before = engine.scheduler.totals.steps
    alone(engine, request(91, 4, 3))

    assert engine.scheduler.totals.steps == before + 2
    assert not engine.scheduler.has_work


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
    batch = engine.generate_many([replace(wanted, cache_prompt=False) for wanted in WANTED])

    found = dict(batch)

    stats = batch.stats
    assert stats.tokens == sum(len(generation.ids) for generation in found.values())
    assert stats.prompt_tokens == sum(len(wanted.prompt) for wanted in WANTED)
    assert stats.prefilled == sum(
        len(wanted.prompt) for wanted in WANTED if wanted.max_tokens and len(wanted.prompt) > 1
    )
    # the others get their first token from their prompt, in a chunk
    chunked = sum(wanted.max_tokens > 0 and len(wanted.prompt) > 1 for wanted in WANTED)
    assert stats.decoded == stats.tokens - chunked
    assert stats.decoded / engine.runner.slots <= stats.steps < stats.decoded
    assert 0 < stats.prefill_s + stats.decode_s <= stats.seconds
    one, every = engine.runner.step_nbytes(0), engine._loader.nbytes
    assert one < stats.bytes_per_step < every
    assert 0 < engine.bandwidth_fraction(stats) < 1
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

    batch, stream = engine.generate_many(WANTED[:2]), engine.fulfil(WANTED[0])
    for _ in range(2):  # one for each
        with pytest.raises(CorruptCheckpointError, match="not finite"):
            list(batch)
    assert list(batch) == []  # all were reported
    for again in (list, lambda failed: failed.result, list):
        with pytest.raises(CorruptCheckpointError, match="not finite"):
            again(stream)
        stream.cancel()  # changes nothing
    assert not engine.scheduler.has_work


def test_a_step_that_cannot_be_compiled_fails_its_request_alone(release, engine, monkeypatch):
    other, events = start(release), []
    healthy = other.fulfil(request(190, 5, 12))
    next(iter(healthy))
    compile_step = Programs.step

    def small(*arguments, time, **options):
        if time > 16:
            raise HardwareError("out of memory")
        return compile_step(*arguments, time=time, **options)

    monkeypatch.setattr(Programs, "step", small)
    other.scheduler.submit(request(191, 40, 3), events.append)
    list(healthy)

    assert [type(event) for event in events] == [Failed]
    assert healthy.result.ids == alone(engine, healthy.request).ids
    assert len(other.scheduler._slots.free) == 3


def test_who_cannot_receive_events_is_left_out_and_holds_nobody(engine):
    def broken(_event):
        raise OSError

    healthy = engine.fulfil(request(170, 5, 12))
    for index in range(5):
        engine.scheduler.submit(request(171 + index, 4 + index, 40), broken)
    before = engine.scheduler.totals.decoded

    list(healthy)

    assert healthy.result.ids == alone(engine, healthy.request).ids
    assert not engine.scheduler.has_work
    assert engine.scheduler.totals.decoded < before + 40


def test_a_cancellation_while_the_inbox_is_emptied_is_not_lost(engine):
    scheduler, events, tickets = engine.scheduler, [], []

    class Inbox(collections.deque):
        def popleft(self):
            if not tickets:  # meanwhile, another client comes and goes
                tickets.append(scheduler.submit(request(181, 4, 60), events.append))
                scheduler.cancel(tickets[0])
            return super().popleft()

    stream = engine.fulfil(request(180, 4, 3))
    scheduler._inbox = Inbox(scheduler._inbox)
    list(stream)
    while scheduler.has_work:
        scheduler.turn()
    scheduler._inbox = collections.deque()

    (end,) = [event for event in events if isinstance(event, Ended)]
    assert end.generation.finish_reason is FinishReason.INTERRUPTED
    assert len(end.generation.ids) <= 2


@pytest.mark.parametrize(
    ("output", "length", "tokens"),
    [
        pytest.param(PromptOutput.NOTHING, 40, 4, id="prompt"),
        pytest.param(PromptOutput.NOTHING, 2, 4, id="token"),
        pytest.param(PromptOutput.NOTHING, 3, 4, id="token drawn on the device"),
        pytest.param(PromptOutput.SCORES, 40, 4, id="scores"),
        pytest.param(PromptOutput.LOGITS, 40, 0, id="logits"),
    ],
)
def test_what_is_not_finite_ends_one_request_once_and_spoils_no_other(
    release, engine, output, length, tokens
):
    spoiled, events = start(release, slots=2, draws_on_device=length == 3), []
    scheduler, runner = spoiled.scheduler, spoiled.runner
    runner.longest_chunk = 16
    ill, healthy = (
        request(150, length, tokens, of_prompt=output),
        spoiled.fulfil(request(140, 5, 9)),
    )

    scheduler.submit(ill, events.append)
    scheduler.turn()
    (slot,) = [
        active.slot.number
        for active in (*scheduler._reading, *scheduler._decoding)
        if active.request is ill
    ]
    runner._cache = jax.tree.map(lambda leaf: leaf.at[:, slot].set(np.nan), runner._cache)
    list(healthy)
    while scheduler.has_work:
        scheduler.turn()

    assert [type(event) for event in events].count(Failed) == 1
    assert isinstance(events[-1], Failed)
    assert healthy.result.ids == alone(engine, healthy.request).ids
    assert sorted(each.number for each in scheduler._slots.free) == [0, 1]
    assert [len(each.tokens) for each in scheduler._slots.free if each.number == slot] == [0]
    after = [request(160 + index, 6, 5) for index in range(4)]
    found = dict(spoiled.generate_many(after))
    assert [found[index].ids for index in range(4)] == [alone(engine, each).ids for each in after]


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
    assert list(alone(engine, wanted).ids) == golden.greedy


# --- Ctrl-C


class InterruptAt:
    """Raises KeyboardInterrupt at a line of the scheduler, counted from the first that runs."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __call__(self, frame, event, _argument):
        if "/inference/" not in frame.f_code.co_filename:
            return None
        if event == "line" and Path(frame.f_code.co_filename).stem in {"scheduler", "slots"}:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("line", np.random.default_rng(6).integers(1, 900, 25).tolist())
def test_an_interrupt_anywhere_ends_what_runs_and_leaves_a_whole_engine(engine, one_by_one, line):
    scheduler, events = engine.scheduler, [[] for _ in WANTED]
    for wanted, inbox in zip(WANTED, events, strict=True):
        scheduler.submit(replace(wanted, max_tokens=min(wanted.max_tokens, 6)), inbox.append)
    before = sys.gettrace()
    sys.settrace(InterruptAt(line))
    try:
        with suppress(KeyboardInterrupt):
            while scheduler.has_work:
                scheduler.turn()
    finally:
        sys.settrace(before)

    while scheduler.has_work:
        scheduler.turn()
    for inbox, expected in zip(events, one_by_one, strict=True):
        (end,) = [event for event in inbox if isinstance(event, Ended | Failed)][:1]
        assert expected.ids[: len(end.generation.ids)] == end.generation.ids
    assert sorted(slot.number for slot in scheduler._slots.free) == [0, 1, 2]
    found = dict(engine.generate_many([WANTED[0], WANTED[6]]))
    assert [found[0].ids, found[1].ids] == [one_by_one[0].ids, one_by_one[6].ids]
