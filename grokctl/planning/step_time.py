"""The time of a decoded token on accelerators, from what it starts, adds up and reads."""

from dataclasses import dataclass
from typing import Final

LAUNCH_S: Final = 1.5e-6
"""Seconds from the start of one operation of a GPU to that of the next, beside its own work: a
node of a CUDA graph."""
REACHED: Final = 0.65
"""Share of the memory's bandwidth that the products reach: assumed, no GPU was at hand."""
ENDS_S: Final = 1.5e-3
"""Seconds before the first layer and after the last: the call, the head, the draw."""
WAIT_S: Final = 45e-6
"""Seconds that a device idles when the host reads a number of it before it goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a token of one sequence starts on a device, in all layers together."""

    launches: int
    """Operations that the device runs one after the other, beside sums over devices."""
    sums: int
    """Sums over devices."""
    waits: int = 0
    """Times that the host reads a number of the device before it goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a token of one sequence, by what they are spent on."""

    launches: float
    reading: float
    """Weights, and keys and values."""
    sums: float
    waits: float
    ends: float = ENDS_S

    @property
    def total(self) -> float:
        """All of them: nothing is counted as running beside something else."""
        return self.launches + self.reading + self.sums + self.waits + self.ends


def step_time(counts: Counts, *, nbytes: int, bandwidth: float, sum_s: float) -> StepTime:
    """The time of a token.

    Args:
        counts: What the token starts.
        nbytes: Bytes that a device reads for it.
        bandwidth: Bytes a second of a device's memory.
        sum_s: Seconds of a sum over devices.
    """
    return StepTime(
        launches=counts.launches * LAUNCH_S,
        reading=nbytes / (bandwidth * REACHED),
        sums=counts.sums * sum_s,
        waits=counts.waits * WAIT_S,
    )
