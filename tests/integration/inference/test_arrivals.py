"""Requests that come and go at any time: each gets what it would get alone, and none waits long."""

import threading
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.tensor_source import ReleaseSource
from grokctl.errors import HardwareError
from grokctl.infer import infer
from grokctl.inference.active import Ticket
from grokctl.inference.chunks import chunks
from grokctl.inference.compiled_steps import Step
from grokctl.inference.engine import Engine
from grokctl.inference.generation import (
    Ended,
    Failed,
    FinishReason,
    Generation,
    PromptOutput,
    PromptRead,
    PromptScores,
    Request,
    Token,
)
from grokctl.inference.plan import EngineOptions
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute
from grokctl.model.sampling import Sampling

pytestmark = pytest.mark.optimized  # 100,000 tokens
CONFIG = replace(
    MINIATURE,
    vocab_size=512,
    emb_size=64,
    key_size=8,
    num_q_heads=8,
    widening_factor=2,
    num_layers=2,
    sequence_len=8192,
)
SLOTS = 4
GREEDY = Sampling(temperature=0)
RANDOM = np.random.default_rng(17)
TEXT = RANDOM.integers(3, CONFIG.vocab_size, 2100).tolist()


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    root = tmp_path_factory.mktemp("release") / "small"
    write_miniature(root, CONFIG)
    release = open_release(root)
    options = EngineOptions(mesh=MeshShape(1, 1), compute=Compute.FLOAT32, slots=SLOTS)
    return infer(ReleaseSource(release), options, tokenizer=release.tokenizer)


@dataclass
class Arrival:
    """A request, the turn before which it comes, and what became of it."""

    request: Request
    turn: int
    cancelled_after: int | None = None
    """Tokens after which it is cancelled; 0 for before its first."""
    ticket: Ticket | None = None
    events: list = field(default_factory=list)
    submitted: int = 0
    ahead: list["Arrival"] = field(default_factory=list)
    """Requests that were under way when it came."""
    first_token: int | None = None

    @property
    def tokens(self) -> list[int]:
        """Tokens until now."""
        return [event.id for event in self.events if isinstance(event, Token) and event.id]

    @property
    def result(self) -> Generation | None:
        """The end, if it came."""
        last = self.events[-1] if self.events else None
        return last.generation if isinstance(last, Ended) else None


def play(engine: Engine, arrivals: list[Arrival]) -> None:
    """Let requests come at their turns, and go."""
    scheduler, coming, turn = engine.scheduler, sorted(arrivals, key=lambda each: each.turn), 0
    under_way: list[Arrival] = []
    while coming or scheduler.has_work:
        while coming and coming[0].turn <= turn:
            arrival = coming.pop(0)
            arrival.ahead, arrival.submitted = list(under_way), turn
            arrival.ticket = scheduler.submit(arrival.request, arrival.events.append)
            under_way.append(arrival)
        for arrival in under_way:
            after = arrival.cancelled_after
            if after is not None and turn > arrival.turn and len(arrival.tokens) >= after:
                scheduler.cancel(arrival.ticket)
        scheduler.turn()
        turn += 1
        for arrival in under_way:
            if arrival.tokens and arrival.first_token is None:
                arrival.first_token = turn
        under_way = [arrival for arrival in under_way if arrival.result is None]


def steps(engine: Engine, request: Request, *, chunk: int) -> int:
    """Most turns that a request runs in: of `SLOTS` turns, one has a chunk of it."""
    read = len(list(chunks(0, len(request.prompt), longest=chunk, past=engine.runner.past)))
    return read * SLOTS + request.max_tokens + 1


def alone(engine: Engine, request: Request) -> Generation:
    stream = engine.fulfil(replace(request, cache_prompt=False))
    list(stream)
    return stream.result


def is_beginning(part: Generation, whole: Generation) -> bool:
    return whole.ids[: len(part.ids)] == part.ids and whole.text.startswith(part.text)


