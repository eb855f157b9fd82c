"""One transfer under way: what lies there already, what arrives, and what it waits for."""

import mmap
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from grokctl.errors import FetchError, GrokctlError, StalledError
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started
from grokctl.integrity.pieces import check_pieces
from grokctl.os_errors import refusal
from grokctl.paths import quoted
from grokctl.system import usable_cores
from grokctl.text import format_bytes, format_clock, format_number, format_rate, printable
from grokctl.transfer.destination import Job, forget_resume, keep_resume, take_resume
from grokctl.transfer.mirror_health import MirrorState
from grokctl.transfer.mirrors import Mirrors
from grokctl.transfer.piece_scheduler import Relay
from grokctl.transfer.resume_data import read_claims
from grokctl.transfer.sources import MIRRORS, FetchOptions, Origin
from grokctl.transfer.swarm import Swarm
from grokctl.transfer.swarm_types import Claims, Snapshot

_TICK_S: Final = 0.25
_BUSY_TICK_S: Final = 0.05
"""With mirrors, which wait to hear what they are asked for next."""
_LOOK_EVERY_S: Final = 0.5
_SAVE_EVERY_S: Final = 30.0
SAVE_WITHIN_S: Final = 3.0
"""Seconds that resume data may take at the end."""
_SIGN_OF_LIFE: Final = 2**14
"""Bytes, a block of BitTorrent: who sends less before `stall_timeout_s` sends nothing."""
_SILENT_S: Final = 3.0
"""Seconds without a sign of life that a slow line, or our own rate limit, may bring about."""
_SYNC_EVERY: Final = 2**28
"""Bytes received after which they are worth a pass over the disk."""
_CELLS: Final = 48
_PAGE: Final = max(mmap.PAGESIZE, 4096)
"""Holes in files are as large as blocks of the file system, which are pages nearly everywhere."""
_MOST_JOBS: Final = 8


def find_claims(
    root: Path,
    job: Job,
    options: FetchOptions,
    have: frozenset[int] | None,
    observe: Observer,
) -> Claims:
    """Find out which pieces need not be fetched.

    What an earlier fetch claims is believed where it can be. Whatever else lies there, because
    that fetch was killed or because somebody copied it, is hashed: nothing is fetched twice.

    Args:
        root: The release.
        job: What is wanted.
        options: `recheck` believes nothing and hashes everything.
        have: Pieces that somebody has just proven; then nothing is hashed.
        observe: Receives verify in bytes.
    """
    sizes = {index: _size(root / place) for index, place in job.places.items()}
    resume, is_last = take_resume(root)
    claims = read_claims(resume, job.metainfo, sizes)
    if have is not None or options.recheck:
        # what is about to come may disprove them
        forget_resume(root)
        claims = Claims(have=have or frozenset(), uploaded=claims.uploaded)
    elif not is_last:
        # a block may have been replaced since by another
        claims = Claims(have=claims.have, uploaded=claims.uploaded)
    if have is not None:
        return claims
    doubtful = _with_data(root, job, [piece for piece in job.pieces if piece not in claims.have])
    proven = claims.have | _proven(root, job, doubtful, observe)
    unfinished = {p: blocks for p, blocks in claims.unfinished.items() if p not in proven}
    return Claims(have=proven, unfinished=unfinished, uploaded=claims.uploaded)


def _proven(root: Path, job: Job, pieces: list[int], observe: Observer) -> frozenset[int]:
    """Which pieces are what the torrent promises."""
    if not pieces:
        return frozenset()
    good, done = set(), 0
    observe(Started(stage=Stage.VERIFY, total=sum(map(job.metainfo.piece_size, pieces))))
    jobs = min(usable_cores(), _MOST_JOBS)
    for checked in check_pieces(root, job.metainfo, job.places, pieces, jobs=jobs):
        done += checked.nbytes
        if checked.is_good:
            good.add(checked.piece)
        observe(Advanced(stage=Stage.VERIFY, done=done, detail="checking what is here"))
    observe(Finished(stage=Stage.VERIFY))
    return frozenset(good)


