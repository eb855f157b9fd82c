"""What is thought of a mirror: how much it brings, what it lacks, and whether it may be asked."""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

_LONGEST_REST_S: Final = 60.0
_ENOUGH_ABSENT: Final = 8
"""Files that a mirror may lack before it is taken for one of something else."""
_RATE_OVER_S: Final = 3.0


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
class Standing:
    """A mirror's record. All of it belongs to the caller's thread; workers only add to `nbytes`."""

    name: str
    nbytes: int = 0
    lacking: set[int] = field(default_factory=set)
    """Pieces that lie in files it does not have."""
    is_dropped: bool = False
    _absent: set[int] = field(default_factory=set)
    _good: int = 0
    _strikes: int = 0
    _struck_at: float = -1.0
    _rests_until: float = 0.0
    _trouble: str = ""
    _notes: list[str] = field(default_factory=list)
    _history: deque[tuple[float, int]] = field(default_factory=deque)

    @property
    def may_be_asked(self) -> bool:
        """Whether it is neither dropped nor at rest."""
        return not self.is_dropped and time.monotonic() >= self._rests_until

    def state(self) -> MirrorState:
        """How it is doing now."""
        return MirrorState(
            name=self.name,
            nbytes=self.nbytes,
            rate=self._rate(),
            trouble=self._trouble,
            is_dropped=self.is_dropped,
        )

    def take_notes(self) -> list[str]:
        """What the user should know and was not told yet, a line each."""
        notes, self._notes = self._notes, []
        return notes

    def succeed(self) -> None:
        """A request brought something."""
        self._strikes, self._good = 0, self._good + 1

    def miss(self, file: int, pieces: Iterable[int], trouble: str) -> None:
        """A file is not there, or is another one."""
        self._trouble = trouble
        self._absent.add(file)
        self.lacking.update(pieces)
        if len(self._absent) >= _ENOUGH_ABSENT:
            self.doubt()
        elif len(self._absent) == 1:
            self._note(f"lacks a file: {trouble}")

    def doubt(self) -> None:
        """Drop a mirror that had nothing of what it was asked for."""
        if self._absent and not self._good:
            self.drop(f"does not hold this release: {self._trouble}")

    def drop(self, trouble: str) -> None:
        """Ask it for nothing any more."""
        self.is_dropped, self._trouble = True, trouble
        self._note(f"{trouble}, so it is not asked again")

    def rest(self, trouble: str, *, began: float) -> None:
        """Leave it alone for a while, longer each time.

        Args:
            trouble: What was wrong.
            began: When the request did: those that ran together are one reason to rest.
        """
        self._trouble = trouble
        if began <= self._struck_at:
            return
        self._strikes += 1
        self._struck_at = time.monotonic()
        self._rests_until = self._struck_at + min(_LONGEST_REST_S, 0.25 * 2**self._strikes)
        if self._strikes == 1:
            self._note(f"{trouble}; it is asked again in a moment")

    def _rate(self) -> float:
        """Bytes per second over the last few seconds."""
        now = time.monotonic()
        self._history.append((now, self.nbytes))
        while now - self._history[0][0] > _RATE_OVER_S:
            self._history.popleft()
        then, nbytes = self._history[0]
        return (self.nbytes - nbytes) / (now - then) if now > then else 0.0

    def _note(self, message: str) -> None:
        self._notes.append(f"mirror {self.name}: {message}")
