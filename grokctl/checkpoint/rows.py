"""Rows of a released matrix, read in order into a buffer that is reused."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.pickle_objects import ArrayRef
from grokctl.model.placement import Slice
from grokctl.system import Reading, announce

_NARROW: Final = 2
"""Rows are read in parts if less than one in this many columns is wanted."""


def is_narrow(columns: Slice, length: int) -> bool:
    """Whether so few columns of rows are wanted that only those are read."""
    return (columns[1] - columns[0]) * _NARROW < length


class Rows:
    """Reads rows of one array of an open file; nothing is mapped, so no page counts as memory."""

    def __init__(self, handle: int, array: ArrayRef) -> None:
        self._handle = handle
        self._array = array
        self._memory: NDArray[np.uint8] = np.empty(0, np.uint8)

    def read(self, rows: Slice, columns: Slice) -> NDArray[Any]:
        """Some columns of some rows.

        Args:
            rows: Of the array with all axes but the last taken together.
            columns: Of the last axis.

        Returns:
            `(rows, columns)`, valid until the next call.

        Raises:
            OSError: The file cannot be read, or ends early.
        """
        dtype = self._array.dtype
        length, count = self._array.shape[-1], rows[1] - rows[0]
        is_apart = is_narrow(columns, length)
        first, last = columns if is_apart else (0, length)
        width, pitch = (last - first) * dtype.itemsize, length * dtype.itemsize
        if self._memory.size < count * width:
            self._memory = np.empty(count * width, np.uint8)
        memory = self._memory[: count * width]
        start = self._array.offset + rows[0] * pitch + first * dtype.itemsize
        if is_apart:
            read_apart(memory.reshape(count, width), self._handle, start, pitch)
        else:
            read_into(memory, self._handle, start)
        block: NDArray[Any] = memory.view(dtype).reshape(count, last - first)
        return block[:, columns[0] - first : columns[1] - first]


def read_into(memory: NDArray[np.uint8], handle: int, offset: int) -> None:
    """Fill memory with the bytes of a file from an offset on.

    Raises:
        OSError: The file cannot be read, or ends early.
    """
    view = memoryview(memory.data)
    while view:
        count = os.preadv(handle, [view], offset)
        if not count:
            raise OSError(f"ends before byte {offset}")
        view, offset = view[count:], offset + count


def read_apart(memory: NDArray[np.uint8], handle: int, offset: int, pitch: int) -> None:
    """Fill each row of memory with bytes of a file.

    Args:
        memory: `(rows, bytes)`, contiguous.
        handle: The open file.
        offset: Of the first row in it.
        pitch: Bytes from one row to the next in it.

    Raises:
        OSError: The file cannot be read, or ends early.
    """
    (_, width), flat = memory.shape, memory.reshape(-1)
    view = memoryview(flat.data)
    for low in range(0, memory.size, width):  # short: there may be 30,000 rows
        if os.preadv(handle, [view[low : low + width]], offset) < width:
            read_into(flat[low : low + width], handle, offset)
        offset += pitch


@contextmanager
def opened(path: Path, array: ArrayRef) -> Iterator[Rows]:
    """Open a file to read rows of an array in it.

    Raises:
        OSError: It cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        announce(handle, Reading.IN_ORDER)
        yield Rows(handle, array)
    finally:
        os.close(handle)
