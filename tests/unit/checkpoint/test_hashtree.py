import hashlib
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.hashtree import LEAF, TreeHasher, levels_above, root_above


def plain_root(leaves: list[bytes]) -> bytes:
    """The root of a tree whose number of leaves is a power of two, level by level."""
    if len(leaves) == 1:
        return leaves[0]
    half = len(leaves) // 2
    return hashlib.sha256(plain_root(leaves[:half]) + plain_root(leaves[half:])).digest()


def plain_leaves(data: bytes, count: int) -> list[bytes]:
    found = [
        hashlib.sha256(data[start : start + 16384]).digest() for start in range(0, len(data), 16384)
    ]
    return found + [bytes(32)] * (count - len(found))


near_edges = st.tuples(st.integers(0, 8), st.integers(-2, 2)).map(
    lambda at: max(0, min(8 * LEAF, at[0] * LEAF + at[1]))
)


@given(near_edges, st.lists(near_edges.filter(bool), max_size=40), st.sampled_from([8, 16, 64]))
@example(0, [], 8)
@example(8 * LEAF, [], 8)
@settings(deadline=None, max_examples=60)
def test_the_root_is_the_same_however_the_bytes_are_cut(size, cuts, leaves):
    data = random.Random(size).randbytes(size)
    hasher = TreeHasher(leaves * LEAF)

    view, whole = memoryview(data), []
    for cut in [*cuts, size]:
        hasher.update(view[:cut])
        whole.append(bytes(view[:cut]))
        assert hasher.digest() == plain_root(plain_leaves(b"".join(whole), leaves))
        view = view[cut:]

    assert b"".join(whole) == data
    assert hasher.digest() == plain_root(plain_leaves(data, leaves))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_kind_of_buffer_is_taken_byte_by_byte(kind):
    data = random.Random(1).randbytes(LEAF + 3)
    hasher = TreeHasher(2 * LEAF)

    for start in range(len(data)):
        hasher.update(kind(data[start : start + 1]))

    assert hasher.digest() == plain_root(plain_leaves(data, 2))


def test_a_buffer_may_be_reused_as_soon_as_it_was_taken():
    hasher, buffer = TreeHasher(4 * LEAF), bytearray(LEAF + 7)
    for fill in (b"\1", b"\2"):
        buffer[:] = fill * len(buffer)
        hasher.update(buffer)

    whole = b"\1" * (LEAF + 7) + b"\2" * (LEAF + 7)
    assert hasher.digest() == plain_root(plain_leaves(whole, 4))


def test_zeros_in_a_file_are_not_the_zeros_behind_its_end():
    short, long = TreeHasher(4 * LEAF), TreeHasher(4 * LEAF)

    short.update(bytes(LEAF))
    long.update(bytes(2 * LEAF))

    assert short.digest() != long.digest()


@pytest.mark.parametrize(
    ("nodes", "levels"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (2**20, 20)]
)
def test_a_tree_has_as_many_levels_as_its_nodes_need(nodes, levels):
    assert levels_above(nodes) == levels


@given(st.integers(1, 20), st.integers(0, 5))
@settings(deadline=None)
def test_a_root_can_be_reached_from_any_level(pieces, below):
    """Hashes of whole pieces lead to the same root as all leaves below them."""
    width = 2**below
    leaves = [bytes([index % 256]) * 32 for index in range(pieces * width)]
    nodes = [plain_root(leaves[start : start + width]) for start in range(0, len(leaves), width)]

    levels = levels_above(pieces)

    whole = leaves + [bytes(32)] * (2 ** (levels + below) - len(leaves))
    assert root_above(nodes, levels, below=below) == plain_root(whole)
