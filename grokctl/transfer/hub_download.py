"""A download from a hub in progress: ranges over several connections, progress and stalls."""

import hashlib
import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from grokctl.errors import FetchError, StalledError
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started
from grokctl.os_errors import refusal
from grokctl.text import format_clock, format_number, format_rate
from grokctl.transfer.connection_count import ConnectionCount
from grokctl.transfer.destination import FileSelection, record_progress
from grokctl.transfer.download import SIGN_OF_LIFE, progress_map
from grokctl.transfer.hub_files import HubFiles
from grokctl.transfer.mirror_health import MirrorState
from grokctl.transfer.mirrors import Mirrors
from grokctl.transfer.placed_files import PlacedFiles
from grokctl.transfer.sources import FetchRequest

_TICK_S: Final = 0.01
_REPORT_EVERY_S: Final = 0.1
_SCAN_EVERY_S: Final = 0.5
_RECORD_EVERY_S: Final = 30.0
_WATCH_EVERY_S: Final = 1.0
_FEW: Final = 4096
_MOST_AT_ONCE: Final = 8
"""Ranges that are written before the next look at everything else."""
_SILENT_S: Final = 3.0


@dataclass(slots=True, kw_only=True)
class HubDownload:
    """A download from one hub."""

    request: FetchRequest
    selection: FileSelection
    files: HubFiles
    mirrors: Mirrors
    placed: PlacedFiles
    observe: Observer
    shown: str
    """The hub for messages."""
    counts_rest: bool = False
    """Report the missing bytes alone as progress, as a repair does."""
    _left: list[int] = field(default_factory=list)
    _scanned_at: float = -math.inf
    _reported_at: float = -math.inf
    _arrived_at: float = 0.0
    _nbytes: int = 0
    """Received at the last sign of life."""
    _asked_s: float = 0.0
    """Seconds of pauses that the hub had asked for by then: it may be silent so much longer."""
    _map: tuple[float, ...] = ()
    _mapped_at: float = -math.inf
    _connections: ConnectionCount = field(default_factory=ConnectionCount)

    def run(self) -> None:
        """Fetch and prove every wanted file.

        Raises:
            StalledError: Nothing arrived for `stall_timeout_s`.
            DiskFullError: The disk is full.
            FetchError: The hub refuses, lacks a file or sends wrong bytes; or a file could not be
                written.
        """
        base = self.files.done if self.counts_rest else 0
        done = self.files.done - base
        total = self.selection.nbytes - base
        self.observe(Started(stage=Stage.FETCH, total=total, done=done))
        self._arrived_at = recorded_at = watched_at = time.monotonic()
        self.mirrors.limit(self.request.options.max_download)
        while not self.files.is_complete:
            has_arrived = self._take()
            clock = time.monotonic()
            self.files.prove(self.observe)
            self._offer(clock)
            self._report(clock, base)
            if clock - watched_at > _WATCH_EVERY_S:
                watched_at = clock
                self.placed.watch()
            if clock - recorded_at > _RECORD_EVERY_S:
                recorded_at = clock
                self.placed.watch(files=True)
                self.record()
            if not has_arrived:
                time.sleep(_TICK_S)
        self._report(math.inf, base)
        self.observe(Finished(stage=Stage.FETCH))

    def record(self, *, is_final: bool = False) -> None:
        """Record how far the release is.

        Raises:
            FetchError: The folder cannot be written.
        """
        try:
            record_progress(self.request, self.selection, self.files.have(), is_final=is_final)
        except OSError as error:
            raise refusal(error, self.request.root, kind=FetchError) from error

    def record_end(self) -> None:
        """Record how far it came, however it ended, as far as the disk lets it."""
        with suppress(OSError, FetchError):
            self.record(is_final=True)
        with suppress(OSError):
            self.files.save(self.observe)

    def _take(self) -> bool:
        """Write what has arrived; whether that was anything."""
        arrived = self.mirrors.take(_MOST_AT_ONCE)
        for piece, data in arrived:
            self.files.write(piece, data, hashlib.sha256(data).digest())
        if self.mirrors.nbytes - self._nbytes >= SIGN_OF_LIFE:
            self._nbytes, self._asked_s = self.mirrors.nbytes, self.mirrors.asked_s
            # answers under way may arrive in a pause that was asked for
            self._arrived_at = max(time.monotonic(), self.mirrors.asked_until)
        self.mirrors.take_returned()
        for note in self.mirrors.take_notes():
            self.observe(Noted(message=note))
        return bool(arrived)

    def _offer(self, clock: float) -> None:
        """Request what is missing."""
        if len(self._left) <= _FEW or clock - self._scanned_at > _SCAN_EVERY_S:
            self._scanned_at = clock
            self._left = self.files.left()
        if not self._left:
            self._arrived_at = clock  # files are read back, which takes its time
            return
        self.mirrors.most_running = self._connections.measure(clock, self.mirrors.nbytes)
        if self.mirrors.is_idle:
            self.mirrors.offer(self._left, self.files.wants)
        if not self.mirrors.leased and self.mirrors.lacks(self._left[0]):
            (state,) = self.mirrors.states()
            raise FetchError(f"hub {self.shown}: {state.trouble}", "grokctl fetch --mirror URL")
        patience = self.request.options.stall_timeout_s + self.mirrors.asked_s - self._asked_s
        if clock - self._arrived_at > patience:
            (state,) = self.mirrors.states()
            raise self._stalled(state)

    def _stalled(self, state: MirrorState) -> StalledError:
        patience = format_clock(self.request.options.stall_timeout_s)
        why = state.trouble or "no answer"
        message = f"hub {self.shown}: expected bytes, found none for {patience} ({why})"
        return StalledError(message, "grokctl fetch --stall-timeout 3600  # or another --mirror")

    def _report(self, clock: float, base: int) -> None:
        if clock - self._reported_at < _REPORT_EVERY_S:
            return
        (state,) = self.mirrors.states()
        if clock - self._mapped_at > _SCAN_EVERY_S:
            self._mapped_at = clock
            have = [False] * self.selection.metainfo.num_pieces
            for piece in self.files.have():
                have[piece] = True
            self._map = progress_map(have, self.selection.pieces)
        self._reported_at = clock
        count = format_number(self.mirrors.running, "connection")
        detail = f"hub {state.name} · {count}"
        silent = time.monotonic() - self._arrived_at
        if not self._left:
            detail = "reading files back, to prove them"
        elif silent > _SILENT_S:
            trouble = f" ({state.trouble})" if state.trouble else ""
            detail = f"waiting for hub {state.name}{trouble}, {format_clock(silent)}"
        facts = ((f"hub {state.name}", f"{format_rate(state.rate)} over {count}"),)
        done = self.files.done - base
        event = Advanced(stage=Stage.FETCH, done=done, detail=detail, facts=facts, parts=self._map)
        self.observe(event)
