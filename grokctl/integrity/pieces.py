"""Hash the pieces of a release where they lie, as fast as the disk or the processor goes."""

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from mmap import PAGESIZE
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock
from types import TracebackType
from typing import Final, Self

from grokctl.checkpoint.hashtree import Hasher
from grokctl.checkpoint.torrent import Metainfo, TorrentFile
from grokctl.os_errors import reason_of

_BUFFER: Final = 2**20
"""Bytes that a thread reads at a time; measured: 64 KiB to 4 MiB hash at the same rate."""
_BUFFERS: Final = 32 * 2**20
"""Bytes that the buffers of all threads may take together."""
AHEAD: Final = 16 * 2**20
"""Bytes that the disk is asked for before they are read: few large requests, in order, spare a
disk that seeks most of its seeks, whatever the other threads do."""
_ASKED: Final = 2**18
"""Bytes asked for at a time: the kernel cuts off what is longer than its readahead."""
_MOST_OPEN: Final = 8
"""Files that one thread keeps open: a piece may cover many small ones."""
_NOT_THERE: Final = frozenset({errno.ENOENT, errno.ENOTDIR})


@dataclass(frozen=True, slots=True)
class Checked:
    """What a look at one piece found."""

    piece: int
    is_good: bool
    nbytes: int
    """Size of the piece, however much of it could be read."""
    unreadable: tuple[tuple[str, str], ...] = ()
    """Files that refused to be read: path in the release, and why."""


def check_pieces(
    root: Path,
    metainfo: Metainfo,
    places: Mapping[int, str],
    pieces: Sequence[int],
    *,
    jobs: int,
) -> Generator[Checked, None, None]:
    """Compare pieces on disk with what a torrent promises.

    Files that are missing or too short make bad pieces, not errors. Files that `places` leaves
    out count as zeros, as pads do. Holes are not read. The page cache is left as it was found:
    what a check brings in it takes out again, and what others put there stays.

    Args:
        root: The folder that `places` are relative to.
        metainfo: The promise.
        places: File index -> `/`-separated path.
        pieces: Which pieces; they are taken in ascending order, which is the order of the files.
        jobs: Threads.

    Yields:
        Every piece once, on the caller's thread, in the order in which they are done. Closing
        the iterator ends the threads after the milliseconds that one read takes.
    """
    jobs = max(1, min(jobs, len(pieces)))
    work = _Work(root, metainfo, places, sorted(set(pieces)), jobs=jobs)
    results: SimpleQueue[Checked | Future[None]] = SimpleQueue()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for _ in range(jobs):
                pool.submit(work.run, results).add_done_callback(results.put)
            running = jobs
            while running:
                result = results.get()
                if isinstance(result, Checked):
                    yield result
                else:
                    result.result()
                    running -= 1
        finally:
            work.is_cancelled.set()


