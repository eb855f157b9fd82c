"""Memory that files are read into directly, and that JAX on a CPU uses as arrays without a copy."""

import mmap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from grokctl.inference.expert_reader import PAGE, Window

_HUGE: Final = 2**21
"""Bytes of a huge page: a read of many small ones looks each of them up."""
_BFLOAT16_NAN: Final = 0x7FC0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Where a file has an array."""

    key: str
    """Of the tensor, such as `layers.10.moe.down.scales`."""
    offset: int
    """Bytes from the start of the file."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    """As `Matrix` stores it: bfloat16 as its bits in uint16."""

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def room(self) -> int:
        """Bytes of the most pages that as many bytes can lie in."""
        return (self.nbytes + 2 * PAGE - 2) // PAGE * PAGE


class Buffer:
    """Memory for arrays of a file, at the same places within their pages as in the file.

    It serves for any parts of the same sizes.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        """Take memory for such parts, and touch it: a machine without it should say so now."""
        rooms = [part.room for part in parts]
        memory, low = _anonymous(sum(rooms)), 0
        memory[::PAGE] = 0
        self._rooms: list[NDArray[np.uint8]] = []
        for room in rooms:
            self._rooms.append(memory[low : low + room])
            low += room

    def windows(self, parts: Sequence[Part]) -> list[Window]:
        """What to read for parts."""
        windows = []
        for part, room in zip(parts, self._rooms, strict=True):
            before = part.offset % PAGE
            pages = -(-(before + part.nbytes) // PAGE) * PAGE
            windows.append(
                Window(memoryview(room[:pages].data), part.offset - before, before + part.nbytes)
            )
        return windows

    def arrays(self, parts: Sequence[Part]) -> list[NDArray[Any]]:
        """Views of the memory, which hold the parts once these were read."""
        views = []
        for part, room in zip(parts, self._rooms, strict=True):
            before = part.offset % PAGE
            view = room[before : before + part.nbytes].view(part.dtype)
            views.append(view.reshape(part.shape))
        return views

    def spoil(self, parts: Sequence[Part]) -> None:
        """Make sure that no expert computes anything finite of what is here now.

        Fresh memory reads as zeros, and used memory as another expert: neither would be noticed.
        NaN in the last row of every float does, and costs nothing beside a read.
        """
        for view in self.arrays(parts):
            if view.dtype == np.uint16:
                view[..., -1, :] = _BFLOAT16_NAN
            elif view.dtype.kind == "f":
                view[..., -1, :] = np.nan


def _anonymous(nbytes: int) -> NDArray[np.uint8]:
    """Memory of this process at a whole page, or at a whole huge page if it fills one."""
    step = _HUGE if nbytes >= _HUGE else PAGE
    memory = mmap.mmap(-1, nbytes + step)
    if step == _HUGE:
        with suppress(OSError, AttributeError):  # not Linux, or without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    room: NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
    begin = -room.ctypes.data % step
    return room[begin : begin + nbytes]
