"""Chunks of a prompt: every token runs, and no padding reaches behind the cache."""

from hypothesis import given
from hypothesis import strategies as st

from grokctl.inference.chunks import chunks, next_chunk
from grokctl.model.bucketing import SHORTEST_CHUNK, room


@st.composite
def prompts(draw):
    context = draw(st.integers(1, 9000))
    platform = draw(st.sampled_from(["cpu", "gpu"]))
    longest, past = room(context, platform=platform)
    end = draw(st.integers(1, context))
    start = draw(st.integers(0, end - 1))
    budget = draw(st.sampled_from([16, 64, 128, 512, 2048]))
    return start, end, min(longest, budget), past


@given(prompts())
def test_every_token_runs_in_order_and_no_chunk_is_written_behind_the_cache(prompt):
    start, end, longest, past = prompt
    reached, again = start, 0

    for chunk in chunks(start, end, longest=longest, past=past):
        assert 0 <= chunk.start <= reached < chunk.end <= end
        assert 0 < chunk.count <= chunk.padded <= longest
        assert chunk.start + chunk.padded <= past
        again += reached - chunk.start
        reached = chunk.end

    assert reached == end
    assert again < SHORTEST_CHUNK  # "at most 15 more"


@given(prompts())
def test_few_lengths_are_compiled_and_few_chunks_run(prompt):
    start, end, longest, past = prompt
    parts = list(chunks(start, end, longest=longest, past=past))

    assert all(
        part.padded == 1 or (part.padded >= SHORTEST_CHUNK and part.padded.bit_count() == 1)
        for part in parts
    )
    # near the end of the cache, halves of halves
    assert len(parts) <= (end - start) // longest + 1 + longest.bit_length()


def test_a_chunk_near_the_end_of_the_cache_is_short_instead_of_early():
    first = next_chunk(7000, 8192, longest=2048, past=8192)
    last = next_chunk(8187, 8192, longest=2048, past=8192)

    assert (first.start, first.padded, first.count) == (7000, 1024, 1024)
    assert (last.start, last.padded, last.count) == (8176, 16, 16)  # 11 tokens run again
