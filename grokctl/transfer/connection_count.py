"""How many connections pay: more of them as long as bytes arrive faster."""

from dataclasses import dataclass
from typing import Final

FEWEST: Final = 4
MOST: Final = 16
_TRY_S: Final = 3.0
"""Seconds over which a rate is measured."""
_HOLD_S: Final = 60.0
"""Seconds until more connections are tried again, or fewer."""
_GAIN: Final = 1.05
"""More connections stay if they are faster by this factor."""


@dataclass(slots=True)
class ConnectionCount:
    """Climbs from a few connections to as many as pay, and tries again every minute."""

    count: int = FEWEST
    """Connections to use now."""
    _since: float | None = None
    _nbytes: int = 0
    """Received when the measurement began."""
    _before: tuple[int, float] | None = None
    """The last count that was measured, and its rate in bytes per second."""
    _next_at: float = 0.0

    def measure(self, clock: float, nbytes: int) -> int:
        """Take a measurement.

        Args:
            clock: Seconds.
            nbytes: Bytes received so far.

        Returns:
            Connections to use.
        """
        if self._since is None or clock < self._next_at:
            self._since, self._nbytes = clock, nbytes
            return self.count
        if clock - self._since < _TRY_S:
            return self.count
        rate = (nbytes - self._nbytes) / (clock - self._since)
        self._since, self._nbytes = clock, nbytes
        if self._before is not None and rate < self._before[1] * _GAIN:
            self.count, self._before, self._next_at = self._before[0], None, clock + _HOLD_S
        elif self.count == MOST:
            self._before, self._next_at = None, clock + _HOLD_S
        else:
            self._before = self.count, rate
            self.count = min(MOST, max(self.count + 1, self.count * 3 // 2))
        return self.count
