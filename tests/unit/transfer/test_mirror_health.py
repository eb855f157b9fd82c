"""When a mirror is paused, when it is dropped, and the notes for users."""

import threading
from contextlib import suppress

import pytest

from grokctl.transfer.mirror_health import MirrorHealth


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


def seconds_of_pause(health, clock):
    """How long it is not available from now on; afterwards that time is over."""
    began = clock.now
    while not health.is_available:
        clock.now += 0.25
    return clock.now - began


def test_a_mirror_pauses_longer_each_time_but_never_more_than_a_minute(clock):
    health = MirrorHealth("x")
    pauses = []

    for _ in range(10):
        began = clock.now
        clock.now += 1
        health.pause("broke off", began=began)
        pauses.append(seconds_of_pause(health, clock))

    assert pauses == [0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert health.take_notes() == ["mirror x: broke off; trying again soon"]


def test_requests_that_fail_together_are_one_failure(clock):
    health = MirrorHealth("x")
    began = clock.now
    clock.now += 1

    for trouble in ("broke off", "fell silent", "answers 503"):
        health.pause(trouble, began=began)

    assert seconds_of_pause(health, clock) == 0.5
    assert health.state().trouble == "answers 503"


def test_a_success_makes_the_next_pause_short_again(clock):
    health = MirrorHealth("x")
    for _ in range(3):
        began = clock.now
        clock.now += 1
        health.pause("broke off", began=began)
    seconds_of_pause(health, clock)

    health.succeed()
    clock.now += 1
    health.pause("broke off", began=clock.now - 1)

    assert seconds_of_pause(health, clock) == 0.5


def test_a_dropped_mirror_stays_dropped(clock):
    health = MirrorHealth("x")

    health.drop("sent wrong bytes")
    clock.now += 1e6

    assert not health.is_available
    assert health.state().is_dropped
    assert health.take_notes() == ["mirror x: dropped: sent wrong bytes"]
    assert health.take_notes() == []


def test_a_mirror_that_lacks_many_files_and_delivered_nothing_is_dropped():
    health = MirrorHealth("x")

    for file in range(7):
        health.miss(file, range(file, file + 2), "is not there")
    was_dropped = health.is_dropped
    health.miss(7, range(7, 9), "is not there")

    assert not was_dropped
    assert health.is_dropped
    assert health.state().trouble == "does not hold this release: is not there"
    assert health.missing == set(range(9))


def test_a_mirror_that_delivered_something_may_lack_any_files():
    health = MirrorHealth("x")
    health.succeed()

    for file in range(100):
        health.miss(file, range(file, file + 1), "is not there")
    health.drop_if_useless()

    assert not health.is_dropped
    assert health.take_notes() == ["mirror x: a file is missing: is not there"]


def test_a_mirror_without_requests_is_not_dropped():
    health = MirrorHealth("x")

    health.drop_if_useless()

    assert not health.is_dropped


def test_the_rate_is_over_the_last_seconds(clock):
    health = MirrorHealth("x")

    rates = []
    for _ in range(6):
        rates.append(health.state().rate)
        health.receive(1000)
        clock.now += 1
    clock.now += 10

    assert rates == [0, 1000, 1000, 1000, 1000, 1000]
    assert health.state().rate == 0


class Interrupted(int):
    """A count whose addition another thread can overtake, as Python allows between bytecodes."""

    def __new__(cls, value, meeting):
        count = super().__new__(cls, value)
        count.meeting = meeting
        return count

    def __add__(self, other):
        with suppress(threading.BrokenBarrierError):
            self.meeting.wait(timeout=0.2)
        return Interrupted(int(self) + other, self.meeting)


def test_no_byte_is_lost_when_workers_count_at_the_same_time():
    health = MirrorHealth("x")
    health._nbytes = Interrupted(0, threading.Barrier(2))
    workers = [threading.Thread(target=health.receive, args=(1000,)) for _ in range(2)]

    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert health.nbytes == 2000


def test_a_pause_that_the_mirror_asks_for_is_kept_to_the_end(clock):
    health = MirrorHealth("x")

    health.pause("answers 429", began=clock.now, wait_s=90.0)

    assert (health.asked_s, health.asked_until) == (90, clock.now + 90)
    assert seconds_of_pause(health, clock) == 90
    health.pause("answers 500", began=clock.now)
    assert seconds_of_pause(health, clock) == 1
    assert (health.asked_s, health.asked_until) == (90, clock.now - 1)
