"""Hash trees of v2 torrents (BEP 52): SHA-256 over leaves of 16 KiB, and over pairs above them."""

import hashlib
from collections.abc import Sequence
from itertools import zip_longest
from typing import Final, Protocol

LEAF: Final = 2**14
"""Bytes under one leaf."""


class Hasher(Protocol):
    """Hashes the bytes of one piece."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Take the next bytes."""

    def digest(self) -> bytes:
        """The hash to compare with `Metainfo.piece_hash`."""
        ...


class TreeHasher:
    """The root of a piece's tree; leaves beyond the end of the file count as zero hashes.

    With buffers of many leaves, it is as fast as SHA-256 and does not slow other threads.
    """

    def __init__(self, piece_length: int) -> None:
        self._levels = levels_above(piece_length // LEAF)
        self._leaves: list[bytes] = []
        self._open = hashlib.sha256()
        self._room = LEAF

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Take the next bytes."""
        view = memoryview(data)
        if self._room < LEAF:
            view = self._fill(view)
        end = len(view) // LEAF * LEAF
        self._leaves += [
            hashlib.sha256(view[start : start + LEAF]).digest() for start in range(0, end, LEAF)
        ]
        if end < len(view):
            self._open = hashlib.sha256(view[end:])
            self._room = LEAF - (len(view) - end)

    def _fill(self, view: memoryview) -> memoryview:
        """Complete the open leaf, and return the rest."""
        taken = min(self._room, len(view))
        self._open.update(view[:taken])
        self._room -= taken
        if self._room == 0:
            self._leaves.append(self._open.digest())
            self._room = LEAF
        return view[taken:]

    def digest(self) -> bytes:
        """The root over all bytes so far, at most a piece."""
        is_open = self._room < LEAF
        leaves = [*self._leaves, self._open.digest()] if is_open else self._leaves
        return root_above(leaves, self._levels)


def levels_above(nodes: int) -> int:
    """Levels of a binary tree above this many nodes."""
    return (nodes - 1).bit_length()


def root_above(nodes: Sequence[bytes], levels: int, *, below: int = 0) -> bytes:
    """The root of a binary tree.

    Args:
        nodes: One level of the tree, from the left; zero leaves fill the rest.
        levels: Levels above the nodes.
        below: Levels below the nodes.
    """
    filler = bytes(32)
    for _ in range(below):
        filler = hashlib.sha256(filler + filler).digest()
    for _ in range(levels):
        pairs = zip_longest(nodes[::2], nodes[1::2], fillvalue=filler)
        nodes = [hashlib.sha256(left + right).digest() for left, right in pairs]
        filler = hashlib.sha256(filler + filler).digest()
    (root,) = nodes or [filler]
    return root
