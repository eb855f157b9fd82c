"""Slots: which one a prompt starts from, and how much of it is kept there."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from grokctl.inference.generation import PromptOutput, PromptScores, Request
from grokctl.inference.slots import Slots
from grokctl.model.sampling import Sampling

GREEDY = Sampling()


def request(tokens, **options) -> Request:
    return Request(prompt=tuple(tokens), sampling=GREEDY, max_tokens=1, **options)


LONG = list(range(100, 140))


def filled(*kept: list[int]) -> Slots:
    """Slots that were used in this order, with these tokens."""
    slots = Slots(len(kept))
    taken = [slots.take(request([1], cache_prompt=False)).slot for _ in kept]
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

    place = slots.take(request([*LONG, 5]))

    assert (place.slot.number, place.common) == (1, 30)


def test_what_a_busy_slot_has_is_copied():
    slots = filled(LONG, [9] * 30)
    first = slots.take(request(LONG)).slot
    first.tokens = np.array(LONG[:20], np.int32)

    second = slots.take(request(LONG), [first])

    assert (first.number, second.slot.number) == (0, 1)
    assert (second.common, second.source) == (20, 0)  # as much as it has now, copied


def test_a_short_prefix_does_not_cost_a_slot_that_keeps_more():
    slots = filled(LONG, [])

    place = slots.take(request([*LONG[:15], 3, 4]))

    assert (place.slot.number, place.common) == (1, 0)


def test_a_short_prefix_that_is_most_of_a_slot_is_used():
    slots = filled(LONG, LONG[:3], [])

    place = slots.take(request([*LONG[:3], 9]))

    assert (place.slot.number, place.common) == (1, 3)


def test_a_prefix_that_is_a_small_part_of_a_slot_is_copied_and_the_rest_stays():
    slots = filled(LONG * 10, [])

    place = slots.take(request([*LONG, 5]))

    assert (place.slot.number, place.common, place.source) == (1, 40, 0)
    assert len(slots.free[0].tokens) == 400


def test_for_scores_only_tokens_with_scores_are_kept():
    slots = filled(LONG, LONG[:20])
    slots.free[1].scores = [scores(1, 17)]
    scored = request(LONG, of_prompt=PromptOutput.SCORES)

    place = slots.take(scored)

    assert (place.slot.number, place.common, place.source) == (1, 18, None)
    assert place.scores[-1].end == 18


def test_the_slot_that_is_taken_anyway_is_used_at_any_length():
    slots = filled(LONG)

    assert slots.take(request([*LONG[:3], 3, 4])).common == 3


def test_without_a_prefix_the_slot_that_was_used_longest_ago_is_taken():
    slots = filled([1] * 20, [2] * 20, [3] * 20)
    again = slots.take(request([1] * 20)).slot
    slots.give_back(again, [1] * 20)

    assert slots.take(request([5, 5])).slot.number == 1


def test_who_wants_no_kept_prefix_gets_none():
    slots = filled(LONG)

    assert slots.take(request(LONG, cache_prompt=False)).common == 0


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 50))
def test_scores_are_kept_as_far_as_tokens_are_common(lengths, common):
    slots = Slots(1)
    slot = slots.take(request([1])).slot
    parts, start = [], 1
    for length in lengths:
        parts.append(scores(start, length))
        start += length
    slots.give_back(slot, range(start), parts)

    kept = slot.scores_of(common)

    assert slot.scores[-1].end == start
    expected = [-float(place) for place in range(1, min(common, start))]
    assert [float(value) for part in kept for value in part.logprobs] == expected
    assert all(len(part.logprobs) for part in kept)
