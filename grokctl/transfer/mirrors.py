"""Pieces of a release from HTTP mirrors: ranges by several threads, each piece proven by its hash.

A mirror is trusted with nothing. Who sends wrong bytes is dropped at once; who breaks off or falls
silent is left alone for a while; a file that a mirror does not have is not asked for again.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, Full, Queue, SimpleQueue
from types import TracebackType
from typing import Final, Self

from grokctl.checkpoint.torrent import Metainfo
from grokctl.transfer.mirror_health import MirrorState, Standing
from grokctl.transfer.mirror_reader import Limiter, Reader, WrongBytesError
from grokctl.transfer.sources import Mirror
from grokctl.transfer.web import AbsentError, RefusedError, Web, WebError

_MEMORY: Final = 64 * 2**20
"""Bytes that the pieces under way may take, and as many again for those that wait to be written."""
_MOST_WORKERS: Final = 8
_LEASE: Final = 16 * 2**20
"""Bytes that one request asks for, where pieces are small: each costs a round trip or two."""
_PARTS: Final = 4
"""Requests for each worker that what is missing is thought to be cut into, at least."""
_PATIENCE_S: Final = 30.0
_SLOWEST: Final = 4096
"""Bytes per second that a request must bring over `_PATIENCE_S`, or it is given to others."""
_JOIN_S: Final = 1.0


@dataclass(slots=True, eq=False)
class _Source:
    """A mirror, what is thought of it, and what its workers do."""

    mirror: Mirror
    standing: Standing
    idle: int
    """Workers that have nothing to do."""
    jobs: "SimpleQueue[_Lease | None]" = field(default_factory=SimpleQueue)

    @property
    def is_idle(self) -> bool:
        """Whether it may be asked for something now."""
        return self.idle > 0 and self.standing.may_be_asked


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


class Mirrors:
    """All mirrors of one download, as a context manager.

    Everything but `_work`, and what it calls, runs on the caller's thread.
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
        self._limiter = Limiter(self._stop)
        room = max(2, _MEMORY // metainfo.piece_length)
        self._results: Queue[_Landed | _Ended] = Queue(maxsize=room + _MOST_WORKERS)
        self._lease_size = max(1, _LEASE // metainfo.piece_length)
        self.room = room
        """Pieces that may wait to be written."""
        workers = max(1, min(_MOST_WORKERS, room) // len(mirrors))
        self._sources = [_Source(mirror, Standing(mirror.name), workers) for mirror in mirrors]
        self._threads = [
            threading.Thread(target=self._work, args=(source,), daemon=True)
            for source in self._sources
            for _ in range(workers)
        ]

    def __enter__(self) -> Self:
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
        return any(source.is_idle for source in self._sources)

    @property
    def nbytes(self) -> int:
        """Bytes received from all mirrors."""
        return sum(source.standing.nbytes for source in self._sources)

    def states(self) -> list[MirrorState]:
        """How every mirror is doing."""
        return [source.standing.state() for source in self._sources]

    def take_notes(self) -> list[str]:
        """What the user should know and was not told yet, a line each."""
        return [note for source in self._sources for note in source.standing.take_notes()]

    def take_returned(self) -> set[int]:
        """Pieces that were asked for in vain, since the last call."""
        returned, self._returned = self._returned, set()
        return returned

    def limit(self, rate: float | None) -> None:
        """Receive no more than so many bytes per second from all mirrors together."""
        self._limiter.rate = rate

    def offer(self, left: Sequence[int], is_free: Callable[[int], bool]) -> set[int]:
        """Ask idle mirrors for some of the pieces that are left.

        Args:
            left: Ascending.
            is_free: Whether nobody but mirrors has a piece or is busy with it. It is asked about
                few: `left` may be long, and this is called many times a second.

        Returns:
            Those that are now asked for.
        """

        def is_open(piece: int) -> bool:
            return piece not in self.leased and is_free(piece)

        given: set[int] = set()
        # a fair part, so that neither the others nor the end have to wait for one
        parts = _PARTS * len(self._threads)
        most = max(1, min(self._lease_size, (len(left) - len(self.leased)) // parts))
        for source in self._sources:
            while source.is_idle:
                lease = _choose(source, left, is_open, most)
                if lease is None:
                    if any(map(is_open, left)):
                        source.standing.doubt()
                    break
                given.update(lease.pieces)
                self.leased.update(lease.pieces)
                source.idle -= 1
                self._running[lease] = source
                source.jobs.put(lease)
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

    def _conclude(self, end: _Ended) -> None:
        """Learn from how a request ended."""
        source, lease = end.source, end.lease
        source.idle += 1
        del self._running[lease]
        if lease.next > lease.pieces.start:
            source.standing.succeed()
        if not lease.is_revoked:
            self._take_back(lease)
        if end.fault is None or source.standing.is_dropped:
            return
        where = "" if end.file is None else f" ({self._places.get(end.file, 'a pad')})"
        trouble = f"{end.fault}{where}"
        match end.fault:
            case AbsentError():
                assert end.file is not None
                pieces = self._metainfo.pieces_of(self._metainfo.files[end.file])
                source.standing.miss(end.file, pieces, trouble)
            case WrongBytesError() | RefusedError():
                source.standing.drop(trouble)
            case _:
                source.standing.rest(trouble, began=lease.began)

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
                source.standing.rest("sends almost nothing", began=lease.began)

    def _work(self, source: _Source) -> None:
        """Fetch what one mirror is asked for; a thread's whole life."""
        while (lease := source.jobs.get()) is not None and not self._stop.is_set():
            url = source.mirror.url
            reader = Reader(self._web, url, self._metainfo, self._places, lease.pieces)
            fault = None
            try:
                for piece, data in reader.read(partial(self._receive, source, lease)):
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

    def _receive(self, source: _Source, lease: _Lease, nbytes: int) -> None:
        """Count what has come, and wait for the rate limit."""
        source.standing.nbytes += nbytes
        lease.nbytes += nbytes
        lease.is_limited = True
        self._limiter.wait(nbytes)
        lease.is_limited = False

    def _hand_over(self, result: _Landed | _Ended) -> None:
        """Wait for room in the queue, unless everything ends."""
        while not self._stop.is_set():
            try:
                self._results.put(result, timeout=0.2)
            except Full:
                continue
            return


def _choose(
    source: _Source, left: Sequence[int], is_open: Callable[[int], bool], most: int
) -> _Lease | None:
    """The first pieces in a row that a mirror can have."""
    run = range(0)
    for piece in left:
        fits = piece not in source.standing.lacking and is_open(piece)
        if not run and fits:
            run = range(piece, piece + 1)
        elif run and fits and piece == run.stop and len(run) < most:
            run = range(run.start, piece + 1)
        elif run:
            break
    return _Lease(run, time.monotonic(), run.start) if run else None
