"""A download in progress: resume data, background syncs, progress and stalls."""

import math
import os
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from grokctl.errors import FetchError, GrokctlError, StalledError
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started
from grokctl.os_errors import refusal
from grokctl.system import optional
from grokctl.text import (
    format_bytes,
    format_clock,
    format_number,
    format_rate,
    printable,
    shown_host,
)
from grokctl.transfer.destination import (
    FileSelection,
    chosen_options,
    record_progress,
    save_resume_data,
)
from grokctl.transfer.mirror_health import MirrorState
from grokctl.transfer.mirrors import Mirrors
from grokctl.transfer.piece_scheduler import PieceScheduler
from grokctl.transfer.sources import MIRRORS, FetchRequest
from grokctl.transfer.swarm import Swarm
from grokctl.transfer.swarm_types import Snapshot

_TICK_S: Final = 0.25
_BUSY_TICK_S: Final = 0.05
"""With mirrors, whose idle workers wait for the next tick."""
_SCAN_EVERY_S: Final = 0.5
_SAVE_EVERY_S: Final = 30.0
_WATCH_EVERY_S: Final = 1.0
"""Between looks at the folders; files are looked at when progress is saved."""
_LISTEN_WITHIN_S: Final = 5.0
SAVE_WITHIN_S: Final = 3.0
"""Seconds that resume data may take at the end."""
SIGN_OF_LIFE: Final = 2**14
"""Bytes, a block of BitTorrent: less than this within `stall_timeout_s` counts as nothing."""
_SILENT_S: Final = 3.0
"""Seconds without a block after which the progress says what the download waits for."""
_SYNC_EVERY: Final = 2**28
"""Bytes received after which the files are synced in the background."""
_CELLS: Final = 48
"""Parts of the progress map."""


class Arrivals(Protocol):
    """Works on files while others arrive; what it raises ends the download."""

    def begin(self, selection: FileSelection) -> None:
        """Begin: the destination is prepared, and has the torrent."""
        ...

    def arrived(self, have: Sequence[bool]) -> None:
        """Learn which pieces are on the disk; called twice a second."""
        ...


class NoArrivals:
    """Nobody works on files before all have arrived."""

    def begin(self, selection: FileSelection) -> None:
        """See `Arrivals`."""

    def arrived(self, have: Sequence[bool]) -> None:
        """See `Arrivals`."""


