"""Which experts stay in memory: never more than fits, spread evenly, and the paper's numbers."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.storage import released_storage, storage_in
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.model.sizing import Needs
from grokctl.planning.plans import hardware_for, plans
from grokctl.planning.residence import place, room_in
from grokctl.planning.spread import Spread

GB = 10**9
ONE = MeshShape(1, 1)
SIZES = st.integers(0, 1000)


@st.composite
def questions(draw):
    """A model of few bytes, and memory for some of it."""
    config = replace(
        GROK_1, num_layers=draw(st.integers(1, 9)), num_experts=draw(st.integers(2, 8))
    )
    one = draw(st.integers(1, 50))
    experts = one * config.num_layers * config.num_experts
    needed = Needs(weights=experts + draw(SIZES), cache=draw(SIZES), workspace=draw(SIZES))
    return config, needed, experts, draw(st.integers(0, 2 * needed.total))


@given(questions())
def test_what_is_planned_fits_or_says_what_lacks(question):
    config, needed, experts, memory = question

    found = place(config, needed, experts=experts, memory=memory)

    if found is None:
        assert needed.total <= memory
        return
    assert needed.total > memory
    assert found.total == room_in(memory) + found.missing or not found.missing
    assert found.missing == max(0, found.total - room_in(memory))
    assert 2 <= found.transient <= 4
    assert 0 <= found.pinned < found.experts
    if found.missing:
        assert found.pinned == 0
    else:  # not one more would fit
        assert found.total + found.expert_nbytes > room_in(memory)


@given(questions(), st.integers(0, 3000))
def test_more_memory_never_keeps_less_nor_waits_longer(question, more):
    config, needed, experts, memory = question
    less = place(config, needed, experts=experts, memory=memory)
    if less is None:
        return

    larger = less.with_memory(memory + more)

    assert larger == place(config, needed, experts=experts, memory=memory + more)
    if larger is None:
        return
    assert larger.pinned + larger.transient >= less.pinned + less.transient
    assert larger.missing <= less.missing


@given(questions())
def test_every_layer_keeps_as_many_experts_or_one_more(question):
    config, needed, experts, memory = question
    found = place(config, needed, experts=experts, memory=memory)
    if found is None:
        return

    layers = [layer for layer, _ in found.kept]
    counts = [layers.count(layer) for layer in range(config.num_layers)]

    assert len(set(found.kept)) == found.pinned
    assert max(counts) - min(counts) <= 1
    assert max(counts) <= config.num_experts
    assert found.hit_rate == pytest.approx(found.pinned / found.experts)


@given(questions(), st.data())
def test_what_counted_texts_chose_most_stays(question, data):
    config, needed, experts, memory = question
    row = st.lists(
        st.integers(0, 99), min_size=config.num_experts, max_size=config.num_experts
    ).filter(any)
    counts = tuple(tuple(data.draw(row)) for _ in range(config.num_layers))
    alike = place(config, needed, experts=experts, memory=memory)
    if alike is None:
        return

    found = place(config, needed, experts=experts, memory=memory, counts=counts)

    assert replace(found, counts=None) == alike
    assert len(set(found.kept)) == found.pinned
    shares = [[count / sum(row) for count in row] for row in counts]
    kept = [shares[layer][number] for layer, number in found.kept]
    others = [
        shares[layer][number]
        for layer in range(config.num_layers)
        for number in range(config.num_experts)
        if (layer, number) not in set(found.kept)
    ]
    assert not kept or min(kept) >= max(others)
    counted = sum(kept) / config.num_layers
    assert found.hit_rate == pytest.approx((counted + found.pinned / found.experts) / 2)
    assert found.hit_rate >= alike.hit_rate - 1e-9


@given(questions(), st.integers(1, 99))
def test_a_step_of_more_tokens_reads_more_and_at_most_all_that_does_not_stay(question, tokens):
    config, needed, experts, memory = question
    found = place(config, needed, experts=experts, memory=memory)
    if found is None:
        return

    one, some, many = found.read(1), found.read(tokens), found.read(10**6)

    assert one == pytest.approx(found.missed, abs=1)
    assert one <= some <= many <= found.swept
    assert many == pytest.approx(found.swept, abs=1)


def test_more_memory_ends_with_the_first_that_holds_all():
    (plan,) = (
        plan
        for plan in plans(hardware_for(accelerator="cpu", memory=100 * GB))
        if plan.precision is Precision.INT4
    )

    larger = plan.residence.larger()

    assert [memory // GB for memory, _ in larger] == [128, 192]
    assert larger[0][1] == plan.residence.with_memory(128 * GB)
    assert larger[0][1].pinned > plan.residence.pinned
    assert larger[1][1] is None


@given(questions(), st.floats(1, 1e6), st.floats(1, 1e6))
def test_a_token_takes_the_longer_of_reading_and_computing_and_not_both(
    question, disk, memory_rate
):
    config, needed, experts, memory = question
    found = place(config, needed, experts=experts, memory=memory)
    if found is None:
        return

    seconds = found.seconds(read_rate=disk, decode_rate=memory_rate)

    reading, computing = found.missed / disk, found.chosen_nbytes / memory_rate
    dense = found.dense / memory_rate
    assert dense + max(reading, computing) <= seconds * (1 + 1e-9)
    assert seconds <= dense + reading + computing + 1e-9
    assert found.seconds(read_rate=disk, decode_rate=None) == pytest.approx(reading)


@pytest.mark.parametrize(
    ("memory", "precision", "share"),
    [
        pytest.param(32, Precision.INT8, 0.4, id="32 GB int8"),
        pytest.param(64, Precision.INT8, 1.2, id="64 GB int8"),
        pytest.param(128, Precision.INT8, 2.9, id="128 GB int8"),
        pytest.param(256, Precision.INT8, 6.1, id="256 GB int8"),
        pytest.param(32, Precision.INT4, 0.9, id="32 GB int4"),
        pytest.param(64, Precision.INT4, 2.5, id="64 GB int4"),
        pytest.param(128, Precision.INT4, 5.6, id="128 GB int4"),
    ],
)
@pytest.mark.parametrize("disk", [3.5, 7, 14])
def test_grok_1_keeps_and_waits_for_what_the_adr_says(memory, precision, share, disk):
    hardware = replace(
        hardware_for(accelerator="cpu", memory=memory * GB), bandwidth=1e15, read_rate=disk * GB
    )

    (plan,) = (plan for plan in plans(hardware) if plan.precision is precision)

    residence = plan.residence
    assert residence is not None
    assert plan.fits
    assert 8 * residence.hit_rate == pytest.approx(share, abs=0.11)  # experts of 8, in each layer
    missed = residence.expert_nbytes * 128 * (1 - share / 8)
    assert 1 / plan.tokens_per_s == pytest.approx(missed / (disk * GB), rel=0.03)


def test_dense_weights_are_those_that_are_no_experts():
    weights = Spread.of(storage_in(released_storage(GROK_1), Precision.INT8, ONE), ONE)
    needed = Needs(weights=weights.stored[0], cache=2 * GB, workspace=GB)

    found = place(GROK_1, needed, experts=weights.experts[0], memory=64 * GB)

    assert found.expert_nbytes * 512 == weights.experts[0]
    assert found.dense == pytest.approx(8.885 * GB, rel=1e-3)
    assert found.chosen_nbytes + found.dense == weights.read[0]


@settings(max_examples=20)
@given(st.integers(1, 12 * GB))
def test_below_the_floor_every_number_of_the_sum_is_named(memory):
    needed = Needs(weights=318 * GB, cache=2 * GB, workspace=GB)

    found = place(GROK_1, needed, experts=309 * GB, memory=memory)

    assert found.missing > 0
    assert found.pinned == 0
    for part in ("9.0 GB of weights", "2.0 GB of cache", "1.0 GB to compute", "1.2 GB for 2 exp"):
        assert part in found.shortage
