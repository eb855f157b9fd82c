"""Hash the pieces of a release on disk, as fast as disk or processor allow."""

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
from typing import Final, Protocol, Self

from grokctl.checkpoint.hashtree import Hasher
from grokctl.checkpoint.torrent import Metainfo
from grokctl.checkpoint.torrent_files import TorrentFile
from grokctl.os_errors import NotAFileError, is_absence, located, reason_of

_BUFFER: Final = 2**20
"""Bytes that a thread reads at a time; measured: 64 KiB to 4 MiB hash at the same rate."""
_BUFFERS: Final = 32 * 2**20
"""Bytes for the buffers of all threads together."""
AHEAD: Final = 16 * 2**20
"""Bytes requested from the disk before they are read: few large requests, in order, save a hard
disk most of its seeks, whatever the other threads do."""
_ADVICE: Final = 2**18
"""Bytes per request: the kernel truncates longer ones to its readahead."""
_MOST_OPEN: Final = 8
"""Files that one thread keeps open: a piece may cover many small ones."""
_MISSING: Final = frozenset({errno.ENOENT, errno.ENOTDIR})


@dataclass(frozen=True, slots=True)
class Checked:
    """The result of checking one piece."""

    piece: int
    is_good: bool
    nbytes: int
    """Size of the piece, even if parts of it are missing."""
    unreadable: tuple[tuple[str, str], ...] = ()
    """Files that could not be read: path in the release, and the reason."""


class PieceGate(Protocol):
    """Holds pieces back until something else has come as far."""

    def wait_for(self, piece: int) -> bool:
        """Wait until a piece may be read; False if it never may. Called by several threads."""
        ...

    def is_early(self, piece: int) -> bool:
        """Whether a piece that is not good may be so in a moment; waits for that moment."""
        ...


