"""Pieces of a release from HTTP mirrors: ranges by several threads, each piece proven by its hash.

A mirror is trusted with nothing. Who sends wrong bytes is dropped at once; who breaks off or falls
silent is left alone for a while; a file that a mirror does not have is not asked for again.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from queue import Empty, Full, Queue, SimpleQueue
from types import TracebackType
from typing import Final, Self
from urllib.parse import quote

from grokctl.checkpoint.torrent import Metainfo
from grokctl.paths import CKPT, CONFIG
from grokctl.sources import Mirror
from grokctl.web import AbsentError, RefusedError, Web, WebError

_MEMORY: Final = 64 * 2**20
"""Bytes that the pieces under way may take, and as many again for those that wait to be written."""
_MOST_WORKERS: Final = 8
_LEASE: Final = 16 * 2**20
"""Bytes that one request asks for, where pieces are small: each costs a round trip or two."""
_LONGEST_REST_S: Final = 60.0
_ENOUGH_ABSENT: Final = 8
"""Files that a mirror may lack before it is taken for one of something else."""
_PARTS: Final = 4
"""Requests for each worker that what is missing is thought to be cut into, at least."""
_PATIENCE_S: Final = 30.0
_SLOWEST: Final = 4096
"""Bytes per second that a request must bring over `_PATIENCE_S`, or it is given to others."""
_RATE_OVER_S: Final = 3.0
_JOIN_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorState:
    """How a mirror is doing."""

    name: str
    nbytes: int
    """Received so far, wasted bytes included."""
    rate: float
    """Bytes per second."""
    trouble: str = ""
    """What was wrong with it the last time that anything was."""
    is_dropped: bool = False
    """Whether it is not asked any more."""


@dataclass(slots=True, eq=False)
class _Source:
    """A mirror and what is known about it. Workers only add to `nbytes`."""

    mirror: Mirror
    jobs: "SimpleQueue[_Lease | None]" = field(default_factory=SimpleQueue)
    idle: int = 0
    absent: set[int] = field(default_factory=set)
    nbytes: int = 0
    good: int = 0
    strikes: int = 0
    struck_at: float = -1.0
    rests_until: float = 0.0
    trouble: str = ""
    is_dropped: bool = False
    history: deque[tuple[float, int]] = field(default_factory=deque)

    def rate(self) -> float:
        """Bytes per second over the last few seconds."""
        now = time.monotonic()
        self.history.append((now, self.nbytes))
        while now - self.history[0][0] > _RATE_OVER_S:
            self.history.popleft()
        then, nbytes = self.history[0]
        return (self.nbytes - nbytes) / (now - then) if now > then else 0.0


@dataclass(slots=True, eq=False)
class _Lease:
    """Pieces in a row that one mirror was asked for.

    The worker writes `nbytes`, `next` and `is_limited`, the caller's thread the rest.
    """

    pieces: range
    began: float
    next: int
    """The first piece that has not landed."""
    nbytes: int = 0
    is_limited: bool = False
    """Whether the worker waits because of our own rate limit."""
    seen_at: float = 0.0
    """When it was last seen to move, at `seen_nbytes`."""
    seen_nbytes: int = 0
    is_revoked: bool = False

    @property
    def missing(self) -> range:
        """What has not landed."""
        return range(self.next, self.pieces.stop)


@dataclass(frozen=True, slots=True)
class _Landed:
    piece: int
    data: bytes


@dataclass(frozen=True, slots=True)
class _Ended:
    """A worker is idle again."""

    source: _Source
    lease: _Lease
    fault: WebError | None
    file: int | None
    """The file that the fault was met in."""


class _WrongBytesError(WebError):
    """A piece does not hash to what the torrent promised."""


class Mirrors:
    """All mirrors of one download, as a context manager.

    Everything but `_work` runs on the caller's thread.
    """

    def __init__(
        self, mirrors: Sequence[Mirror], web: Web, metainfo: Metainfo, places: Mapping[int, str]
    ) -> None:
        """Start the threads; they wait for `offer`.

        Args:
            mirrors: At least one.
            web: Shared by all threads.
            metainfo: What the pieces must be.
            places: File index -> path in the release, and below a mirror's address.
        """
        self.leased: set[int] = set()
        """Pieces that a mirror was asked for and that have neither landed nor come back."""
        self._returned: set[int] = set()
        self._running: dict[_Lease, _Source] = {}
        self._metainfo = metainfo
        self._places = places
        self._web = web
        self._stop = threading.Event()
        self._crash: Exception | None = None
        self._limiter = _Limiter(self._stop)
        self._notes: list[str] = []
        room = max(2, _MEMORY // metainfo.piece_length)
        self._results: Queue[_Landed | _Ended] = Queue(maxsize=room + _MOST_WORKERS)
        self._lease_size = max(1, _LEASE // metainfo.piece_length)
        self.room = room
        """Pieces that may wait to be written."""
        self._sources = [_Source(mirror) for mirror in mirrors]
        self._threads = [
            threading.Thread(target=self._work, args=(source,), daemon=True)
            for source in self._sources
            for _ in range(max(1, min(_MOST_WORKERS, room) // len(mirrors)))
        ]

    def __enter__(self) -> Self:
        for source in self._sources:
            source.idle = len(self._threads) // len(self._sources)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for _ in self._threads:
            for source in self._sources:
                source.jobs.put(None)
        self._web.close()
        deadline = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def is_idle(self) -> bool:
        """Whether some mirror that may be asked has nothing to do."""
        return any(self._may_ask(source) for source in self._sources)

    @property
    def nbytes(self) -> int:
        """Bytes received from all mirrors."""
        return sum(source.nbytes for source in self._sources)

    def states(self) -> list[MirrorState]:
        """How every mirror is doing."""
        return [
            MirrorState(
                name=source.mirror.name,
                nbytes=source.nbytes,
                rate=source.rate(),
                trouble=source.trouble,
                is_dropped=source.is_dropped,
            )
            for source in self._sources
        ]

    def take_notes(self) -> list[str]:
        """What the user should know and was not told yet, a line each."""
        notes, self._notes = self._notes, []
        return notes

    def take_returned(self) -> set[int]:
        """Pieces that were asked for in vain, since the last call."""
        returned, self._returned = self._returned, set()
        return returned

    def limit(self, rate: float | None) -> None:
        """Receive no more than so many bytes per second from all mirrors together."""
        self._limiter.rate = rate

    def offer(self, missing: Sequence[int]) -> set[int]:
        """Ask idle mirrors for some of the pieces that are missing.

        Args:
            missing: Ascending; none of them leased.

        Returns:
            Those that are now asked for.
        """
        free = set(missing)
        given: set[int] = set()
        # a fair part, so that neither the others nor the end have to wait for one
        most = max(1, min(self._lease_size, len(missing) // (_PARTS * len(self._threads))))
        for source in self._sources:
            while free and self._may_ask(source):
                lease = self._choose(source, missing, free, most)
                if lease is None:
                    self._doubt(source)
                    break
                free.difference_update(lease.pieces)
                given.update(lease.pieces)
                source.idle -= 1
                self._running[lease] = source
                source.jobs.put(lease)
        self.leased |= given
        return given

    def take(self, most: int) -> list[tuple[int, bytes]]:
        """Pieces that have arrived and hash to what they should, at most so many."""
        if self._crash is not None:
            raise self._crash
        self._revoke_stuck()
        landed: list[tuple[int, bytes]] = []
        while len(landed) < most:
            try:
                result = self._results.get_nowait()
            except Empty:
                break
            if isinstance(result, _Landed):
                landed.append((result.piece, result.data))
                self.leased.discard(result.piece)
            else:
                self._conclude(result)
        return landed

    def _may_ask(self, source: _Source) -> bool:
        return source.idle > 0 and not source.is_dropped and time.monotonic() >= source.rests_until

    def _choose(
        self, source: _Source, missing: Sequence[int], free: set[int], most: int
    ) -> _Lease | None:
        """The first pieces in a row that this mirror can have."""
        run = range(0)
        for piece in missing:
            fits = piece in free and not self._lacks(source, piece)
            if not run and fits:
                run = range(piece, piece + 1)
            elif run and fits and piece == run.stop and len(run) < most:
                run = range(run.start, piece + 1)
            elif run:
                break
        return _Lease(run, time.monotonic(), run.start) if run else None

    def _lacks(self, source: _Source, piece: int) -> bool:
        return bool(source.absent) and any(
            file.index in source.absent for file, _, _ in self._metainfo.spans(piece)
        )

    def _conclude(self, end: _Ended) -> None:
        """Learn from how a request ended."""
        source, lease = end.source, end.lease
        source.idle += 1
        del self._running[lease]
        if lease.next > lease.pieces.start:
            source.strikes, source.good = 0, source.good + 1
        if not lease.is_revoked:
            self._take_back(lease)
        if end.fault is None or source.is_dropped:
            return
        where = "" if end.file is None else f" ({self._places.get(end.file, 'a pad')})"
        source.trouble = f"{end.fault}{where}"
        match end.fault:
            case AbsentError():
                assert end.file is not None
                source.absent.add(end.file)
                if len(source.absent) >= _ENOUGH_ABSENT:
                    self._doubt(source)
                elif len(source.absent) == 1:
                    self._note(source, f"lacks a file: {source.trouble}")
            case _WrongBytesError() | RefusedError():
                self._drop(source, source.trouble)
            case _ if lease.began > source.struck_at:
                self._rest(source)

    def _take_back(self, lease: _Lease) -> None:
        self.leased.difference_update(lease.missing)
        self._returned.update(lease.missing)

    def _revoke_stuck(self) -> None:
        """Take back what was asked of a mirror that sends almost nothing, whatever it is up to.

        Its worker stays with it until it ends by itself; nobody else has to wait for that.
        """
        clock = time.monotonic()
        for lease, source in self._running.items():
            moved = lease.nbytes - lease.seen_nbytes >= _SLOWEST * _PATIENCE_S
            if lease.is_limited or moved:
                lease.seen_at, lease.seen_nbytes = clock, lease.nbytes
            elif clock - max(lease.seen_at, lease.began) > _PATIENCE_S and not lease.is_revoked:
                lease.is_revoked = True
                self._take_back(lease)
                source.trouble = "sends almost nothing"
                if lease.began > source.struck_at:
                    self._rest(source)

    def _doubt(self, source: _Source) -> None:
        """Drop a mirror that had nothing of what it was asked for."""
        if source.absent and not source.good:
            self._drop(source, f"does not hold this release: {source.trouble}")

    def _drop(self, source: _Source, reason: str) -> None:
        source.is_dropped, source.trouble = True, reason
        self._note(source, f"{reason}, so it is not asked again")

    def _rest(self, source: _Source) -> None:
        """Leave a mirror alone, longer each time."""
        source.strikes += 1
        source.struck_at = time.monotonic()
        pause = min(_LONGEST_REST_S, 0.25 * 2**source.strikes)
        source.rests_until = source.struck_at + pause
        if source.strikes == 1:
            self._note(source, f"{source.trouble}; it is asked again in a moment")

    def _note(self, source: _Source, message: str) -> None:
        self._notes.append(f"mirror {source.mirror.name}: {message}")

    def _work(self, source: _Source) -> None:
        """Fetch what one mirror is asked for; a thread's whole life."""
        while (lease := source.jobs.get()) is not None and not self._stop.is_set():
            reader = _Reader(self._web, source, self._metainfo, self._places, lease)
            fault = None
            try:
                for piece, data in reader.pieces(self._limiter.wait):
                    self._hand_over(_Landed(piece, data))
                    lease.next = piece + 1
                    if self._stop.is_set():
                        return
            except WebError as error:
                fault = error
            except Exception as error:  # noqa: BLE001 (`take` raises it on the caller's thread)
                self._crash = error
                return
            self._hand_over(_Ended(source, lease, fault, reader.file))

    def _hand_over(self, result: _Landed | _Ended) -> None:
        """Wait for room in the queue, unless everything ends."""
        while not self._stop.is_set():
            try:
                self._results.put(result, timeout=0.2)
            except Full:
                continue
            return


