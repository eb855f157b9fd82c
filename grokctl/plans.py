"""What fits where, and how fast it would be: plans for hardware that is here, or is thought of."""

from dataclasses import dataclass

from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute, KvType, Precision
from grokctl.model.sizing import Needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Devices of one kind, as far as a plan asks of them."""

    platform: str
    """`cpu`, `gpu` or `tpu`."""
    name: str
    """For people, such as `NVIDIA H100 80GB HBM3`."""
    count: int
    """Devices; 1 for a CPU, on which any number of virtual ones share one memory."""
    memory: int
    """Bytes on each that a run may take: of an accelerator, less what is left to its driver."""
    bandwidth: float | None
    """Bytes a second of each one's memory."""
    is_measured: bool = False
    """Whether the bandwidth was measured here, not published."""
    has_fast_bfloat16: bool = True
    has_fast_links: bool | None = None
    """Whether devices reach each other over more than PCIe."""
    read_rate: float | None = None
    """Bytes a second of the disk with the checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One way to run a model."""

    mesh: MeshShape
    precision: Precision
    compute: Compute
    kv: KvType
    context: int
    streams: int
    needs: Needs
    memory: int | None
    """Bytes that each device has for it; None where there is no such hardware to compare with."""
    is_possible: bool
    """Whether there are as many devices, or it is a CPU."""
    is_paged: bool
    """Whether weights are read from the disk for every token: a CPU with too little memory."""
    load_s: float | None
    """Estimate, from the rate of the disk."""
    tokens_per_s: float | None
    """Estimate for one stream, from the bandwidth of memory, or of the disk where that is read."""

    @property
    def missing(self) -> int:
        """Bytes a device that are missing; 0 if it fits or nothing is known."""
        return 0 if self.memory is None else max(0, self.needs.total - self.memory)

    @property
    def fits(self) -> bool:
        """Whether it runs."""
        return self.is_possible and self.missing == 0