def _with_data(root: Path, job: Job, pieces: list[int]) -> list[int]:
    """Pieces of which something was written: what is not there, or a hole, needs no look."""
    handles: dict[int, int | None] = {}
    with ExitStack() as stack:

        def has_data(index: int, offset: int, length: int) -> bool:
            if index not in handles:
                handles[index] = None
                with suppress(OSError):
                    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
                    handles[index] = handle = os.open(root / job.places[index], flags)
                    stack.callback(os.close, handle)
            known = handles[index]
            if known is None:
                return False
            # pages at the edges may hold what the neighbours wrote
            low, high = -(-offset // _PAGE) * _PAGE, (offset + length) // _PAGE * _PAGE
            if low >= high:
                low, high = offset, offset + length
            try:
                return os.lseek(known, low, os.SEEK_DATA) < high
            except OSError:  # a hole to the end, or no regular file
                return False

        return [piece for piece in pieces if _is_written(job, piece, has_data)]


def _is_written(job: Job, piece: int, has_data: Callable[[int, int, int], bool]) -> bool:
    return any(
        has_data(file.index, offset, length)
        for file, offset, length in job.metainfo.spans(piece)
        if file.index in job.places
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


@dataclass(slots=True, kw_only=True)
class Download:
    """A transfer that was begun."""

    swarm: Swarm
    mirrors: Mirrors | None
    origin: Origin
    job: Job
    root: Path
    options: FetchOptions
    observe: Observer
    _done: int = 0
    _moved: float = 0.0
    """When something arrived last."""
    _looked_at: float = 0.0
    _parts: tuple[float, ...] = ()
    _states: list[MirrorState] = field(default_factory=list)

    def run(self) -> Snapshot:
        """Wait until every wanted file is whole and on disk.

        Raises:
            StalledError: Nobody sent anything for `stall_timeout_s`.
            DiskFullError: There was no space for what came.
            FetchError: The disk refused it for another reason.
        """
        while (now := self._poll()).is_checking:
            pass
        if now.done:
            self._keep(self.swarm.resume_data(timeout_s=SAVE_WITHIN_S))
        relay = self._relay()
        writeback = _Writeback([self.root / self.job.places[index] for index in self.job.wanted])
        self._done = now.done
        self.observe(Started(stage=Stage.FETCH, total=self.job.nbytes, done=now.done))
        self._moved = saved = time.monotonic()
        arrived = self._arrived(now)
        while not now.has_wanted:
            if relay is not None:
                relay.step(now)
            now = self._poll()
            self._tell(now)
            clock = time.monotonic()
            if self._arrived(now) >= arrived + _SIGN_OF_LIFE:
                arrived, self._moved = self._arrived(now), clock
            elif clock - self._moved > self.options.stall_timeout_s and not now.has_wanted:
                raise stalled(
                    "payload", self.swarm, now, self.origin, self.root, self.options, self._states
                )
            writeback.advance(self._arrived(now))
            if clock - saved > _SAVE_EVERY_S:
                saved = clock
                self.swarm.ask_for_resume_data()
            self._keep(self.swarm.take_resume_data())
        self.swarm.flush()
        writeback.finish()
        if arrived:
            self._make_durable()
        self.observe(Finished(stage=Stage.FETCH))
        return now

    def seed(self) -> None:
        """Give back; Ctrl-C is the ordinary end of it."""
        ratio = self.options.seed_ratio
        goal = None if ratio is None else int(ratio * self.job.nbytes)
        try:
            self.observe(Started(stage=Stage.SEED, total=goal or 0))
            now = self._poll()
            while goal is None or now.uploaded < goal:
                detail = f"{format_rate(now.upload_rate)} · {format_number(now.peers, 'peer')}"
                self.observe(Advanced(stage=Stage.SEED, done=now.uploaded, detail=detail))
                now = self._poll()
        except KeyboardInterrupt:
            self.observe(Noted(message="seeding ended, the download is complete"))
        self.observe(Finished(stage=Stage.SEED))

    def _relay(self) -> Relay | None:
        if self.mirrors is None:
            return None
        return Relay(self.swarm, self.mirrors, self.job.pieces, self.options.max_download)

    def _keep(self, resume: bytes | None) -> None:
        try:
            keep_resume(self.root, resume)
        except OSError as error:
            raise refusal(error, self.root, kind=FetchError) from error

    def _arrived(self, now: Snapshot) -> int:
        """Payload bytes received so far, from whomever."""
        return now.downloaded + (self.mirrors.nbytes if self.mirrors is not None else 0)

    def _poll(self) -> Snapshot:
        now = self.swarm.poll(_TICK_S if self.mirrors is None else _BUSY_TICK_S)
        notes = self.swarm.take_notes()
        notes += self.mirrors.take_notes() if self.mirrors is not None else []
        for note in notes:
            self.observe(Noted(message=note))
        return now

    def _tell(self, now: Snapshot) -> None:
        """Say how far it is, where from and what it waits for."""
        self._done = max(self._done, min(now.done, self.job.nbytes))
        clock = time.monotonic()
        if clock - self._looked_at > _LOOK_EVERY_S:
            self._looked_at = clock
            self._parts = _map(self.swarm.have(), self.job.pieces)
            self._states = self.mirrors.states() if self.mirrors is not None else []
        sources = [("swarm", f"{format_rate(now.rate)} from {_crowd(now)}")]
        sources += [(f"mirror {state.name}", _health(state)) for state in self._states]
        detail = _pace(now, self._states)
        silent, patience = clock - self._moved, self.options.stall_timeout_s
        is_silent = silent > _SILENT_S or not (now.peers or self._states)
        if is_silent and (waits := _waits_for(now, self._states)):
            detail = f"waiting for {waits} ({format_clock(silent)} of {format_clock(patience)})"
            answers = tracker_answers(self.swarm, self.origin, self.options)
            sources += [("trackers", "; ".join(answers))] if answers else []
            since = f"for {format_clock(silent)}, gives up after {format_clock(patience)}"
            sources.append(("waits for", f"{waits}, {since}"))
        facts = tuple(sources)
        self.observe(
            Advanced(
                stage=Stage.FETCH, done=self._done, detail=detail, facts=facts, parts=self._parts
            )
        )

    def _make_durable(self) -> None:
        """Wait until the disk has what the operating system was given."""
        for index in sorted(self.job.wanted):
            path = self.root / self.job.places[index]
            detail = f"writing {path.name} to disk"
            self.observe(Advanced(stage=Stage.FETCH, done=self._done, detail=detail))
            _sync(path)


def _sync(path: Path) -> None:
    """Wait until the disk has a file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise refusal(error, path, kind=FetchError) from error


class _Writeback:
    """Hands files to the disk while more arrives: little is left at the end, or for a power cut."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._written: dict[Path, int] = {}
        self._arrived = 0
        self._error: GrokctlError | None = None
        self._thread: threading.Thread | None = None

    def advance(self, arrived: int) -> None:
        """Begin a pass over all files that changed, unless one is under way.

        Args:
            arrived: Bytes received so far; a pass is worth it for some.
        """
        is_busy = self._thread is not None and self._thread.is_alive()
        if not is_busy and arrived - self._arrived > _SYNC_EVERY:
            self._arrived = arrived
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Wait for the pass under way.

        Raises:
            DiskFullError: There was no space for what came.
            FetchError: The disk refused it for another reason, which it says only once.
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
                    if self._written.get(path) != changed:
                        self._written[path] = changed
                        _sync(path)
        except GrokctlError as error:
            self._error = error


def _map(have: list[bool], pieces: list[int]) -> tuple[float, ...]:
    """How much is here of equal parts of what is wanted, each 0 to 1."""
    cells = min(_CELLS, len(pieces))
    edges = [cell * len(pieces) // cells for cell in range(cells + 1)]
    return tuple(
        round(sum(have[piece] for piece in pieces[low:high]) / (high - low), 2)
        for low, high in pairwise(edges)
    )


def _pace(now: Snapshot, states: list[MirrorState]) -> str:
    mirrored = [f"mirror {state.name} {format_rate(state.rate)}" for state in states]
    return " · ".join([format_rate(now.rate), *mirrored, _crowd(now)])


def _health(state: MirrorState) -> str:
    received = f"{format_bytes(state.nbytes)} so far"
    if state.is_dropped:
        return f"{received}; dropped: {state.trouble}"
    return f"{format_rate(state.rate)}, {received}"


def _waits_for(now: Snapshot, states: list[MirrorState]) -> str:
    """Who stands between this moment and the next byte; nobody while bytes come."""
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


def _crowd(now: Snapshot) -> str:
    return f"{format_number(now.peers, 'peer')}, {format_number(now.seeds, 'seed')}"


def tracker_answers(swarm: Swarm, origin: Origin, options: FetchOptions) -> list[str]:
    """What every tracker answered last."""
    silent = dict.fromkeys((*origin.trackers, *options.trackers), "no answer")
    return [
        f"{urlsplit(url).hostname}: {answer}" for url, answer in (silent | swarm.trackers).items()
    ]


def stalled(
    what: str,
    swarm: Swarm,
    now: Snapshot,
    origin: Origin,
    root: Path,
    options: FetchOptions,
    mirrors: list[MirrorState],
) -> StalledError:
    """The error for a silent swarm: who was asked, what they answered, and what to try."""
    answers = tracker_answers(swarm, origin, options)
    answers += [f"mirror {state.name}: {state.trouble or 'no answer'}" for state in mirrors]
    name = printable(origin.name) or origin.infohash
    message = (
        f"swarm of {name}: expected {what}, found none for {options.stall_timeout_s:g} s from "
        f"{_crowd(now)} ({'; '.join(answers) or 'no trackers'})"
    )
    command = f"grokctl fetch {quoted(origin.source)} --to {quoted(root)}"
    if not options.dht and not options.proxy:
        return StalledError(message, f"{command}  # and without --no-dht: others may have it")
    if what == "metadata":
        return StalledError(message, f"{command} --torrent-file FILE  # from somebody who has it")
    if origin.tokenizer is not None and not options.mirrors:
        return StalledError(message, f"{command} --mirror {next(iter(MIRRORS))}")
    return StalledError(message, f"{command} --stall-timeout 3600 --peer HOST:PORT")
