from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokctl.events import (
    Advanced,
    Event,
    Finished,
    Noted,
    Stage,
    Started,
    Unit,
    ignore,
    throttled,
)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def advanced(done: int, stage: Stage = Stage.FETCH) -> Advanced:
    return Advanced(stage=stage, done=done)


START, FINISH, NOTE = Started(stage=Stage.FETCH), Finished(stage=Stage.FETCH), Noted(message="x")


def test_the_first_advance_passes_at_once():
    seen: list[Event] = []
    observe = throttled(seen.append, every=1.0, clock=Clock())

    observe(advanced(1))

    assert seen == [advanced(1)]


def test_advances_pass_no_more_often_than_asked():
    clock, seen = Clock(), []
    observe = throttled(seen.append, every=1.0, clock=clock)

    for done in range(100):
        observe(advanced(done))
        clock.time += 0.25

    assert seen == [advanced(done) for done in range(0, 100, 4)]


@pytest.mark.parametrize("event", [START, FINISH, NOTE])
def test_every_other_event_passes_at_once(event):
    seen: list[Event] = []
    observe = throttled(seen.append, every=1000.0, clock=Clock())

    observe(advanced(1))
    observe(event)
    observe(event)

    assert seen == [advanced(1), event, event]


def test_throttle_never_drops_the_end():
    seen: list[Event] = []
    observe = throttled(seen.append, every=1000.0, clock=Clock())

    for done in range(10):
        observe(advanced(done))
    observe(FINISH)

    assert seen == [advanced(0), advanced(9), FINISH]


def test_an_end_that_has_passed_is_not_repeated():
    clock, seen = Clock(), []
    observe = throttled(seen.append, every=1.0, clock=clock)

    observe(advanced(1))
    observe(advanced(2))
    clock.time = 1.0
    observe(advanced(3))
    observe(FINISH)

    assert seen == [advanced(1), advanced(3), FINISH]


def test_one_stage_does_not_swallow_the_end_of_another():
    seen: list[Event] = []
    observe = throttled(seen.append, every=1000.0, clock=Clock())

    observe(advanced(1))
    observe(advanced(2))
    observe(Started(stage=Stage.VERIFY))
    observe(advanced(7, Stage.VERIFY))
    observe(Finished(stage=Stage.VERIFY))

    assert seen == [
        advanced(1),
        advanced(2),
        Started(stage=Stage.VERIFY),
        advanced(7, Stage.VERIFY),
        Finished(stage=Stage.VERIFY),
    ]


@given(
    st.lists(
        st.tuples(st.sampled_from([*map(advanced, range(5)), START, NOTE, FINISH]), st.floats(0, 3))
    )
)
def test_order_is_kept_and_the_last_advance_before_any_other_event_arrives(steps):
    clock, seen = Clock(), []
    observe = throttled(seen.append, every=1.0, clock=clock)
    given_events = []

    for event, wait in steps:
        given_events.append(event)
        observe(event)
        clock.time += wait

    others = [event for event in given_events if not isinstance(event, Advanced)]
    assert [event for event in seen if not isinstance(event, Advanced)] == others
    left = iter(given_events)
    assert all(event in left for event in seen), "seen is no subsequence of what was given"
    for before, event in pairwise(given_events):
        if isinstance(before, Advanced) and not isinstance(event, Advanced):
            assert before in seen


def test_an_observer_that_raises_cancels():
    def cancel(event: Event) -> None:
        raise KeyboardInterrupt(event)

    observe = throttled(cancel, every=1.0, clock=Clock())

    with pytest.raises(KeyboardInterrupt):
        observe(advanced(1))


def test_the_default_observer_ignores():
    assert ignore(NOTE) is None


def test_events_are_values():
    assert Started(stage=Stage.LOAD) == Started(stage=Stage.LOAD, total=0, unit=Unit.BYTES, done=0)
    assert len({NOTE, Noted(message="x"), FINISH}) == 2
    with pytest.raises(FrozenInstanceError):
        NOTE.message = "y"


def test_stages_that_are_under_way_together_are_throttled_each_for_itself():
    seen, now = [], [0.0]
    observe = throttled(seen.append, every=1.0, clock=lambda: now[0])

    for done in range(1, 4):
        observe(Advanced(stage=Stage.FETCH, done=done))
        observe(Advanced(stage=Stage.RESHARD, done=10 * done))
        now[0] += 0.6
    observe(Finished(stage=Stage.RESHARD))

    assert [(event.stage, event.done) for event in seen[:-1]] == [
        (Stage.FETCH, 1),
        (Stage.RESHARD, 10),
        (Stage.FETCH, 3),
        (Stage.RESHARD, 30),
    ]
    assert seen[-1] == Finished(stage=Stage.RESHARD)