class _Work:
    """What the threads share."""

    def __init__(
        self,
        root: Path,
        metainfo: Metainfo,
        places: Mapping[int, str],
        pieces: Sequence[int],
        *,
        jobs: int,
    ) -> None:
        self.root = root
        self.metainfo = metainfo
        self.places = places
        self.buffer = min(_BUFFER, _BUFFERS // jobs)
        self.is_cancelled = Event()
        self._pieces = iter(pieces)
        self._lock = Lock()
        self._zeros: bytes | None = None

    def run(self, results: "SimpleQueue[Checked | Future[None]]") -> None:
        """Check pieces until none is left; a thread's whole job."""
        with _Reader(self) as reader:
            while not self.is_cancelled.is_set():
                with self._lock:
                    piece = next(self._pieces, None)
                if piece is None:
                    return
                checked = reader.check(piece)
                if not self.is_cancelled.is_set():  # or else it was not read to its end
                    results.put(checked)

    def zeros(self) -> bytes:
        """The digest of a whole piece of zeros."""
        if self._zeros is None:
            hasher = self.metainfo.hasher()
            _feed_zeros(hasher, self.metainfo.piece_length)
            self._zeros = hasher.digest()
        return self._zeros


@dataclass(frozen=True, slots=True)
class _Opened:
    """An open file."""

    handle: int
    is_sparse: bool
    """Whether it may have holes."""


class _Reader:
    """One thread's buffer and open files."""

    def __init__(self, work: _Work) -> None:
        self._work = work
        self._buffer = memoryview(bytearray(work.buffer))
        self._files: OrderedDict[str, _Opened] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            os.close(file.handle)

    def check(self, piece: int) -> Checked:
        """Compare one piece with its promise."""
        metainfo = self._work.metainfo
        size, spans = metainfo.piece_size(piece), metainfo.spans(piece)
        promised = metainfo.piece_hash(piece)
        if size == metainfo.piece_length and all(self._is_hole(*span) for span in spans):
            return Checked(piece, self._work.zeros() == promised, size)
        hasher = metainfo.hasher()
        is_whole, refused = True, []
        for file, offset, length in spans:
            name = self._work.places.get(file.index)
            if name is None:
                _feed_zeros(hasher, length)
                continue
            try:
                is_whole &= self._feed(hasher, name, offset, length)
            except OSError as error:
                refused.append((name, reason_of(error)))
                is_whole = False
        return Checked(piece, is_whole and hasher.digest() == promised, size, tuple(refused))

    def _feed(self, hasher: Hasher, name: str, offset: int, length: int) -> bool:
        opened = self._open(name)
        return opened is not None and feed(
            hasher, opened.handle, offset, offset + length, self._buffer, self._work.is_cancelled
        )

    def _is_hole(self, file: TorrentFile, offset: int, length: int) -> bool:
        """Whether a range holds only zeros that no disk stores."""
        name = self._work.places.get(file.index)
        if name is None:
            return True
        try:
            opened = self._open(name)
            if opened is None or not opened.is_sparse:
                return False
            try:
                data = os.lseek(opened.handle, offset, os.SEEK_DATA)
            except OSError as error:
                # ENXIO: no data from there on; anything else: a file system that cannot tell
                data = offset + length if error.errno == errno.ENXIO else offset
            return data >= offset + length <= os.fstat(opened.handle).st_size
        except OSError:
            return False

    def _open(self, name: str) -> _Opened | None:
        """Open a file, or find it among the open ones; None if there is none."""
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        try:
            handle = open_regular(self._work.root / name)
        except OSError as error:
            if error.errno in _NOT_THERE:
                return None
            raise
        status = os.fstat(handle)
        opened = _Opened(handle, is_sparse=status.st_blocks * 512 < status.st_size)
        self._files[name] = opened
        if len(self._files) > _MOST_OPEN:
            _, oldest = self._files.popitem(last=False)
            os.close(oldest.handle)
        return opened


def open_regular(path: Path) -> int:
    """Open a file to read it with `feed`; a link to one is as good.

    Raises:
        OSError: It cannot be opened, or is no regular file; a pipe makes nobody wait.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "is no regular file")
    _advise(handle, 0, 0, os.POSIX_FADV_RANDOM)
    return handle


def feed(
    hasher: Hasher, handle: int, offset: int, end: int, buffer: memoryview, is_cancelled: Event
) -> bool:
    """Feed a range of a file to a hasher, and leave the page cache as it was found.

    Args:
        hasher: Receives the bytes in order.
        handle: From `open_regular`.
        offset: Where the range begins.
        end: Where it ends.
        buffer: What is read into.
        is_cancelled: Ends it early.

    Returns:
        False if the file has less, or nobody waits any more.

    Raises:
        OSError: The disk refuses.
    """
    if _is_cached(handle, offset, end):
        return _read(hasher, handle, offset, end, buffer, is_cancelled, asked=end)
    try:
        return _read(hasher, handle, offset, end, buffer, is_cancelled, asked=offset)
    finally:
        # the page that the range begins in was kept for it by the range before
        start = offset // PAGESIZE * PAGESIZE
        _advise(handle, start, end - start, os.POSIX_FADV_DONTNEED)


def _read(
    hasher: Hasher,
    handle: int,
    offset: int,
    end: int,
    buffer: memoryview,
    is_cancelled: Event,
    *,
    asked: int,
) -> bool:
    while offset < end:
        if is_cancelled.is_set():
            return False
        while asked < min(end, offset + AHEAD):
            _advise(handle, asked, min(_ASKED, end - asked), os.POSIX_FADV_WILLNEED)
            asked += _ASKED
        count = os.preadv(handle, [buffer[: end - offset]], offset)
        if not count:
            return False
        hasher.update(buffer[:count])
        offset += count
    return True


def _is_cached(handle: int, offset: int, end: int) -> bool:
    """Whether a range was in the page cache before it is read.

    Goes by two pages: others may have left the first when they took out the rest. Readahead by
    the kernel is off, so that nothing is there but what somebody else wanted.
    """
    first = -(-offset // PAGESIZE) * PAGESIZE
    byte = bytearray(1)
    try:
        for place in (first, (offset + end) // 2):
            if place < end:
                os.preadv(handle, [byte], place, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system in memory, or one that cannot tell
    return True


def _advise(handle: int, offset: int, length: int, advice: int) -> None:
    with suppress(OSError):  # advice is optional, for the kernel as well
        os.posix_fadvise(handle, offset, length, advice)


def _feed_zeros(hasher: Hasher, length: int) -> None:
    zeros = memoryview(bytes(min(length, _ASKED)))
    for start in range(0, length, _ASKED):
        hasher.update(zeros[: length - start])
