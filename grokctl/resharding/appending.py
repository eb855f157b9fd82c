"""Bytes appended to a file; those of large files past the page cache.

Copies in the page cache are of no use to a run that writes a hundred times the memory, and cost the
system more than the disk does: what others have in it is thrown out, and every page is found,
cleared and found again. `O_DIRECT` takes only whole blocks, from memory at whole blocks. So bytes
are collected in such memory; where a file is to be complete, the rest of the last block is written
as zeros and cut off again.
"""

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from typing import Final

LARGE: Final = 2**28
"""Bytes of a file that is written past the page cache."""
_BLOCK: Final = 4096
"""Bytes: a multiple of what every disk and file system wants."""
_BUFFER: Final = 2**20
"""Bytes that are written at a time."""


class Appending:
    """The end of an open file, where one thread appends."""

    def __init__(self, handle: int, nbytes: int, *, is_large: bool) -> None:
        """Go on at the end of a file.

        Args:
            handle: Open for reading and writing; it stays the caller's.
            nbytes: Of the file.
            is_large: Whether to write past the page cache, where the system can.

        Raises:
            OSError: The file cannot be read.
        """
        self._handle = handle
        self.nbytes = nbytes
        """Bytes appended so far, those included that are not written yet."""
        self._memory: memoryview | None = None
        """What is collected, if the file is written past the page cache."""
        self._start = nbytes // _BLOCK * _BLOCK
        """Where the memory's bytes belong in the file."""
        if is_large:
            memory = memoryview(mmap.mmap(-1, _BUFFER))  # at a page, as all mappings are
            os.preadv(handle, [memory[: nbytes - self._start]], self._start)
            if _bypass_cache(handle, bypass=True):
                self._memory = memory

    def append(self, data: memoryview) -> None:
        """Append bytes.

        Raises:
            OSError: They cannot be written.
        """
        if self._memory is None:
            _write(self._handle, data, self.nbytes)
            self.nbytes += len(data)
            return
        while data:
            filled = self.nbytes - self._start
            count = min(len(data), _BUFFER - filled)
            self._memory[filled : filled + count] = data[:count]
            self.nbytes, data = self.nbytes + count, data[count:]
            if filled + count == _BUFFER:
                _write(self._handle, self._memory, self._start)
                self._start = self.nbytes

    def settle(self) -> None:
        """Write what was collected: the file then has exactly the bytes that were appended.

        Raises:
            OSError: They cannot be written.
        """
        if self._memory is None or self._start == self.nbytes:
            return
        filled = self.nbytes - self._start
        end = -(-filled // _BLOCK) * _BLOCK
        self._memory[filled:end] = bytes(end - filled)
        _write(self._handle, self._memory[:end], self._start)
        os.ftruncate(self._handle, self.nbytes)
        whole = filled // _BLOCK * _BLOCK
        self._memory[: filled - whole] = bytes(self._memory[whole:filled])
        self._start += whole


def _write(handle: int, data: memoryview, offset: int) -> None:
    """Write bytes at a place in a file."""
    while data:
        try:
            count = os.pwrite(handle, data, offset)
        except OSError as error:
            # a file system may refuse blocks only now, or the rest of a block that it took in part
            if error.errno != errno.EINVAL or not _bypass_cache(handle, bypass=False):
                raise
            continue
        data, offset = data[count:], offset + count


def _bypass_cache(handle: int, *, bypass: bool) -> bool:
    """Write a file past the page cache, or no longer; False if it was so, or cannot be."""
    with suppress(OSError, AttributeError):  # no such file system, or no such system
        flags = fcntl.fcntl(handle, fcntl.F_GETFL)
        wanted = flags | os.O_DIRECT if bypass else flags & ~os.O_DIRECT
        if wanted != flags:
            fcntl.fcntl(handle, fcntl.F_SETFL, wanted)
            return True
    return False
