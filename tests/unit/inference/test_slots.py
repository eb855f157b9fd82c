"""Slots: which one a prompt starts from, and how much of it is kept there."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from grokctl.inference.generation import PromptScores
from grokctl.inference.slots import Slots

LONG = list(range(100, 140))


def filled(*kept: list[int]) -> Slots:
    """Slots that were used in this order, with these tokens."""
    slots = Slots(len(kept))
    taken = [slots.take([1], reuse=False)[0] for _ in kept]
    for slot, tokens in zip(taken, kept, strict=True):
        slots.give_back(slot, tokens)
    return slots


def scores(start: int, count: int) -> PromptScores:
    return PromptScores(
        start=start,
        logprobs=-np.arange(start, start + count, dtype=np.float32),
        top_ids=np.zeros((count, 20), np.int32),
        top_logprobs=np.zeros((count, 20), np.float32),
    )


def test_a_prompt_takes_the_slot_with_its_longest_prefix():
    slots = filled(LONG[:20], [*LONG[:30], 7, 7], [*LONG[:25], 8], [9] * 30)

    slot, common = slots.take([*LONG, 5], reuse=True)

    assert (slot.number, common) == (1, 30)


def test_a_busy_slot_is_not_shared():
    slots = filled(LONG, [9] * 30)
    first, _ = slots.take(LONG, reuse=True)

    second, common = slots.take(LONG, reuse=True)

    assert (first.number, second.number, common) == (0, 1, 0)


def test_a_short_prefix_does_not_cost_a_slot_that_keeps_more():
    slots = filled(LONG, [])

    slot, common = slots.take([*LONG[:15], 3, 4], reuse=True)

    assert (slot.number, common) == (1, 0)


def test_a_short_prefix_that_is_most_of_a_slot_is_used():
    slots = filled(LONG, LONG[:3], [])

    slot, common = slots.take([*LONG[:3], 9], reuse=True)

    assert (slot.number, common) == (1, 3)


def test_the_slot_that_is_taken_anyway_is_used_at_any_length():
    slots = filled(LONG)

    assert slots.take([*LONG[:3], 3, 4], reuse=True)[1] == 3


def test_without_a_prefix_the_slot_that_was_used_longest_ago_is_taken():
    slots = filled([1] * 20, [2] * 20, [3] * 20)
    again, _ = slots.take([1] * 20, reuse=True)
    slots.give_back(again, [1] * 20)

    assert slots.take([5, 5], reuse=True)[0].number == 1


def test_who_wants_no_kept_prefix_gets_none():
    slots = filled(LONG)

    assert slots.take(LONG, reuse=False)[1] == 0


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 50))
def test_scores_are_kept_as_far_as_tokens_are_common(lengths, common):
    slots = Slots(1)
    slot, _ = slots.take([1], reuse=True)
    parts, start = [], 1
    for length in lengths:
        parts.append(scores(start, length))
        start += length
    slots.give_back(slot, range(start), parts)

    kept = slot.scores_of(common)

    assert slot.scored == start
    expected = [-float(place) for place in range(1, min(common, start))]
    assert [float(value) for part in kept for value in part.logprobs] == expected
    assert all(len(part.logprobs) for part in kept)