def check_pieces(
    root: Path,
    metainfo: Metainfo,
    places: Mapping[int, str],
    pieces: Sequence[int],
    *,
    jobs: int,
    gate: PieceGate | None = None,
) -> Generator[Checked, None, None]:
    """Compare pieces on disk with the hashes of a torrent.

    Files that are missing or too short make bad pieces, not errors. Files that `places` leaves
    out count as zeros, as pads do. Holes are not read. The page cache stays as it was: pages that
    a check reads are dropped again, and all others stay.

    Args:
        root: The folder that `places` are relative to.
        metainfo: Holds the hashes.
        places: File index -> `/`-separated path.
        pieces: Checked in ascending order, which is the order of the files.
        jobs: Threads.
        gate: Holds pieces back until they may be read; by default none is.

    Yields:
        Every piece once, on the caller's thread, in order of completion. Closing the iterator
        ends the threads after one read, in milliseconds.

    Raises:
        OSError: The machine refuses to read a file.
    """
    jobs = max(1, min(jobs, len(pieces)))
    work = _Work(root, metainfo, places, sorted(set(pieces)), jobs=jobs, gate=gate)
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
    """The queue of pieces and the state that the threads share."""

    def __init__(
        self,
        root: Path,
        metainfo: Metainfo,
        places: Mapping[int, str],
        pieces: Sequence[int],
        *,
        jobs: int,
        gate: PieceGate | None,
    ) -> None:
        self.gate = gate
        self.root = root
        self.metainfo = metainfo
        self.places = places
        self.buffer = min(_BUFFER, _BUFFERS // jobs)
        self.is_cancelled = Event()
        self._pieces = iter(pieces)
        self._lock = Lock()
        self._zeros: bytes | None = None

    def run(self, results: "SimpleQueue[Checked | Future[None]]") -> None:
        """Check pieces until none is left: the whole life of a thread."""
        with _PieceReader(self) as reader:
            while not self.is_cancelled.is_set():
                with self._lock:
                    piece = next(self._pieces, None)
                if piece is None:
                    return
                if self.gate is not None and not self.gate.wait_for(piece):
                    return
                checked = reader.check(piece)
                while not checked.is_good and self.gate is not None and self.gate.is_early(piece):
                    checked = reader.check(piece)
                if not self.is_cancelled.is_set():  # else it was not read to the end
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


class _PieceReader:
    """The buffer and the open files of one thread."""

    def __init__(self, work: _Work) -> None:
        self._work = work
        self._feeder = Feeder(work.buffer, work.is_cancelled)
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
        """Compare one piece with its hash."""
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
                if not is_absence(error):
                    raise located(error, self._work.root / name) from error
                refused.append((name, reason_of(error)))
                is_whole = False
        return Checked(piece, is_whole and hasher.digest() == promised, size, tuple(refused))

    def _feed(self, hasher: Hasher, name: str, offset: int, length: int) -> bool:
        opened = self._open(name)
        return opened is not None and self._feeder.feed(
            hasher, opened.handle, offset, offset + length
        )

    def _is_hole(self, file: TorrentFile, offset: int, length: int) -> bool:
        """Whether a range is a hole in a sparse file: zeros that the disk does not store."""
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
                # ENXIO: no data up to the end; anything else: the file system does not know
                data = offset + length if error.errno == errno.ENXIO else offset
            return data >= offset + length <= os.fstat(opened.handle).st_size
        except OSError:
            return False

    def _open(self, name: str) -> _Opened | None:
        """Open a file, unless it is open already; None if it is missing."""
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        try:
            handle = open_regular(self._work.root / name)
        except OSError as error:
            if error.errno in _MISSING:
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
    """Open a file for a `Feeder`; follows links.

    Raises:
        OSError: It cannot be opened, or is no regular file; opening a pipe does not block.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise NotAFileError(path)
    _advise(handle, 0, 0, os.POSIX_FADV_RANDOM)
    return handle


class Feeder:
    """Feeds ranges of files to hashers through one buffer: one for each thread."""

    def __init__(self, nbytes: int, is_cancelled: Event) -> None:
        """Allocate the buffer.

        Args:
            nbytes: Bytes to read at a time.
            is_cancelled: Ends `feed` early when set.
        """
        self._buffer = memoryview(bytearray(nbytes))
        self._is_cancelled = is_cancelled

    def feed(self, hasher: Hasher, handle: int, offset: int, end: int) -> bool:
        """Feed a range of a file to a hasher, and leave the page cache as it was.

        Args:
            hasher: Receives the bytes in order.
            handle: From `open_regular`.
            offset: First byte.
            end: Behind the last byte.

        Returns:
            False if the file is shorter, or after a cancellation.

        Raises:
            OSError: The disk cannot read it.
        """
        if _is_cached(handle, offset, end):
            return self._read(hasher, handle, offset, end, advised=end)
        try:
            return self._read(hasher, handle, offset, end, advised=offset)
        finally:
            # the range before kept its last page for this one, which may begin in it
            start = offset // PAGESIZE * PAGESIZE
            _advise(handle, start, end - start, os.POSIX_FADV_DONTNEED)

    def _read(self, hasher: Hasher, handle: int, offset: int, end: int, *, advised: int) -> bool:
        while offset < end:
            if self._is_cancelled.is_set():
                return False
            while advised < min(end, offset + AHEAD):
                _advise(handle, advised, min(_ADVICE, end - advised), os.POSIX_FADV_WILLNEED)
                advised += _ADVICE
            count = os.preadv(handle, [self._buffer[: end - offset]], offset)
            if not count:
                return False
            hasher.update(self._buffer[:count])
            offset += count
        return True


def _is_cached(handle: int, offset: int, end: int) -> bool:
    """Whether a range is in the page cache before it is read.

    Judges by two pages: the first may remain from a range before this one. The kernel's own
    readahead is off, so that cached pages are there because another process read them.
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
        pass  # a file system in memory, or one that does not know
    return True


def _advise(handle: int, offset: int, length: int, advice: int) -> None:
    with suppress(OSError):  # advice is optional for the kernel too
        os.posix_fadvise(handle, offset, length, advice)


def _feed_zeros(hasher: Hasher, length: int) -> None:
    zeros = memoryview(bytes(min(length, _ADVICE)))
    for start in range(0, length, _ADVICE):
        hasher.update(zeros[: length - start])
