"""When a mirror is left alone, when it is dropped, and what users hear of it."""

import pytest

from grokctl.transfer.mirror_health import Standing


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("grokctl.transfer.mirror_health.time.monotonic", clock)
    return clock


def seconds_of_rest(standing, clock):
    """How long it may not be asked from now on; afterwards that time is over."""
    began = clock.now
    while not standing.may_be_asked:
        clock.now += 0.25
    return clock.now - began


def test_a_mirror_rests_longer_each_time_but_never_more_than_a_minute(clock):
    standing = Standing("x")
    rests = []

    for _ in range(10):
        began = clock.now
        clock.now += 1
        standing.rest("broke off", began=began)
        rests.append(seconds_of_rest(standing, clock))

    assert rests == [0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert standing.take_notes() == ["mirror x: broke off; it is asked again in a moment"]


def test_requests_that_fail_together_are_one_reason_to_rest(clock):
    standing = Standing("x")
    began = clock.now
    clock.now += 1

    for trouble in ("broke off", "fell silent", "answers 503"):
        standing.rest(trouble, began=began)

    assert seconds_of_rest(standing, clock) == 0.5
    assert standing.state().trouble == "answers 503"


def test_a_success_makes_the_next_rest_short_again(clock):
    standing = Standing("x")
    for _ in range(3):
        began = clock.now
        clock.now += 1
        standing.rest("broke off", began=began)
    seconds_of_rest(standing, clock)

    standing.succeed()
    clock.now += 1
    standing.rest("broke off", began=clock.now - 1)

    assert seconds_of_rest(standing, clock) == 0.5


def test_one_that_is_dropped_is_not_asked_again(clock):
    standing = Standing("x")

    standing.drop("sent wrong bytes")
    clock.now += 1e6

    assert not standing.may_be_asked
    assert standing.state().is_dropped
    assert standing.take_notes() == ["mirror x: sent wrong bytes, so it is not asked again"]
    assert standing.take_notes() == []


def test_one_that_lacks_many_files_and_brought_none_holds_something_else():
    standing = Standing("x")

    for file in range(7):
        standing.miss(file, range(file, file + 2), "is not there")
    was_dropped = standing.is_dropped
    standing.miss(7, range(7, 9), "is not there")

    assert not was_dropped
    assert standing.is_dropped
    assert standing.state().trouble == "does not hold this release: is not there"
    assert standing.lacking == set(range(9))


def test_one_that_brought_something_may_lack_whatever_it_likes():
    standing = Standing("x")
    standing.succeed()

    for file in range(100):
        standing.miss(file, range(file, file + 1), "is not there")
    standing.doubt()

    assert not standing.is_dropped
    assert standing.take_notes() == ["mirror x: lacks a file: is not there"]


def test_one_that_nothing_was_asked_of_is_not_doubted():
    standing = Standing("x")

    standing.doubt()

    assert not standing.is_dropped


def test_the_rate_is_that_of_the_last_seconds(clock):
    standing = Standing("x")

    rates = []
    for _ in range(6):
        rates.append(standing.state().rate)
        standing.nbytes += 1000
        clock.now += 1
    clock.now += 10

    assert rates == [0, 1000, 1000, 1000, 1000, 1000]
    assert standing.state().rate == 0
