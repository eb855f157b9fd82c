"""The health record of a mirror: bytes received, missing files, pauses, and when to drop it."""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Lock
from typing import Final

_LONGEST_PAUSE_S: Final = 60.0
_MOST_MISSING: Final = 8
"""Missing files after which a mirror that has delivered nothing is dropped."""
_RATE_OVER_S: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorState:
    """A mirror's health at one moment."""

    name: str
    nbytes: int
    """Received so far, including wasted bytes."""
    rate: float
    """Bytes per second."""
    trouble: str = ""
    """The last failure."""
    is_dropped: bool = False
    """Whether it gets no more requests."""


@dataclass(slots=True, eq=False)
class MirrorHealth:
    """The record of one mirror. Workers call `receive`; the rest is for the caller's thread."""

    name: str
    missing: set[int] = field(default_factory=set)
    """Pieces that touch files which the mirror does not have."""
    is_dropped: bool = False
    asked_s: float = 0.0
    """Seconds of pauses that the mirror itself asked for, in all."""
    asked_until: float = 0.0
    """When the last of them ends."""
    _nbytes: int = 0
    _lock: Lock = field(default_factory=Lock)
    """Of `_nbytes`, to which several workers add."""
    _missing_files: set[int] = field(default_factory=set)
    _successes: int = 0
    _failures: int = 0
    """In a row."""
    _failed_at: float = -1.0
    _pauses_until: float = 0.0
    _trouble: str = ""
    _notes: list[str] = field(default_factory=list)
    _history: deque[tuple[float, int]] = field(default_factory=deque)

    @property
    def nbytes(self) -> int:
        """Bytes received so far, including wasted ones."""
        with self._lock:
            return self._nbytes

    @property
    def is_available(self) -> bool:
        """Whether it is neither dropped nor paused."""
        return not self.is_dropped and time.monotonic() >= self._pauses_until

    def state(self) -> MirrorState:
        """Its health now."""
        return MirrorState(
            name=self.name,
            nbytes=self.nbytes,
            rate=self._rate(),
            trouble=self._trouble,
            is_dropped=self.is_dropped,
        )

    def take_notes(self) -> list[str]:
        """News for the user since the last call, a line each."""
        notes, self._notes = self._notes, []
        return notes

    def receive(self, nbytes: int) -> None:
        """Count bytes that arrived; safe among threads."""
        with self._lock:
            self._nbytes += nbytes

    def succeed(self) -> None:
        """A request delivered at least one piece."""
        self._failures, self._successes = 0, self._successes + 1

    def miss(self, file: int, pieces: Iterable[int], trouble: str) -> None:
        """A file does not exist there, or is a different one."""
        self._trouble = trouble
        self._missing_files.add(file)
        self.missing.update(pieces)
        if len(self._missing_files) >= _MOST_MISSING:
            self.drop_if_useless()
        elif len(self._missing_files) == 1:
            self._note(f"a file is missing: {trouble}")

    def drop_if_useless(self) -> None:
        """Drop a mirror that had none of the requested files."""
        if self._missing_files and not self._successes:
            self.drop(f"does not hold this release: {self._trouble}")

    def drop(self, trouble: str) -> None:
        """Send it no more requests."""
        self.is_dropped, self._trouble = True, trouble
        self._note(f"dropped: {trouble}")

    def pause(self, trouble: str, *, began: float, wait_s: float = 0.0) -> None:
        """Send it no requests for a while, longer after each failure.

        Args:
            trouble: The failure.
            began: When the failed request began: requests that ran together fail once.
            wait_s: Seconds that it asks to wait, at least.
        """
        self._trouble = trouble
        if began <= self._failed_at:
            return
        self._failures += 1
        self._failed_at = time.monotonic()
        pause_s = max(wait_s, min(_LONGEST_PAUSE_S, 0.25 * 2**self._failures))
        self._pauses_until = self._failed_at + pause_s
        if wait_s:
            self.asked_s += wait_s
            self.asked_until = self._failed_at + wait_s
        if self._failures == 1:
            self._note(f"{trouble}; trying again soon")

    def _rate(self) -> float:
        """Bytes per second over the last few seconds."""
        now, nbytes = time.monotonic(), self.nbytes
        self._history.append((now, nbytes))
        while now - self._history[0][0] > _RATE_OVER_S:
            self._history.popleft()
        then, earlier = self._history[0]
        return (nbytes - earlier) / (now - then) if now > then else 0.0

    def _note(self, message: str) -> None:
        self._notes.append(f"mirror {self.name}: {message}")
