"""Bytes of a file at the speed of its disk: a few large requests at a time, past the page cache.

What is read for a token and not again before everything else was read gains nothing from the page
cache, pushes out of it what other programs need, and costs a copy (docs/adr/0019).
"""

import errno
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

from grokctl.errors import HardwareError
from grokctl.system import is_unsupported, optional

PAGE: Final = 4096
"""Direct reads begin and end at multiples of this, in the file and in memory."""
_REQUEST: Final = 2**24
_THREADS: Final = 4
"""Bytes of a request, and requests at a time (docs/adr/0019)."""
_STALL_S: Final = 60.0
_TICK_S: Final = 0.5

Read = Callable[[int, list[Any], int], int]
"""What `os.preadv` is: fills memory from an offset of a file on, and says how many bytes came."""


@dataclass(frozen=True, slots=True)
class Window:
    """Whole pages of a file, and the memory for them."""

    memory: memoryview
    """Begins at a multiple of `PAGE`, and has whole pages."""
    start: int
    """Offset in the file, a multiple of `PAGE`."""
    needed: int
    """Bytes that must come: the file may end within the last page."""


class Reading:
    """Windows that are being read."""

    def __init__(self, file: "_File", requests: int) -> None:
        self.is_cancelled = False
        self._file = file
        self._left = requests
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._error: OSError | None = None
        self._asked = time.monotonic()

    @property
    def has_ended(self) -> bool:
        """Whether nothing is written to the memory any more."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Begin no further request; those under way still write."""
        self.is_cancelled = True

    def wait(self) -> None:
        """Wait until all is in memory.

        Raises:
            OSError: It cannot be read, or the file is too short.
            HardwareError: The disk has sent nothing for a minute.
        """
        self.wait_end()
        if self._error is not None:
            raise self._error

    def wait_end(self) -> None:
        """Wait until nothing is written to the memory any more, whatever has become of it.

        Raises:
            HardwareError: The disk has sent nothing for a minute.
        """
        while not self._ended.wait(_TICK_S):
            self._file.check_alive(self._asked)

    def end_one(self, error: OSError | None) -> None:
        """Note the end of one request."""
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            if not self._left:
                self._ended.set()


@dataclass(frozen=True, slots=True)
class _Request:
    reading: Reading
    window: Window


class _File:
    """An open file, read by several threads."""

    def __init__(self, path: Path, *, stall_s: float, read: Read) -> None:
        self._path, self._stall_s, self._preadv = path, stall_s, read
        self._lock = threading.Lock()
        self._handle, self.is_direct = _opened(path)
        self._handles = [self._handle]
        weakref.finalize(self, _close, self._handles)
        self.nbytes = 0
        self._latest = time.monotonic()

    def fill(self, window: Window) -> None:
        """Read one window.

        Raises:
            OSError: It cannot be read, or the file is too short.
        """
        memory, start, left = window.memory, window.start, window.needed
        while left > 0:
            handle, is_direct = self._handle, self.is_direct
            try:
                count = self._preadv(handle, [memory], start)
            except OSError as error:
                if not (is_direct and is_unsupported(error)):
                    raise
                self._go_through_cache()
                continue
            if not count or (is_direct and count < left and count % PAGE):
                raise OSError(f"ends before byte {start + count + 1:,}")
            if not is_direct:
                _forget(handle, start, count)
            with self._lock:
                self.nbytes += count
                self._latest = time.monotonic()
            memory, start, left = memory[count:], start + count, left - count

    def _go_through_cache(self) -> None:
        """Read without `O_DIRECT` from now on: some file systems refuse it only at the read."""
        with self._lock:
            if self.is_direct:
                handle = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
                self._handles.append(handle)
                self._handle, self.is_direct = handle, False

    def check_alive(self, asked: float) -> None:
        """Refuse to wait longer for a disk that sends nothing.

        Args:
            asked: When something was asked for, on the monotonic clock.

        Raises:
            HardwareError: It has sent nothing for too long.
        """
        silent = time.monotonic() - max(asked, self._latest)
        if silent > self._stall_s:
            raise HardwareError(
                f"{self._path}: the disk has sent nothing for {silent:.0f} s",
                "dmesg | tail  # what the kernel says about the disk",
            )


class ExpertReader:
    """Reads windows of one file with a few threads of its own, in the order of the questions.

    Args:
        path: The file.
        stall_s: Seconds without a byte after which the disk counts as dead.
        read: `os.preadv`, or one that fails where a test wants it to.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, *, stall_s: float = _STALL_S, read: Read = os.preadv) -> None:
        self._file = _File(path, stall_s=stall_s, read=read)
        self._queue: SimpleQueue[_Request | None] = SimpleQueue()
        for _ in range(_THREADS):
            # never waited for: a thread does not come back from a dead disk
            threading.Thread(target=_work, args=(self._file, self._queue), daemon=True).start()
        weakref.finalize(self, _stop, self._queue)

    @property
    def nbytes(self) -> int:
        """Bytes read until now, those of whole pages around them included."""
        return self._file.nbytes

    @property
    def is_direct(self) -> bool:
        """Whether it reads past the page cache; a file system may refuse that."""
        return self._file.is_direct

    def ask(self, windows: Sequence[Window]) -> Reading:
        """Begin to read windows, after those that were asked for before."""
        parts = [part for window in windows for part in _parts(window)]
        reading = Reading(self._file, len(parts))
        for part in parts:
            self._queue.put(_Request(reading, part))
        return reading


def _parts(window: Window) -> list[Window]:
    """A window in as many parts as it takes requests."""
    return [
        Window(
            window.memory[low : low + _REQUEST],
            window.start + low,
            min(window.needed - low, _REQUEST),
        )
        for low in range(0, window.needed, _REQUEST)
    ]


def _work(file: _File, queue: "SimpleQueue[_Request | None]") -> None:
    while (request := queue.get()) is not None:
        error = None
        try:
            if not request.reading.is_cancelled:
                file.fill(request.window)
        except OSError as failure:
            error = failure
        request.reading.end_one(error)


def _stop(queue: "SimpleQueue[_Request | None]") -> None:
    for _ in range(_THREADS):
        queue.put(None)


def _opened(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether it reads past the page cache."""
    usual = os.O_RDONLY | os.O_CLOEXEC
    direct = getattr(os, "O_DIRECT", 0)  # macOS has none
    if direct:
        with optional():
            return os.open(path, usual | direct), True
    return os.open(path, usual), False


def _forget(handle: int, start: int, nbytes: int) -> None:
    """Drop what was read from the page cache, where that is possible."""
    if hasattr(os, "posix_fadvise"):
        with optional(errno.EBADF):
            os.posix_fadvise(handle, start, nbytes, os.POSIX_FADV_DONTNEED)


def _close(handles: list[int]) -> None:
    for handle in handles:
        os.close(handle)
