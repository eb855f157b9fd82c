"""A swarm and mirrors at the same time: every piece is asked of one of them and lands once."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from grokctl.transfer.mirrors import Mirrors
from grokctl.transfer.swarm import Swarm
from grokctl.transfer.swarm_types import Snapshot

_STUCK_S: Final = 5.0
"""Seconds without a new block after which a piece is taken from the swarm."""
_LOST_S: Final = 300.0
"""Seconds after which a piece that was given to the disk and never appeared is asked for anew."""
_ADJUST_S: Final = 1.0
_LOOK_S: Final = 1.0
_FEW: Final = 4096
"""Pieces that may all be looked at in every step; more of them, once in `_LOOK_S`."""


@dataclass(slots=True)
class _Progress:
    """How far the swarm is with a piece, and since when."""

    blocks: int
    since: float


class Relay:
    """Gives mirrors what the swarm is not busy with, and the disk what they bring."""

    def __init__(
        self, swarm: Swarm, mirrors: Mirrors, wanted: Sequence[int], max_download: int | None
    ) -> None:
        """Begin with nothing asked for.

        Args:
            swarm: Its transfer is under way.
            mirrors: Already entered.
            wanted: Pieces of the wanted files, ascending.
            max_download: Bytes per second for both together.
        """
        self._swarm = swarm
        self._mirrors = mirrors
        self._left: Sequence[int] = wanted
        """Wanted pieces that were not here when all were looked at last."""
        self._looked_at = -_LOOK_S
        self._max_download = max_download
        self._delivered: dict[int, float] = {}
        self._underway: dict[int, _Progress] = {}
        self._adjusted_at = 0.0

    def step(self, now: Snapshot) -> None:
        """Move on what can be moved without waiting; to be called many times a second."""
        clock, have = time.monotonic(), self._swarm.have()
        if len(self._left) <= _FEW or clock - self._looked_at > _LOOK_S:
            self._looked_at = clock
            self._left = [piece for piece in self._left if not have[piece]]
        landed = {
            piece
            for piece, since in self._delivered.items()
            if have[piece] or clock - since > _LOST_S
        }
        for piece in landed:
            del self._delivered[piece]
        for piece, data in self._mirrors.take(self._mirrors.room - len(self._delivered)):
            if have[piece]:
                landed.add(piece)
            else:
                self._swarm.deliver(piece, data)
                self._delivered[piece] = clock
        self._swarm.release(landed | self._mirrors.take_returned())
        if self._mirrors.is_idle:
            self._swarm.reserve(self._mirrors.offer(self._left, self._is_free(have, now, clock)))
        self._let_race()
        if self._max_download is not None and clock - self._adjusted_at > _ADJUST_S:
            self._adjusted_at = clock
            self._share(self._max_download, now)

    def _is_free(self, have: Sequence[bool], now: Snapshot, clock: float) -> Callable[[int], bool]:
        """Whether a piece is not here, and neither the swarm nor the disk is busy with it."""
        blocks = self._swarm.underway()
        known = self._underway
        self._underway = {
            piece: known[piece]
            if piece in known and known[piece].blocks == count
            else _Progress(count, clock)
            for piece, count in blocks.items()
        }
        busy = {
            piece
            for piece, progress in self._underway.items()
            if now.peers and clock - progress.since < _STUCK_S
        }
        busy |= self._delivered.keys()
        return lambda piece: not have[piece] and piece not in busy

    def _let_race(self) -> None:
        """Towards the end ask the swarm for what mirrors are asked for, too: the first one wins.

        A swarm of which nothing is wanted breaks up, and would be missed if a mirror failed.
        """
        reserved = self._swarm.reserved
        if len(self._left) < 2 * len(reserved):
            self._swarm.release(reserved - self._delivered.keys())

    def _share(self, rate: int, now: Snapshot) -> None:
        """Give each side half of the rate, and what the other leaves of its own."""
        mirrored = sum(state.rate for state in self._mirrors.states())
        self._swarm.limit_download(max(rate / 2, rate - mirrored))
        self._mirrors.limit(max(rate / 2, rate - now.rate))
