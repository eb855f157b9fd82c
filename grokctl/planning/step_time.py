"""The time of a decoded token of one sequence: what it starts, adds up over devices and reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from grokctl.model.config import GrokConfig
from grokctl.model.placement import MeshShape

REACHED: Final[Mapping[str, float]] = {"cpu": 0.6, "gpu": 0.65, "tpu": 0.6}
"""Share of the memory's bandwidth that reading weights reaches, by platform: measured on a CPU
without the native kernel (README), assumed for accelerators."""
_REACHED_ELSEWHERE: Final = 0.6
"""On platforms that JAX has beside these, such as Apple's: assumed."""
KERNEL_REACHED: Final = 0.8
"""Share of the native kernel's own rate that decoding one sequence reaches: 0.81 to 0.91 on a CPU
(docs/adr/0014)."""
LAUNCHES_OF_A_LAYER: Final = 12
LAUNCHES_OUTSIDE: Final = 13
"""What a device of a GPU's mesh of eight starts for a token, beside sums: counted by
`make gpu-forms` (docs/adr/0013), which fails where they are no longer true."""
LAUNCH_S: Final = 1.5e-6
"""Seconds from the start of a node of a CUDA graph to that of the next, beside its own work:
assumed."""
WAIT_S: Final = 45e-6
"""Seconds in which a GPU idles while the host reads a number of it: assumed."""
ENDS_S: Final = 1.5e-3
"""Seconds before the first layer and after the last, for the call and the draw: assumed."""
_RANKS_AT_ONCE: Final = 8
"""Most GPUs whose sums XLA takes in one kernel of its own; also the most that a host mostly has."""
_SUM_S: Final = 8e-6
_NETWORK_SUM_S: Final = 30e-6
_SLOW_SUM_S: Final = 40e-6
_TPU_SUM_S: Final = 15e-6
"""Seconds for a sum of one token's numbers over GPUs of one host, over more of them by NCCL (25 to
40 microseconds), over PCIe, and over TPUs: all assumed. It is the time of waiting: sending 24 kB
takes less than a microsecond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a token starts on a device, in all layers together."""

    launches: int = 0
    """Operations that run one after the other, beside sums over devices."""
    sums: int = 0
    """Sums over devices."""
    waits: int = 0
    """Times that the host reads a number of the device before it goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """The time of a token, by what it is spent on: nothing counts as running beside the rest."""

    counts: Counts
    nbytes: int
    """Bytes that the device with the most reads: weights, and keys and values."""
    launches_s: float
    reading_s: float
    sums_s: float
    waits_s: float
    ends_s: float

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.launches_s + self.reading_s + self.sums_s + self.waits_s + self.ends_s


def reached(platform: str) -> float:
    """Share of the memory's bandwidth that reading weights reaches, on any platform of JAX."""
    return REACHED.get(platform, _REACHED_ELSEWHERE)


def counts_of(config: GrokConfig, mesh: MeshShape, *, platform: str) -> Counts:
    """What a token starts with grokctl's programs.

    A CPU takes too long for each operation, and a TPU runs a program by itself, for launches to
    count. Attention adds up over the axis of the model, experts over all devices; the embedding is
    one sum more, and logits stay where they are.
    """
    if platform == "cpu":
        return Counts()
    sums = (mesh.model > 1) * (1 + config.num_layers) + (mesh.size > 1) * config.num_layers
    if platform != "gpu":
        return Counts(sums=sums)
    launches = LAUNCHES_OF_A_LAYER * config.num_layers + LAUNCHES_OUTSIDE
    return Counts(launches=launches, sums=sums)


def sums_s(
    config: GrokConfig, mesh: MeshShape, *, platform: str, has_fast_links: bool | None
) -> float:
    """Seconds that a token waits for sums over devices.

    Args:
        config: The model.
        mesh: The mesh.
        platform: `cpu`, `gpu` or `tpu`.
        has_fast_links: Whether devices reach each other over more than PCIe; unknown counts as no.
    """

    def sum_s(ranks: int) -> float:
        if ranks == 1 or platform == "cpu":
            return 0.0
        if not has_fast_links:
            return _SLOW_SUM_S
        if platform != "gpu":
            return _TPU_SUM_S
        return _SUM_S if ranks <= _RANKS_AT_ONCE else _NETWORK_SUM_S

    return sum_s(mesh.model) * (1 + config.num_layers) + sum_s(mesh.size) * config.num_layers


def step_time(
    counts: Counts, *, nbytes: int, rate: float, sums_s: float, platform: str = "gpu"
) -> StepTime:
    """The time of a token.

    Args:
        counts: What the token starts.
        nbytes: Bytes that the device with the most reads for it.
        rate: Bytes a second at which they are read.
        sums_s: Seconds of all sums over devices.
        platform: `cpu`, `gpu` or `tpu`.
    """
    return StepTime(
        counts=counts,
        nbytes=nbytes,
        launches_s=counts.launches * LAUNCH_S,
        reading_s=nbytes / rate,
        sums_s=sums_s,
        waits_s=counts.waits * WAIT_S,
        ends_s=0.0 if platform == "cpu" else ENDS_S,
    )
