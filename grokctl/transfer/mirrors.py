"""Pieces of a release from HTTP mirrors: ranges by several threads, each piece proven by its hash.

No mirror is trusted. A mirror that sends wrong bytes is dropped at once; after any other failure
it is paused; a file that it does not have is not requested from it again.
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
from grokctl.transfer.mirror_health import MirrorHealth, MirrorState
from grokctl.transfer.mirror_reader import Limiter, MirrorReader, WrongBytesError
from grokctl.transfer.sources import Mirror
from grokctl.transfer.web import AbsentError, BusyError, RefusedError, Web, WebError

_MEMORY: Final = 64 * 2**20
"""Bytes for pieces under way, and as many again for pieces that wait to be written."""
_MOST_WORKERS: Final = 8
_LEASE: Final = 16 * 2**20
"""Bytes per request where pieces are small: each request costs a round trip or two."""
_PARTS: Final = 4
"""Requests per worker that the missing pieces are divided into, at least."""
_PATIENCE_S: Final = 30.0
_SLOWEST: Final = 4096
"""Bytes per second, over `_PATIENCE_S`, below which the pieces of a request go elsewhere."""
_JOIN_S: Final = 1.0


@dataclass(slots=True, eq=False)
class _ActiveMirror:
    """A mirror, its health, and the queue of its workers."""

    mirror: Mirror
    health: MirrorHealth
    idle: int
    """Workers without a lease."""
    leases: "SimpleQueue[_Lease | None]" = field(default_factory=SimpleQueue)

    @property
    def is_idle(self) -> bool:
        """Whether it can take another lease now."""
        return self.idle > 0 and self.health.is_available


@dataclass(slots=True, eq=False)
class _Lease:
    """Consecutive pieces that were requested from one mirror.

    The worker writes `nbytes`, `next` and `is_limited`, the caller's thread the rest.
    """

    pieces: range
    began: float
    next: int
    """The first piece that has not arrived."""
    nbytes: int = 0
    is_limited: bool = False
    """Whether the worker waits for our own rate limit."""
    checked_at: float = 0.0
    """When it last made progress, with `checked_nbytes`."""
    checked_nbytes: int = 0
    is_revoked: bool = False

    @property
    def missing(self) -> range:
        """Pieces that have not arrived."""
        return range(self.next, self.pieces.stop)


@dataclass(frozen=True, slots=True)
class _Arrived:
    piece: int
    data: bytes


@dataclass(frozen=True, slots=True)
class _Ended:
    """A worker is idle again."""

    mirror: _ActiveMirror
    lease: _Lease
    error: WebError | None
    file: int | None
    """The file that was being read when the error occurred."""


class Mirrors:
    """All mirrors of one download, as a context manager.

    Everything except `_work` and its callees runs on the caller's thread.
    """

    def __init__(
        self,
        mirrors: Sequence[Mirror],
        web: Web,
        metainfo: Metainfo,
        places: Mapping[int, str],
        *,
        most_workers: int = _MOST_WORKERS,
    ) -> None:
        """Create the threads; they wait for `offer`.

        Args:
            mirrors: At least one.
            web: Shared by all threads.
            metainfo: Holds the hashes of the pieces.
            places: File index -> path in the release, and below a mirror's address.
            most_workers: Connections to all mirrors together.
        """
        self.leased: set[int] = set()
        """Pieces that were requested from a mirror and have neither arrived nor failed."""
        self._returned: set[int] = set()
        self._running: dict[_Lease, _ActiveMirror] = {}
        self._metainfo = metainfo
        self._places = places
        self._web = web
        self._stop = threading.Event()
        self._crash: Exception | None = None
        self._limiter = Limiter(self._stop)
        room = max(2, _MEMORY // metainfo.piece_length)
        self._results: Queue[_Arrived | _Ended] = Queue(maxsize=room + most_workers)
        self._lease_size = max(1, _LEASE // metainfo.piece_length)
        self.room = room
        """Pieces that may wait to be written."""
        workers = max(1, min(most_workers, room) // len(mirrors))
        self._mirrors = [
            _ActiveMirror(mirror, MirrorHealth(mirror.name), workers) for mirror in mirrors
        ]
        self._threads = [
            threading.Thread(target=self._work, args=(mirror,), daemon=True)
            for mirror in self._mirrors
            for _ in range(workers)
        ]
        self.most_running = len(self._threads)
        """Requests at a time; may be changed while they run."""

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
            for mirror in self._mirrors:
                mirror.leases.put(None)
        self._web.close()
        deadline = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def is_idle(self) -> bool:
        """Whether some mirror can take another lease now."""
        return any(mirror.is_idle for mirror in self._mirrors)

    @property
    def running(self) -> int:
        """Requests that are answered now."""
        return sum(not lease.is_revoked for lease in self._running)

    @property
    def nbytes(self) -> int:
        """Bytes received from all mirrors."""
        return sum(mirror.health.nbytes for mirror in self._mirrors)

    @property
    def asked_s(self) -> float:
        """Seconds of pauses that a mirror asked for, in all."""
        return max(mirror.health.asked_s for mirror in self._mirrors)

    @property
    def asked_until(self) -> float:
        """When the last of those pauses ends; in the past, if there is none."""
        return max(mirror.health.asked_until for mirror in self._mirrors)

    def lacks(self, piece: int) -> bool:
        """Whether no mirror can bring a piece: those left do not have it."""
        return all(
            mirror.health.is_dropped or piece in mirror.health.missing for mirror in self._mirrors
        )

    def states(self) -> list[MirrorState]:
        """The health of every mirror."""
        return [mirror.health.state() for mirror in self._mirrors]

    def take_notes(self) -> list[str]:
        """News for the user since the last call, a line each."""
        return [note for mirror in self._mirrors for note in mirror.health.take_notes()]

    def take_returned(self) -> set[int]:
        """Pieces whose requests failed since the last call."""
        returned, self._returned = self._returned, set()
        return returned

    def limit(self, rate: float | None) -> None:
        """Receive at most this many bytes per second from all mirrors together."""
        self._limiter.rate = rate

    def offer(self, left: Sequence[int], is_free: Callable[[int], bool]) -> set[int]:
        """Request some of the remaining pieces from idle mirrors.

        Args:
            left: Ascending.
            is_free: Whether a piece is neither on disk nor requested elsewhere. It is called for
                few pieces: `left` may be long, and this runs many times a second.

        Returns:
            The pieces that were requested.
        """

        def is_open(piece: int) -> bool:
            return piece not in self.leased and is_free(piece)

        requested: set[int] = set()
        # a fair part, so that neither the other mirrors nor the end wait for one of them
        parts = _PARTS * len(self._threads)
        most = max(1, min(self._lease_size, (len(left) - len(self.leased)) // parts))
        for mirror in self._mirrors:
            while mirror.is_idle and self.running < self.most_running:
                lease = _next_lease(mirror, left, is_open, most)
                if lease is None:
                    if any(map(is_open, left)):
                        mirror.health.drop_if_useless()
                    break
                requested.update(lease.pieces)
                self.leased.update(lease.pieces)
                mirror.idle -= 1
                self._running[lease] = mirror
                mirror.leases.put(lease)
        return requested

    def take(self, most: int) -> list[tuple[int, bytes]]:
        """At most this many pieces that have arrived, proven by their hashes."""
        if self._crash is not None:
            raise self._crash
        self._revoke_stuck()
        arrived: list[tuple[int, bytes]] = []
        while len(arrived) < most:
            try:
                result = self._results.get_nowait()
            except Empty:
                break
            if isinstance(result, _Arrived):
                arrived.append((result.piece, result.data))
                self.leased.discard(result.piece)
            else:
                self._conclude(result)
        return arrived

    def _conclude(self, end: _Ended) -> None:
        """Update the mirror's health after a request."""
        health, lease = end.mirror.health, end.lease
        end.mirror.idle += 1
        del self._running[lease]
        if lease.next > lease.pieces.start:
            health.succeed()
        if not lease.is_revoked:
            self._take_back(lease)
        if end.error is None or health.is_dropped:
            return
        where = "" if end.file is None else f" ({self._places.get(end.file, 'a pad')})"
        trouble = f"{end.error}{where}"
        match end.error:
            case AbsentError():
                assert end.file is not None
                pieces = self._metainfo.pieces_of(self._metainfo.files[end.file])
                health.miss(end.file, pieces, trouble)
            case WrongBytesError() | RefusedError():
                health.drop(trouble)
            case _:
                wait_s = end.error.wait_s if isinstance(end.error, BusyError) else 0.0
                health.pause(trouble, began=lease.began, wait_s=wait_s)

    def _take_back(self, lease: _Lease) -> None:
        self.leased.difference_update(lease.missing)
        self._returned.update(lease.missing)

    def _revoke_stuck(self) -> None:
        """Take back pieces from mirrors that send almost nothing.

        The worker stays with its request until that ends by itself; nothing waits for it.
        """
        clock = time.monotonic()
        for lease, mirror in self._running.items():
            has_moved = lease.nbytes - lease.checked_nbytes >= _SLOWEST * _PATIENCE_S
            if lease.is_limited or has_moved:
                lease.checked_at, lease.checked_nbytes = clock, lease.nbytes
            elif clock - max(lease.checked_at, lease.began) > _PATIENCE_S and not lease.is_revoked:
                lease.is_revoked = True
                self._take_back(lease)
                mirror.health.pause("is too slow", began=lease.began)

    def _work(self, mirror: _ActiveMirror) -> None:
        """Serve the leases of one mirror: the whole life of a thread."""
        while (lease := mirror.leases.get()) is not None and not self._stop.is_set():
            url = mirror.mirror.url
            reader = MirrorReader(self._web, url, self._metainfo, self._places, lease.pieces)
            failure = None
            try:
                for piece, data in reader.read(partial(self._receive, mirror.health, lease)):
                    self._hand_over(_Arrived(piece, data))
                    lease.next = piece + 1
                    if self._stop.is_set():
                        return
            except WebError as error:
                failure = error
            except Exception as error:  # noqa: BLE001 (`take` raises it on the caller's thread)
                self._crash = error
                return
            self._hand_over(_Ended(mirror, lease, failure, reader.file))

    def _receive(self, health: MirrorHealth, lease: _Lease, nbytes: int) -> None:
        """Count bytes that arrived, and wait for the rate limit."""
        health.receive(nbytes)
        lease.nbytes += nbytes
        lease.is_limited = True
        self._limiter.wait(nbytes)
        lease.is_limited = False

    def _hand_over(self, result: _Arrived | _Ended) -> None:
        """Wait for room in the queue, unless the download is over."""
        while not self._stop.is_set():
            try:
                self._results.put(result, timeout=0.2)
            except Full:
                continue
            return


def _next_lease(
    mirror: _ActiveMirror, left: Sequence[int], is_open: Callable[[int], bool], most: int
) -> _Lease | None:
    """The first consecutive open pieces that a mirror has."""
    run = range(0)
    for piece in left:
        fits = piece not in mirror.health.missing and is_open(piece)
        if not run and fits:
            run = range(piece, piece + 1)
        elif run and fits and piece == run.stop and len(run) < most:
            run = range(run.start, piece + 1)
        elif run:
            break
    return _Lease(run, time.monotonic(), run.start) if run else None
