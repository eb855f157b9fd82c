"""Swarm and mirrors side by side: each piece is requested from one of them and written once."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from grokctl.transfer.mirrors import Mirrors
from grokctl.transfer.swarm import Swarm
from grokctl.transfer.swarm_types import Snapshot

_STUCK_S: Final = 5.0
"""Seconds without a new block after which mirrors may take a piece from the swarm."""
_LOST_S: Final = 300.0
"""Seconds after which a piece that was written but never appeared is requested again."""
_ADJUST_EVERY_S: Final = 1.0
_SCAN_EVERY_S: Final = 1.0
_FEW: Final = 4096
"""Pieces that may all be scanned in every step; more of them, once in `_SCAN_EVERY_S`."""


@dataclass(slots=True)
class _PieceProgress:
    """Blocks of a piece that the swarm has sent, and when the last of them arrived."""

    blocks: int
    since: float


class PieceScheduler:
    """Gives idle pieces to mirrors, and the pieces they bring to the disk."""

    def __init__(
        self, swarm: Swarm, mirrors: Mirrors, wanted: Sequence[int], max_download: int | None
    ) -> None:
        """Request nothing yet.

        Args:
            swarm: Its transfer has begun.
            mirrors: Already entered.
            wanted: Pieces of the wanted files, ascending.
            max_download: Bytes per second for both together.
        """
        self._swarm = swarm
        self._mirrors = mirrors
        self._left: Sequence[int] = wanted
        """Wanted pieces that were missing at the last scan."""
        self._scanned_at = -_SCAN_EVERY_S
        self._max_download = max_download
        self._written: dict[int, float] = {}
        """Piece that libtorrent is writing -> since when."""
        self._in_swarm: dict[int, _PieceProgress] = {}
        self._adjusted_at = 0.0

    def step(self, now: Snapshot) -> None:
        """Do everything that needs no waiting; to be called many times a second."""
        clock, have = time.monotonic(), self._swarm.have()
        if len(self._left) <= _FEW or clock - self._scanned_at > _SCAN_EVERY_S:
            self._scanned_at = clock
            self._left = [piece for piece in self._left if not have[piece]]
        finished = {
            piece
            for piece, since in self._written.items()
            if have[piece] or clock - since > _LOST_S
        }
        for piece in finished:
            del self._written[piece]
        for piece, data in self._mirrors.take(self._mirrors.room - len(self._written)):
            if have[piece]:
                finished.add(piece)
            else:
                self._swarm.write_piece(piece, data)
                self._written[piece] = clock
        self._swarm.unreserve(finished | self._mirrors.take_returned())
        if self._mirrors.is_idle:
            self._swarm.reserve(self._mirrors.offer(self._left, self._is_free(have, now, clock)))
        self._race_at_the_end()
        if self._max_download is not None and clock - self._adjusted_at > _ADJUST_EVERY_S:
            self._adjusted_at = clock
            self._split_rate(self._max_download, now)

    def _is_free(self, have: Sequence[bool], now: Snapshot, clock: float) -> Callable[[int], bool]:
        """A test whether a piece is missing, and neither swarm nor disk is busy with it."""
        blocks = self._swarm.requested_blocks()
        known = self._in_swarm
        self._in_swarm = {
            piece: known[piece]
            if piece in known and known[piece].blocks == count
            else _PieceProgress(count, clock)
            for piece, count in blocks.items()
        }
        busy = {
            piece
            for piece, progress in self._in_swarm.items()
            if now.peers and clock - progress.since < _STUCK_S
        }
        busy |= self._written.keys()
        return lambda piece: not have[piece] and piece not in busy

    def _race_at_the_end(self) -> None:
        """Near the end, request pieces from both swarm and mirrors: the first one wins.

        Peers leave a session that wants nothing of them, and would be missed if a mirror failed.
        """
        reserved = self._swarm.reserved
        if len(self._left) < 2 * len(reserved):
            self._swarm.unreserve(reserved - self._written.keys())

    def _split_rate(self, rate: int, now: Snapshot) -> None:
        """Give each side half of the rate, and the part that the other does not use."""
        mirrored = sum(state.rate for state in self._mirrors.states())
        self._swarm.limit_download(max(rate / 2, rate - mirrored))
        self._mirrors.limit(max(rate / 2, rate - now.rate))