class _Reader:
    """The bytes of some pieces in a row, in as few requests as there are files."""

    def __init__(
        self,
        web: Web,
        source: _Source,
        metainfo: Metainfo,
        places: Mapping[int, str],
        lease: _Lease,
    ) -> None:
        self.file: int | None = None
        """Index of the file that is being read."""
        self._web = web
        self._source = source
        self._metainfo = metainfo
        self._places = places
        self._lease = lease

    def pieces(self, wait: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
        """Each piece with its bytes, as soon as its hash is right."""
        with closing(self._chunks()) as stream:
            rest = memoryview(b"")
            for piece in self._lease.pieces:
                parts, left, hasher = [], self._metainfo.piece_size(piece), self._metainfo.hasher()
                while left:
                    if not rest:
                        rest = next(stream)
                        self._lease.is_limited = True
                        wait(len(rest))
                        self._lease.is_limited = False
                    part, rest = rest[:left], rest[left:]
                    hasher.update(part)
                    parts.append(part)
                    left -= len(part)
                if hasher.digest() != self._metainfo.piece_hash(piece):
                    raise self._mismatch(piece)
                yield piece, b"".join(parts)

    def _chunks(self) -> Generator[memoryview]:
        for index, start, length in self._ranges():
            self.file = index
            if index not in self._places:
                yield memoryview(bytes(length))
                continue
            url = self._source.mirror.url + quote(self._places[index])
            total = self._metainfo.files[index].length
            with self._web.open_range(url, start, length, total=total) as chunks:
                for chunk in chunks:
                    self._source.nbytes += len(chunk)
                    self._lease.nbytes += len(chunk)
                    yield memoryview(chunk)

    def _ranges(self) -> list[tuple[int, int, int]]:
        """File index, offset and length of what the pieces cover, each file once."""
        found: list[tuple[int, int, int]] = []
        for piece in self._lease.pieces:
            for file, offset, length in self._metainfo.spans(piece):
                if found and found[-1][0] == file.index:
                    found[-1] = (file.index, found[-1][1], found[-1][2] + length)
                else:
                    found.append((file.index, offset, length))
        return found

    def _mismatch(self, piece: int) -> WebError:
        """Who is to blame: the mirror, unless it may hold another edition of a small file."""
        for file, _, _ in self._metainfo.spans(piece):
            place = self._places.get(file.index, CKPT)
            if not place.startswith(CKPT) and place != CONFIG:
                self.file = file.index
                return AbsentError("holds another edition")
        return _WrongBytesError("sent wrong bytes")


class _Limiter:
    """Makes threads wait so that together they stay below a rate."""

    def __init__(self, stop: threading.Event) -> None:
        self.rate: float | None = None
        self._stop = stop
        self._free_at = 0.0
        self._lock = threading.Lock()

    def wait(self, nbytes: int) -> None:
        """Wait until so many bytes may have been received.

        Raises:
            WebError: Everything ends.
        """
        rate = self.rate
        if rate is not None:
            with self._lock:
                now = time.monotonic()
                self._free_at = max(self._free_at, now) + nbytes / rate
            self._stop.wait(self._free_at - now)
        if self._stop.is_set():
            raise WebError("was interrupted")