@dataclass(slots=True, kw_only=True)
class Download:
    """A transfer that has begun."""

    arrivals: Arrivals = field(default_factory=NoArrivals)
    """Is told what is on the disk."""

    request: FetchRequest
    selection: FileSelection
    swarm: Swarm
    mirrors: Mirrors | None
    observe: Observer
    watch: Callable[..., None]
    """Of `PlacedFiles`: raises where others lead libtorrent elsewhere."""
    counts_rest: bool = False
    """Report the missing bytes alone as progress, as a repair does."""
    _base: int = 0
    """Bytes that do not count as progress."""
    _done: int = 0
    _arrived_at: float = 0.0
    """When the last block arrived."""
    _scanned_at: float = 0.0
    _map: tuple[float, ...] = ()
    _states: list[MirrorState] = field(default_factory=list)

    def run(self) -> Snapshot:
        """Wait until every wanted file is complete and on disk.

        Raises:
            StalledError: Nothing arrived for `stall_timeout_s`.
            DiskFullError: The disk is full.
            FetchError: A file could not be written for another reason, or was replaced.
        """
        while (now := self._poll()).is_checking:
            pass
        if now.done:
            self._save(self.swarm.resume_data(timeout_s=SAVE_WITHIN_S))
        scheduler = self._scheduler()
        writeback = _Writeback([self._path(index) for index in self.selection.wanted])
        self._done = now.done
        self._base = now.done if self.counts_rest else 0
        total, done = self.selection.nbytes - self._base, now.done - self._base
        self.observe(Started(stage=Stage.FETCH, total=total, done=done))
        self.arrivals.begin(self.selection)
        self.arrivals.arrived(self.swarm.have())
        self._arrived_at = saved_at = time.monotonic()
        watched_at = -math.inf
        arrived = self._arrived(now)
        while not now.has_wanted:
            if scheduler is not None:
                scheduler.step(now)
            now = self._poll()
            self._report(now)
            clock = time.monotonic()
            if self._arrived(now) >= arrived + SIGN_OF_LIFE:
                arrived, self._arrived_at = self._arrived(now), clock
            elif self._is_stalled(clock) and not now.has_wanted:
                raise stalled("payload", self.request, self.swarm, now, self._states)
            writeback.advance(self._arrived(now))
            if clock - watched_at > _WATCH_EVERY_S:
                watched_at = clock
                self.watch()
            if clock - saved_at > _SAVE_EVERY_S:
                saved_at = clock
                self.watch(files=True)
                self.swarm.request_resume_data()
            self._save(self.swarm.take_resume_data())
        self.swarm.flush()
        writeback.finish()
        if arrived:
            self._sync_files()
        self.observe(Finished(stage=Stage.FETCH))
        return now

    def seed(self) -> int:
        """Upload until the ratio is reached or the user interrupts, which is no error.

        Returns:
            Bytes sent in this session.
        """
        ratio = self.request.options.seed_ratio
        goal = None if ratio is None else int(ratio * self.selection.nbytes)
        now = self._poll()
        first = now.uploaded
        before = 0 if goal is None else first  # a ratio counts earlier sessions, too
        if goal is not None and before >= goal:
            sent = f"{format_bytes(before)} of {format_bytes(goal)} were uploaded before"
            self.observe(Noted(message=f"seed: the ratio {ratio:g} is reached: {sent}"))
            return 0
        try:
            self._note_address()
            self.observe(Started(stage=Stage.SEED, total=goal or 0, done=before))
            while goal is None or now.uploaded < goal:
                rate = f"up {format_rate(now.upload_rate)}"
                detail = f"{rate} · {format_number(now.peers, 'peer')}"
                done = before + now.uploaded - first
                self.observe(Advanced(stage=Stage.SEED, done=done, detail=detail))
                now = self._poll()
        except KeyboardInterrupt:
            self.observe(Noted(message="seeding stopped; the download is complete"))
        self.observe(Finished(stage=Stage.SEED))
        return now.uploaded - first

    def _note_address(self) -> None:
        """Say where peers find this one; nothing listens behind a proxy."""
        if self.request.options.proxy is not None:
            return
        with suppress(FetchError):
            port, bind = self.swarm.port(timeout_s=_LISTEN_WITHIN_S), self.request.options.bind
            where = (
                f"port {port}"
                if bind is None
                else f"[{bind}]:{port}"
                if ":" in bind
                else f"{bind}:{port}"
            )
            self.observe(Noted(message=f"seeding, listening on {where}"))

    def _scheduler(self) -> PieceScheduler | None:
        if self.mirrors is None:
            return None
        pieces, limit = self.selection.pieces, self.request.options.max_download
        return PieceScheduler(self.swarm, self.mirrors, pieces, limit)

    def _path(self, index: int) -> Path:
        return self.request.root / self.selection.places[index]

    def _is_stalled(self, clock: float) -> bool:
        return clock - self._arrived_at > self.request.options.stall_timeout_s

    def _save(self, resume: bytes | None) -> None:
        try:
            save_resume_data(self.request.root, resume)
        except OSError as error:
            raise refusal(error, self.request.root, kind=FetchError) from error
        if resume is not None:
            self.record()

    def record(self, *, is_final: bool = False) -> None:
        """Record how far the release is, or that it is complete."""
        have = (piece for piece, is_there in enumerate(self.swarm.have()) if is_there)
        record_progress(self.request, self.selection, have, is_final=is_final)

    def _arrived(self, now: Snapshot) -> int:
        """Payload bytes received so far, from the swarm and from mirrors."""
        return now.downloaded + (self.mirrors.nbytes if self.mirrors is not None else 0)

    def _poll(self) -> Snapshot:
        now = self.swarm.poll(_TICK_S if self.mirrors is None else _BUSY_TICK_S)
        notes = self.swarm.take_notes()
        notes += self.mirrors.take_notes() if self.mirrors is not None else []
        for note in notes:
            self.observe(Noted(message=note))
        return now

    def _report(self, now: Snapshot) -> None:
        """Emit progress: bytes, sources, the progress map, and any reason to wait."""
        self._done = max(self._done, min(now.done, self.selection.nbytes))
        clock = time.monotonic()
        if clock - self._scanned_at > _SCAN_EVERY_S:
            self._scanned_at = clock
            have = self.swarm.have()
            self._map = progress_map(have, self.selection.pieces)
            self.arrivals.arrived(have)
            self._states = self.mirrors.states() if self.mirrors is not None else []
        sources = [("swarm", f"{format_rate(now.rate)} from {_peer_counts(now)}")]
        sources += [(f"mirror {state.name}", _mirror_status(state)) for state in self._states]
        detail = _rates(now, self._states)
        silent, patience = clock - self._arrived_at, self.request.options.stall_timeout_s
        is_silent = silent > _SILENT_S or not (now.peers or self._states)
        if is_silent and (awaited := _awaited(now, self._states)):
            detail = f"waiting for {awaited} ({format_clock(silent)} of {format_clock(patience)})"
            answers = _tracker_answers(self.request, self.swarm)
            sources += [("trackers", "; ".join(answers))] if answers else []
            since = f"for {format_clock(silent)}, gives up after {format_clock(patience)}"
            sources.append(("waiting for", f"{awaited}, {since}"))
        self.observe(
            Advanced(
                stage=Stage.FETCH,
                done=self._done - self._base,
                detail=detail,
                facts=tuple(sources),
                parts=self._map,
            )
        )

    def _sync_files(self) -> None:
        """Wait until the operating system has written every file to the disk."""
        for index in sorted(self.selection.wanted):
            path = self._path(index)
            detail = f"writing {path.name} to disk"
            self.observe(Advanced(stage=Stage.FETCH, done=self._done - self._base, detail=detail))
            _sync(path)


