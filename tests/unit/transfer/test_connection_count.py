"""As many connections as pay."""

from hypothesis import given
from hypothesis import strategies as st

from grokctl.transfer.connection_count import FEWEST, MOST, ConnectionCount


def settled(each, capacity, seconds=50):
    """The count after some seconds on a line of this capacity, at a rate for each connection."""
    connections, nbytes, counts = ConnectionCount(), 0.0, []
    for tenth in range(seconds * 10):
        counts.append(connections.measure(tenth / 10, int(nbytes)))
        nbytes += min(counts[-1] * each, capacity) / 10
    return counts


@given(each=st.integers(10**5, 10**8), share=st.floats(0.5, 40))
def test_it_ends_with_enough_to_fill_the_line_and_few_more(each, share):
    capacity = each * share

    counts = settled(each, capacity)

    assert all(FEWEST <= count <= MOST for count in counts)
    assert min(counts[-1] * each, capacity) >= 0.9 * min(MOST * each, capacity)
    assert counts[-1] <= max(FEWEST, 1.6 * share + 1)


def test_it_tries_again_after_a_minute():
    counts = settled(10**6, 4 * 10**6, seconds=90)

    assert counts[300:600] == [FEWEST] * 300
    assert max(counts[600:]) > FEWEST