def wanted(index: int) -> Request:
    """Lengths from 1 to 4,000 tokens, short ones more often; some begin alike."""
    random = np.random.default_rng(index)
    length = int(np.exp(random.uniform(0, np.log(4000))))
    fresh = random.integers(3, CONFIG.vocab_size, length).tolist()
    prompt = TEXT[: length // 2] + fresh[: length - min(length // 2, len(TEXT))]
    sampling = GREEDY if index % 2 else Sampling(temperature=0.8, top_p=0.9, seed=index)
    return Request(
        prompt=tuple(prompt if index % 3 else fresh),
        sampling=sampling,
        max_tokens=int(random.integers(1, 12)),
        ignore_eos=True,
    )


@pytest.mark.parametrize("count", [70, pytest.param(200, marks=pytest.mark.slow)])
def test_many_requests_at_random_times(engine, count):
    chosen = [
        Arrival(
            request=wanted(index),
            turn=int(RANDOM.integers(0, 2 * count)),
            cancelled_after=int(RANDOM.integers(0, 6)) if index % 3 == 0 else None,
        )
        for index in range(count)
    ]

    play(engine, chosen)

    assert not engine.scheduler.has_work
    assert engine.scheduler.running == 0
    assert len(engine.scheduler._slots.free) == SLOTS
    shortest = engine.runner.longest_chunk // 4  # beside sequences that decode
    for arrival in chosen:
        whole = alone(engine, arrival.request)
        if arrival.result.finish_reason is FinishReason.INTERRUPTED:
            assert arrival.cancelled_after is not None
            assert is_beginning(arrival.result, whole)
            continue
        assert arrival.result.ids == whole.ids
        assert arrival.result.text == whole.text
        before = sum(steps(engine, each.request, chunk=shortest) for each in arrival.ahead)
        own = steps(engine, arrival.request, chunk=shortest)
        assert arrival.first_token - arrival.submitted <= before / SLOTS + SLOTS + own
    ends = [arrival.result.finish_reason for arrival in chosen]
    assert ends.count(FinishReason.INTERRUPTED) > count // 10


def fresh(length: int, **options) -> Request:
    """A prompt of which no slot has kept anything."""
    prompt = RANDOM.integers(3, CONFIG.vocab_size, length).tolist()
    return Request(prompt=tuple(prompt), sampling=GREEDY, **options)


def test_a_short_prompt_passes_a_long_one(engine):
    long = Arrival(fresh(2000, max_tokens=1), turn=0)
    short = Arrival(Request(prompt=(5, 6, 7), sampling=GREEDY, max_tokens=1), turn=1)

    play(engine, [long, short])

    assert short.first_token - short.submitted <= 2
    assert long.first_token - long.submitted > 2


def test_long_prompts_hold_nobody_who_decodes(engine):
    events = []
    talking = Request(prompt=(5, 6, 7), sampling=GREEDY, max_tokens=40, ignore_eos=True)
    engine.scheduler.submit(talking, events.append)
    engine.scheduler.turn()
    events.append("turn")
    for length in (2000, 1500):
        engine.scheduler.submit(fresh(length, max_tokens=1), events.append)
    while engine.scheduler.has_work:
        engine.scheduler.turn()
        events.append("turn")

    kinds = {Token: "t", PromptRead: "r", str: "."}
    turns = "".join(kinds.get(type(event), "") for event in events).split(".")
    assert sum("tr" in turn for turn in turns) >= (2000 + 1500) // 128  # a chunk beside a token
    assert not any("trr" in turn for turn in turns)  # and never two


def test_a_slot_is_free_for_the_next_in_the_turn_in_which_a_sequence_ends(engine):
    running = [
        Arrival(fresh(5, max_tokens=tokens, ignore_eos=True), turn=0) for tokens in (4, 30, 30, 30)
    ]
    events = []
    for arrival in running:
        engine.scheduler.submit(arrival.request, arrival.events.append)
    engine.scheduler.submit(fresh(5, max_tokens=1), events.append)

    while running[0].result is None:
        assert events == []
        engine.scheduler.turn()

    assert any(isinstance(event, PromptRead) for event in events)
    while engine.scheduler.has_work:
        engine.scheduler.turn()


def test_a_dialogue_reads_only_what_is_new(engine):
    prompt = RANDOM.integers(3, CONFIG.vocab_size, 40).tolist()
    first = Arrival(
        Request(prompt=tuple(prompt), sampling=GREEDY, max_tokens=20, ignore_eos=True), turn=0
    )
    play(engine, [first])
    more = Arrival(
        Request(
            prompt=(*prompt, *first.result.ids, 7, 8, 9),
            sampling=GREEDY,
            max_tokens=6,
            ignore_eos=True,
        ),
        turn=0,
    )

    play(engine, [more])

    assert read_of(more) == (40 + 19, 4)  # the last sampled token never ran
    assert more.result.ids == alone(engine, more.request).ids


def test_of_a_prompt_that_was_given_up_half_way_only_that_half_is_kept(engine):
    wanted = fresh(1400, max_tokens=3, ignore_eos=True)
    events = []
    ticket = engine.scheduler.submit(wanted, events.append)
    engine.scheduler.turn()
    engine.scheduler.cancel(ticket)
    engine.scheduler.turn()
    again = Arrival(wanted, turn=0)

    play(engine, [again])

    assert read_of(again) == (512, 1400 - 512)
    assert again.result.ids == alone(engine, wanted).ids


def test_nothing_is_kept_of_a_cache_that_is_gone(engine, monkeypatch):
    wanted = fresh(100, max_tokens=3, ignore_eos=True)
    play(engine, [Arrival(wanted, turn=0)])
    failed = Arrival(fresh(5, max_tokens=3), turn=0)

    def broken(*_arguments, **_options):
        raise HardwareError("out of memory")

    monkeypatch.setattr(Step, "run", broken)
    engine.scheduler.submit(failed.request, failed.events.append)
    engine.scheduler.turn()
    monkeypatch.undo()
    again = Arrival(wanted, turn=0)

    play(engine, [again])

    assert isinstance(failed.events[-1], Failed)
    assert read_of(again) == (0, 100)
    assert again.result.ids == alone(engine, wanted).ids


# --- any arrivals

POOL = [wanted(index) for index in (1, 2, 4, 5, 7, 8)]
POOL = [replace(each, prompt=each.prompt[:60]) for each in POOL] + [
    Request(prompt=tuple(TEXT[:length]), sampling=GREEDY, max_tokens=tokens, ignore_eos=True)
    for length, tokens in ((1, 5), (16, 0), (17, 1), (33, 4), (48, 3), (50, 6), (700, 2), (1300, 1))
]


@pytest.fixture(scope="module")
def expected(engine) -> list[Generation]:
    return [alone(engine, request) for request in POOL]


arrivals = st.lists(
    st.tuples(st.integers(0, len(POOL) - 1), st.integers(0, 12), st.none() | st.integers(0, 4)),
    min_size=1,
    max_size=9,
)


@settings(max_examples=25, deadline=None)
@given(arrivals)
def test_any_arrivals_and_departures(engine, expected, plan):
    chosen = [
        Arrival(request=POOL[number], turn=turn, cancelled_after=after)
        for number, turn, after in plan
    ]

    play(engine, chosen)

    assert engine.scheduler.running == 0
    assert len(engine.scheduler._slots.free) == SLOTS
    for arrival, (number, _, after) in zip(chosen, plan, strict=True):
        whole = expected[number]
        if after is None:
            assert (arrival.result.ids, arrival.result.text) == (whole.ids, whole.text)
            assert arrival.result.finish_reason is whole.finish_reason
        else:
            assert is_beginning(arrival.result, whole)


def test_any_thread_may_submit_and_cancel(engine, expected):
    scheduler, done = engine.scheduler, threading.Event()
    chosen = [Arrival(request=POOL[number % len(POOL)], turn=0) for number in range(60)]

    def submit(part: list[Arrival]) -> None:
        for arrival in part:
            arrival.ticket = scheduler.submit(arrival.request, arrival.events.append)
            if arrival.request.max_tokens == 1:
                scheduler.cancel(arrival.ticket)

    threads = [threading.Thread(target=submit, args=(chosen[number::6],)) for number in range(6)]
    for thread in threads:
        thread.start()
    while not done.is_set():
        if scheduler.wait(0.05):
            scheduler.turn()
        if not any(thread.is_alive() for thread in threads) and not scheduler.has_work:
            done.set()

    for number, arrival in enumerate(chosen):
        whole = expected[number % len(POOL)]
        if arrival.request.max_tokens == 1:
            assert is_beginning(arrival.result, whole)
        else:
            assert arrival.result.ids == whole.ids
    scheduler.turn()  # for cancellations that came too late
    assert not scheduler.wait(0)
    scheduler.cancel(chosen[0].ticket)
    assert scheduler.wait(0)  # a cancellation wakes the thread that takes the turns
    scheduler.turn()


def test_one_thread_takes_the_turns(engine):
    problems = []

    def turn(_event) -> None:
        def other() -> None:
            try:
                engine.scheduler.turn()
            except RuntimeError as error:
                problems.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    engine.scheduler.submit(replace(POOL[0], max_tokens=1), turn)
    while engine.scheduler.has_work:
        engine.scheduler.turn()

    assert problems
    assert set(problems) == {"another thread takes the turns of this scheduler"}


# --- prefixes


def read_of(arrival: Arrival) -> tuple[int, int]:
    """Tokens of the kept prefix, and tokens that ran."""
    stats = arrival.result.stats
    return stats.cached_tokens, round(stats.prefill_tokens_per_s * stats.first_token_s)


def test_the_second_question_over_a_text_reads_only_its_own_tokens(engine):
    questions = [tuple(TEXT[:2000]) + tuple(range(start, start + 7)) for start in (5, 50)]
    first, second = (
        Arrival(Request(prompt=each, sampling=GREEDY, max_tokens=5, ignore_eos=True), turn=turn)
        for each, turn in zip(questions, (0, 100), strict=True)
    )

    play(engine, [first])
    play(engine, [second])

    assert read_of(second) == (2000, 7)
    assert second.result.ids == alone(engine, second.request).ids
    again = Arrival(second.request, turn=0)
    play(engine, [again])
    assert read_of(again) == (2006, 1)  # the last token's logits are wanted
    assert again.result.ids == second.result.ids


@pytest.mark.parametrize("question", [1, 3, 7, 20, 130])
def test_a_prefix_is_kept_at_any_length_up_to_the_end_of_the_context(engine, question):
    text = RANDOM.integers(3, CONFIG.vocab_size, CONFIG.sequence_len - question).tolist()
    whole = Request(
        prompt=(*text, *range(7, 7 + question)), sampling=GREEDY, max_tokens=3, ignore_eos=True
    )
    before = Request(prompt=(*text, 5), sampling=GREEDY, max_tokens=1)
    arrivals_ = [Arrival(before, turn=0)], [Arrival(whole, turn=0)]

    for each in arrivals_:
        play(engine, each)

    cached, ran = read_of(arrivals_[1][0])
    assert cached == len(text)
    assert question <= ran <= question + 15
    assert arrivals_[1][0].result.ids == alone(engine, whole).ids


@pytest.mark.parametrize("output", [PromptOutput.NOTHING, PromptOutput.SCORES])
def test_prompts_that_come_together_read_what_they_share_once(engine, output):
    shared = RANDOM.integers(3, CONFIG.vocab_size, 700).tolist()
    together = [
        Arrival(
            Request(
                prompt=(*shared, *range(start, start + 5)),
                sampling=GREEDY,
                max_tokens=4 if output is PromptOutput.NOTHING else 0,
                of_prompt=output,
                ignore_eos=True,
            ),
            turn=0,
        )
        for start in range(5, 5 + 10 * SLOTS, 10)
    ]

    play(engine, together)

    ran = [read_of(arrival)[1] for arrival in together]
    assert sum(ran) < 700 + SLOTS * 32
    for arrival in together:
        fresh = Arrival(replace(arrival.request, cache_prompt=False), turn=0)
        play(engine, [fresh])
        assert arrival.result.ids == fresh.result.ids
        if output is PromptOutput.SCORES:
            found, expected_ = scores_of(arrival.events), scores_of(fresh.events)
            np.testing.assert_allclose(found, expected_, atol=1e-5)


def test_nothing_to_compute_needs_no_slot(engine):
    running = [Arrival(fresh(5, max_tokens=8, ignore_eos=True), turn=0) for _ in range(SLOTS)]
    nothing = Arrival(fresh(5, max_tokens=0), turn=2)

    play(engine, [*running, nothing])

    assert nothing.events == [Ended(nothing.result)]
    assert nothing.result.finish_reason is FinishReason.LENGTH


def scores_of(events: list) -> np.ndarray:
    parts = [event for event in events if isinstance(event, PromptScores)]
    assert [part.start for part in parts] == [1, *[part.end for part in parts[:-1]]]
    return np.concatenate([part.logprobs for part in parts])


def test_scores_of_a_kept_prefix_are_kept(engine):
    def scored(ids, **options):
        arrival = Arrival(
            Request(
                prompt=tuple(ids),
                sampling=GREEDY,
                max_tokens=0,
                of_prompt=PromptOutput.SCORES,
                **options,
            ),
            turn=0,
        )
        play(engine, [arrival])
        return scores_of(arrival.events), arrival.result.stats.cached_tokens

    answers = [[*TEXT[:600], *range(start, start + 5)] for start in (5, 50, 500)]
    kept = [scored(each) for each in answers]
    fresh = [scored(each, cache_prompt=False)[0] for each in answers]

    assert [cached for _, cached in kept] == [0, 599, 599]
    for (found, _), expected_ in zip(kept, fresh, strict=True):
        np.testing.assert_allclose(found, expected_, atol=1e-5)
        assert len(found) == 604


def test_a_prefix_that_was_not_scored_is_read_again_for_scores(engine):
    prompt = tuple(RANDOM.integers(3, CONFIG.vocab_size, 100).tolist())
    play(engine, [Arrival(Request(prompt=prompt, sampling=GREEDY, max_tokens=1), turn=0)])
    scored = Arrival(
        Request(prompt=prompt, sampling=GREEDY, max_tokens=2, of_prompt=PromptOutput.SCORES), turn=0
    )

    play(engine, [scored])

    assert len(scores_of(scored.events)) == 99
    assert scored.result.stats.cached_tokens == 0
    assert len(scored.result.ids) == 2


def test_a_request_can_keep_out_of_the_kept_prefixes(engine):
    prompt = tuple(RANDOM.integers(3, CONFIG.vocab_size, 100).tolist())
    secret = Request(prompt=prompt, sampling=GREEDY, max_tokens=2, cache_prompt=False)

    for options in ({}, {"cache_prompt": True}, {}):
        arrival = Arrival(replace(secret, **options), turn=0)
        play(engine, [arrival])
        assert arrival.result.stats.cached_tokens == 0
