"""The fuzz targets at walking pace: the same inputs every time; `make fuzz` goes on from there."""

import os
import pickle
import tracemalloc
from random import Random

import pytest
from fuzz_targets import TARGETS, Target

INPUTS = 1500
"""Mutants of each target."""


def mutants(target: Target, count: int) -> list[bytes]:
    """Damaged seeds, and damaged damaged ones."""
    rng = Random(target.name)
    pool = list(target.seeds())
    found = []
    while len(found) < count:
        found.append(target.mutate(rng.choice(pool), rng))
        if rng.random() < 0.1:
            pool.append(found[-1])
    return found


@pytest.fixture(params=TARGETS.values(), ids=TARGETS)
def target(request) -> Target:
    return request.param


def test_at_least_one_seed_of_every_target_is_accepted(target):
    verdicts = [target.run(seed) for seed in target.seeds()]

    assert any(verdicts)


def test_whatever_comes_is_read_or_refused_in_good_time(target):
    accepted = sum(target.run(data) for data in mutants(target, INPUTS))

    assert accepted < INPUTS


def test_no_input_makes_a_reader_take_much_more_memory_than_it_has_bytes(target):
    target.run(target.seeds()[0])
    for data in mutants(target, INPUTS // 10):
        tracemalloc.start()
        try:
            target.run(data)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        assert peak < 16 * 2**20 + 100 * len(data)


@pytest.mark.parametrize(
    ("read", "data", "event"),
    [
        pytest.param(pickle.loads, b"cos\nsystem\n.", "find_class", id="pickle"),
        pytest.param(exec, b"import os", "compile", id="source"),
        pytest.param(os.system, b"true", "os.system", id="command"),
    ],
)
def test_the_watch_notices_what_an_input_must_not_lead_to(read, data, event):
    careless = Target("careless", list, read, lambda *_: None, lambda data, _: data)

    with pytest.raises(AssertionError, match=event):
        careless.run(data)
