"""What a server compiles before its first request is all that requests can need."""

from hypothesis import given
from hypothesis import strategies as st

from grokctl.inference.chunks import chunks
from grokctl.inference.warm_up import batches, chunk_lengths
from grokctl.model.bucketing import padded_batch, room


@given(st.integers(1, 256), st.data())
def test_every_number_of_sequences_has_its_batch(slots, data):
    sequences = data.draw(st.integers(1, slots))

    assert padded_batch(sequences) in batches(slots)
    assert batches(slots)[-1] == padded_batch(slots)


@given(st.integers(2, 8192), st.sampled_from(["cpu", "gpu"]), st.data())
def test_every_chunk_of_every_prompt_has_its_length(context, platform, data):
    longest, past = room(context, platform=platform)
    end = data.draw(st.integers(1, context))
    start = data.draw(st.integers(0, end - 1))
    budget = data.draw(st.sampled_from((128, 512, longest)))

    lengths = chunk_lengths(longest)
    cut = chunks(start, end, longest=min(budget, longest), past=past)
    assert {chunk.padded for chunk in cut} <= set(lengths)
