"""The arithmetic of `doctor`'s estimate, which `make gpu-forms` uses too."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.planning.step_time import (
    ENDS_S,
    LAUNCHES_OF_A_LAYER,
    LAUNCHES_OUTSIDE,
    Counts,
    counts_of,
    step_time,
    sums_s,
)

SMALL = replace(GROK_1, num_layers=3)


@pytest.mark.parametrize(
    ("mesh", "sums"),
    [
        pytest.param(MeshShape(1, 1), 0, id="one device"),
        pytest.param(MeshShape(1, 8), 3 + 3 + 1, id="attention, experts and the embedding"),
        pytest.param(MeshShape(2, 8), 3 + 3 + 1, id="in both axes"),
        pytest.param(MeshShape(2, 1), 3, id="experts alone"),
    ],
)
def test_sums_are_those_of_the_axes_that_have_several_devices(mesh, sums):
    assert counts_of(SMALL, mesh, platform="gpu").sums == sums
    assert counts_of(SMALL, mesh, platform="tpu") == Counts(sums=sums)
    assert counts_of(SMALL, mesh, platform="cpu") == Counts()


def test_launches_grow_with_the_layers():
    counts = counts_of(SMALL, MeshShape(1, 8), platform="gpu")

    assert counts.launches == 3 * LAUNCHES_OF_A_LAYER + LAUNCHES_OUTSIDE


@pytest.mark.parametrize(
    ("mesh", "platform", "is_fast", "microseconds"),
    [
        pytest.param(MeshShape(1, 8), "gpu", True, 7 * 8, id="one host"),
        pytest.param(MeshShape(1, 16), "gpu", True, 7 * 30, id="two hosts"),
        pytest.param(MeshShape(2, 8), "gpu", True, 4 * 8 + 3 * 30, id="experts over two hosts"),
        pytest.param(MeshShape(1, 8), "gpu", False, 7 * 40, id="PCIe"),
        pytest.param(MeshShape(1, 8), "gpu", None, 7 * 40, id="unknown links"),
        pytest.param(MeshShape(1, 16), "tpu", True, 7 * 15, id="TPUs"),
        pytest.param(MeshShape(1, 1), "gpu", True, 0, id="one device"),
        pytest.param(MeshShape(1, 8), "cpu", None, 0, id="virtual devices"),
    ],
)
def test_sums_take_as_long_as_the_links_between_their_devices(
    mesh, platform, is_fast, microseconds
):
    found = sums_s(SMALL, mesh, platform=platform, has_fast_links=is_fast)

    assert found == pytest.approx(microseconds * 1e-6)


def test_the_time_is_the_sum_of_what_it_is_spent_on():
    """1.5 us a launch, bytes at 0.65 of the rate, the sums, 1.5 ms of ends, 45 us a wait."""
    counts = Counts(launches=1000, sums=129, waits=3)

    time = step_time(counts, nbytes=10**10, bandwidth=3.35e12, sums_s=129 * 8e-6)

    expected = 1000 * 1.5e-6 + 1e10 / (0.65 * 3.35e12) + 129 * 8e-6 + 1.5e-3 + 3 * 45e-6
    assert time.total_s == pytest.approx(expected)


def test_a_cpu_has_no_ends():
    time = step_time(Counts(), nbytes=6 * 10**9, bandwidth=1e10, sums_s=0.0, platform="cpu")

    assert time.total_s == time.reading_s == pytest.approx(1.0)


@given(st.integers(0, 10**12), st.integers(0, 10**12), st.floats(1e9, 1e14))
def test_fewer_bytes_are_never_slower(some, more, bandwidth):
    times = [
        step_time(Counts(launches=1), nbytes=nbytes, bandwidth=bandwidth, sums_s=0.0).total_s
        for nbytes in sorted((some, more))
    ]

    assert ENDS_S < times[0] <= times[1]