def _sync(path: Path) -> None:
    if path.is_symlink():
        return  # nothing was written to its target
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            with optional():
                os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise refusal(error, path, kind=FetchError) from error


class _Writeback:
    """Syncs files in the background, so that little is left at the end or for a power cut."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._synced: dict[Path, int] = {}
        """File -> its modification time at the last sync."""
        self._arrived = 0
        self._error: GrokctlError | None = None
        self._thread: threading.Thread | None = None

    def advance(self, arrived: int) -> None:
        """Begin to sync the changed files, unless that is under way.

        Args:
            arrived: Bytes received so far; a few are not worth a pass.
        """
        is_busy = self._thread is not None and self._thread.is_alive()
        if not is_busy and arrived - self._arrived > _SYNC_EVERY:
            self._arrived = arrived
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Wait for the pass under way.

        Raises:
            DiskFullError: The disk is full.
            FetchError: A file could not be written for another reason. The system reports this
                only once, so no later sync would fail.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for path in self._paths:
                with suppress(FileNotFoundError):
                    changed = path.stat().st_mtime_ns
                    if self._synced.get(path) != changed:
                        self._synced[path] = changed
                        _sync(path)
        except GrokctlError as error:
            self._error = error


# --- progress and stalls, in words


def progress_map(have: list[bool], pieces: list[int]) -> tuple[float, ...]:
    """The complete fraction of equal parts of the wanted pieces, each 0 to 1."""
    cells = min(_CELLS, len(pieces))
    edges = [cell * len(pieces) // cells for cell in range(cells + 1)]
    return tuple(
        round(sum(have[piece] for piece in pieces[low:high]) / (high - low), 2)
        for low, high in pairwise(edges)
    )


def _rates(now: Snapshot, states: list[MirrorState]) -> str:
    """Rates with names, where there is more than the one of the whole stage; and the peers."""
    rates = [f"mirror {state.name} {format_rate(state.rate)}" for state in states]
    if rates:
        rates.insert(0, f"swarm {format_rate(now.rate)}")
    return " · ".join([*rates, _peer_counts(now)])


def _peer_counts(now: Snapshot) -> str:
    return f"{format_number(now.peers, 'peer')}, {format_number(now.seeders, 'seeder')}"


def _mirror_status(state: MirrorState) -> str:
    received = f"{format_bytes(state.nbytes)} so far"
    if state.is_dropped:
        return f"{received}; dropped: {state.trouble}"
    return f"{format_rate(state.rate)}, {received}"


def _awaited(now: Snapshot, states: list[MirrorState]) -> str:
    """The peers or mirrors that the download waits for; nothing while bytes arrive."""
    mirrors = [state for state in states if not state.is_dropped]
    if now.rate or any(state.rate for state in mirrors):
        return ""
    if mirrors:
        names = ", ".join(
            f"{state.name} ({state.trouble})" if state.trouble else state.name for state in mirrors
        )
        return f"{'mirrors' if len(mirrors) > 1 else 'mirror'} {names}"
    if not now.peers:
        return "peers"
    return f"{format_number(now.peers, 'peer')} to send"


def _tracker_answers(request: FetchRequest, swarm: Swarm) -> list[str]:
    """The last answer of every tracker."""
    answers = dict.fromkeys(request.trackers, "no answer") | swarm.trackers
    hosts = {url: shown_host(urlsplit(url).hostname or "") for url in answers}
    return [f"{hosts[url]}: {answer}" for url, answer in answers.items()]


def stalled(
    awaited: str,
    request: FetchRequest,
    swarm: Swarm,
    now: Snapshot,
    mirrors: Sequence[MirrorState] = (),
) -> StalledError:
    """The error for a silent swarm, with the answers of all sources and the next thing to try."""
    origin, options = request.origin, request.options
    answers = _tracker_answers(request, swarm)
    answers += [f"mirror {state.name}: {state.trouble or 'no answer'}" for state in mirrors]
    message = (
        f"swarm of {printable(origin.name) or origin.infohash}: expected {awaited}, "
        f"found none for {options.stall_timeout_s:g} s from {_peer_counts(now)} "
        f"({'; '.join(answers) or 'no trackers'})"
    )

    def hint(*more: str, comment: str = "", **changes: Any) -> str:
        typed = chosen_options(replace(options, **changes))
        words = ["grokctl", "fetch", origin.shown, "--to", str(request.root)]
        return shlex.join([*words, *typed, *more]) + (f"  # {comment}" if comment else "")

    patient = ("--stall-timeout", "3600")
    if not options.dht and not options.proxy:
        advice = hint(dht=True, comment="without --no-dht: other peers may have it")
    elif options.is_local:
        advice = hint(bind=None, comment=f"{options.bind} reaches only this machine")
    elif awaited == "metadata":
        advice = hint(*patient, comment="or with --torrent-file, from a peer that has it")
    elif origin.tokenizer is not None and not options.mirrors:
        advice = hint("--mirror", next(iter(MIRRORS)))
    else:
        advice = hint(*patient, comment="or with --peer, of somebody who has it")
    return StalledError(message, advice)
