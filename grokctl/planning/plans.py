"""What fits where, and how fast it would be: plans for hardware that is here, or is thought of."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Final, Self

from grokctl.checkpoint.layout import bytes_per_token, weight_bytes
from grokctl.checkpoint.storage import released_storage, storage_in
from grokctl.checkpoint.tensor_source import Storage
from grokctl.errors import PlacementError, UsageError, invalid
from grokctl.machine.facts import Accelerator, Machine
from grokctl.model.config import GROK_1, GrokConfig
from grokctl.model.memory_share import told_share, usable
from grokctl.model.placement import MESH_SIZES, MeshShape
from grokctl.model.precision import Compute, KvType, Precision
from grokctl.model.sizing import Needs, Terms, needs
from grokctl.planning import accelerators as published
from grokctl.planning.accelerators import PUBLISHED, Published

MESHES: Final = (*(MeshShape(1, size) for size in MESH_SIZES), MeshShape(2, 8))
"""What is planned for."""
PRECISIONS: Final = (Precision.INT8, Precision.INT4, Precision.BFLOAT16, Precision.FLOAT32)
"""The released one first, then by bytes."""
REACHED: Final = 0.6
"""Share of its memory's bandwidth that decoding one sequence reaches: measured on a CPU (README),
assumed of accelerators."""
_FAST_LINK_S: Final = 15e-6
_SLOW_LINK_S: Final = 40e-6
"""Seconds for a sum over devices of as few numbers as one token has, over links of their own and
over PCIe: both assumed. It is waiting, not sending: 12 kB take less than a microsecond of it."""
_NEWEST_WITHOUT_BFLOAT16: Final = (7, 5)
"""Compute capability of the last NVIDIA GPUs that multiply no bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Devices of one kind, as far as a plan asks of them."""

    platform: str
    """`cpu`, `gpu` or `tpu`."""
    name: str
    """For people, such as `NVIDIA H100 80GB HBM3`."""
    count: int
    """Devices; 1 for a CPU, on which any number of virtual ones share one memory."""
    memory: int | None
    """Bytes on each that a run may take: of an accelerator, less what is left to its driver. None
    where nobody says: then it is taken to be enough."""
    bandwidth: float | None
    """Bytes a second of each one's memory."""
    is_measured: bool = False
    """Whether the bandwidth was measured here, not published."""
    has_fast_bfloat16: bool = True
    has_fast_links: bool | None = None
    """Whether devices reach each other over more than PCIe."""
    read_rate: float | None = None
    """Bytes a second of the disk with the checkpoint."""

    @property
    def computes(self) -> tuple[Compute, ...]:
        """Types to compute in, the best first; the second needs less memory."""
        if self.has_fast_bfloat16:
            return (Compute.BFLOAT16,)
        return (Compute.FLOAT32, Compute.BFLOAT16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One way to run a model."""

    mesh: MeshShape
    precision: Precision
    compute: Compute
    kv: KvType
    context: int
    slots: int
    needs: Needs
    memory: int | None
    """Bytes that each device has for it; None where there is no such hardware to compare with."""
    is_possible: bool
    """Whether there are as many devices, or it is a CPU."""
    is_paged: bool
    """Whether weights are read from the disk for every token: a CPU with too little memory."""
    load_s: float | None
    """Estimate, from the rate of the disk; None also where weights are never all in memory."""
    tokens_per_s: float | None
    """Estimate for one sequence, from the bandwidth of memory, or of the disk if it is paged."""
    step_s: float | None = None
    """Seconds for a token if all weights lay in memory, for comparing plans; None without hardware
    to compare on."""

    @property
    def missing(self) -> int:
        """Bytes a device that are missing; 0 if it fits or nothing is known."""
        if self.memory is None:
            return 0
        needed = self.needs.cache + self.needs.workspace if self.is_paged else self.needs.total
        return max(0, needed - self.memory)

    @property
    def drawbacks(self) -> tuple[bool, bool]:
        """What decides first between plans that fit, smaller being better.

        Weights that come from the disk for every token; and of those in memory, int4: from the
        disk, half the bytes are half the wait.
        """
        return self.is_paged, not self.is_paged and self.precision is Precision.INT4

    @property
    def fits(self) -> bool:
        """Whether it runs."""
        return self.is_possible and self.missing == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Stored weights, spread over the devices of a mesh."""

    storage: Storage
    mesh: MeshShape
    held: tuple[int, ...]
    """Bytes on each device."""
    read: tuple[int, ...]
    """Bytes that each device reads for a token of one sequence."""

    @classmethod
    def of(cls, storage: Storage, mesh: MeshShape) -> Self:
        """Weigh them.

        Raises:
            PlacementError: The model does not divide over the mesh.
        """
        return cls(
            storage=storage,
            mesh=mesh,
            held=weight_bytes(storage, mesh),
            read=bytes_per_token(storage, mesh),
        )


def plans(
    hardware: Hardware | None,
    *,
    config: GrokConfig = GROK_1,
    context: int | None = None,
    slots: int = 1,
    kv: KvType = KvType.COMPUTE,
    compute: Compute | None = None,
) -> tuple[Plan, ...]:
    """Every mesh at every precision that the model divides into.

    Args:
        hardware: What is to run it; of a CPU, only the mesh of one device is planned. None for
            accelerators that nobody has: then the plans say what each needs.
        config: The model.
        context: Tokens; by default as many as the model knows.
        slots: Sequences at a time.
        kv: How keys and values are kept.
        compute: Type of computation; by default what suits the hardware.

    Raises:
        InvalidValueError: The context is longer than the model's, or 0.
    """
    longest = config.sequence_len
    context = longest if context is None else context
    if not 0 < context <= longest:
        raise invalid("context", context, f"expected 1 to {longest}")
    computes = (compute,) if compute else hardware.computes if hardware else (Compute.BFLOAT16,)
    made = []
    for mesh in MESHES[:1] if hardware and hardware.platform == "cpu" else MESHES:
        for weights in _released(config, mesh):
            for dtype in computes:
                terms = Terms(context=context, compute=dtype, slots=slots, kv=kv)
                plan = plan_for(hardware, weights, terms)
                if plan.fits or dtype is computes[-1]:
                    made.append(plan)
                    break
    return tuple(made)


@cache
def _released(config: GrokConfig, mesh: MeshShape) -> tuple[Spread, ...]:
    """The weights of the release at every precision that a mesh divides."""
    released, spreads = released_storage(config), []
    for precision in PRECISIONS:
        with suppress(PlacementError):  # a small model does not divide over every mesh
            spreads.append(Spread.of(storage_in(released, precision, mesh), mesh))
    return tuple(spreads)


def plan_for(
    hardware: Hardware | None, weights: Spread, terms: Terms, *, is_mapped: bool = True
) -> Plan:
    """The plan for weights that are stored in one way.

    Args:
        hardware: What is to run it, or None.
        weights: And where each of them goes.
        terms: The rest.
        is_mapped: Whether a CPU can take weights from the file as it needs them, and need not
            hold all of them.
    """
    platform, mesh = hardware.platform if hardware else "gpu", weights.mesh
    needed = needs(
        weights.storage.config,
        mesh,
        terms,
        weights=max(weights.held),
        precision=weights.storage.precision,
        platform=platform,
    )
    memory = hardware.memory if hardware else None
    room: int | None = None
    if platform == "cpu" and memory is not None:
        memory //= mesh.size  # virtual devices share it
        room = memory - needed.cache - needed.workspace
    rate = hardware.read_rate if hardware else None
    is_paged = is_mapped and room is not None and room < needed.weights
    return Plan(
        mesh=mesh,
        precision=weights.storage.precision,
        compute=terms.compute,
        kv=terms.kv,
        context=terms.context,
        slots=terms.slots,
        needs=needed,
        memory=memory,
        is_possible=hardware is not None and (platform == "cpu" or mesh.size <= hardware.count),
        is_paged=is_paged,
        load_s=sum(weights.held) / rate if rate and not is_paged else None,
        tokens_per_s=_speed(hardware, weights, room) if hardware else None,
        step_s=step_s(hardware, weights) if hardware else None,
    )


def _speed(hardware: Hardware, weights: Spread, room: int | None) -> float | None:
    """Tokens a second of one sequence; None where nobody knows how fast memory or the disk is."""
    if not hardware.bandwidth:
        return None
    missed = 0.0 if room is None else weights.mesh.size * missed_bytes(weights, room)
    if not missed:
        return 1 / step_s(hardware, weights)
    if not hardware.read_rate:
        return None
    held = sum(weights.read) - missed
    return 1 / (held / (hardware.bandwidth * REACHED) + missed / hardware.read_rate)


def step_s(hardware: Hardware, weights: Spread, *, bandwidth: float = 1e12) -> float:
    """Estimated seconds for a token of one sequence whose weights all lie in memory.

    Weights are read once, by the device that reads most; then devices add up what each has of
    the attention and of the experts of every layer, of the embedding and of the head. Keys and
    values are not counted: at the longest context of Grok-1 they add a twentieth at most.

    Args:
        hardware: What runs it.
        weights: What it reads.
        bandwidth: Taken where the hardware's is not known, to compare.
    """
    rate = (hardware.bandwidth or bandwidth) * REACHED
    if hardware.platform == "cpu":
        return sum(weights.read) / rate
    sums = 0 if weights.mesh.size == 1 else 2 * weights.storage.config.num_layers + 2
    wait = _FAST_LINK_S if hardware.has_fast_links else _SLOW_LINK_S
    return max(weights.read) / rate + sums * wait


def missed_bytes(weights: Spread, room: int) -> float:
    """Bytes of weights that a token has to wait for, on a device whose memory does not hold all.

    The kernel keeps the pages that were read last. Less than one token reads is of no use: every
    page is gone again before the next token comes to it, so all of them are read from the disk.
    With more, what every token reads stays, and of the experts as large a share as there is room
    for: those that the last tokens chose, which are chosen again as likely as all others. Assumes
    that no other program reads files, and that texts use all experts alike.

    Args:
        weights: And where each of them goes.
        room: Bytes of memory that a device has for them.
    """
    whole, read = max(weights.held), max(weights.read)
    if room >= whole:
        return 0.0
    if room < read:
        return float(read)
    config = weights.storage.config
    return (whole - room) * config.num_selected_experts / config.num_experts


def examples(plan: Plan) -> tuple[Published, ...]:
    """Published accelerators of which as many as the mesh has devices hold a plan.

    GPUs first, which come in any number, and among these the smallest. A plan for a CPU is taken as
    one for an accelerator.
    """
    holding = (
        kind
        for kind in PUBLISHED
        if usable(kind.memory, platform=kind.platform) >= plan.needs.total
    )
    return tuple(sorted(holding, key=lambda kind: (kind.platform != "gpu", kind.memory)))


def hardware_of(machine: Machine) -> Hardware:
    """What a machine has to run a model: accelerators that JAX can use, or else its CPU."""
    home = next((disk for disk in machine.disks if disk.purpose == "home"), None)
    rate = home.read_rate if home else None
    told = told_share(machine.surroundings.variables)
    found = accelerated(machine.accelerators, is_whole=True, told=told, read_rate=rate)
    return found or Hardware(
        platform="cpu",
        name=machine.cpu.model or "CPU",
        count=1,
        memory=machine.memory.usable,
        bandwidth=machine.cpu.bandwidth,
        is_measured=machine.cpu.bandwidth is not None,
        has_fast_bfloat16=machine.cpu.has_fast_bfloat16,
        read_rate=rate,
    )


def accelerated(
    accelerators: Sequence[Accelerator],
    *,
    is_whole: bool,
    told: float | None = None,
    read_rate: float | None = None,
) -> Hardware | None:
    """Accelerators as one kind of hardware, as large as the smallest; None if there are none.

    Args:
        accelerators: What is there.
        is_whole: Whether their memory is all that they have, of which JAX takes a share, and not
            what JAX took.
        told: What share JAX was told to take.
        read_rate: Bytes a second of the disk.
    """
    if not accelerators:
        return None
    first = accelerators[0]
    known = published.match(first.name)
    sizes = [each.free for each in accelerators if each.free is not None]
    for each in accelerators:
        if each.memory is not None:
            taken = usable(each.memory, platform=each.platform, told=told)
            sizes.append(taken if is_whole else each.memory)
    capability = first.compute_capability or (known.compute_capability if known else None)
    links = {each.has_nvlink for each in accelerators}
    published_links = known.has_fast_links if known else None
    return Hardware(
        platform=first.platform,
        name=first.name,
        count=len(accelerators),
        memory=min(sizes, default=None),
        bandwidth=known.bandwidth if known else None,
        has_fast_bfloat16=capability is None or capability > _NEWEST_WITHOUT_BFLOAT16,
        has_fast_links=published_links if None in links else links == {True},
        read_rate=read_rate,
    )


def hardware_for(
    *, accelerator: str | None = None, devices: int | None = None, memory: int | None = None
) -> Hardware:
    """Hardware that is not here.

    Args:
        accelerator: One of the published ones, or `cpu`; without it, a GPU of which only the
            memory is known.
        devices: How many; by default as many as the largest mesh has, or one CPU.
        memory: Bytes that each has, if that is not the published size; of a CPU, its RAM.

    Raises:
        UsageError: There is no such accelerator, or nobody said how much memory it has.
        PlacementError: No mesh has so many devices.
    """
    if devices is not None and devices not in MESH_SIZES:
        nearest = min(MESH_SIZES, key=lambda size: (abs(size - devices), -size))
        sizes = ", ".join(map(str, MESH_SIZES))
        raise PlacementError(
            f"no mesh has {devices} devices, possible are {sizes}", f"--devices {nearest}"
        )
    is_cpu = accelerator is not None and accelerator.casefold() == "cpu"
    known = None if accelerator is None or is_cpu else published.find(accelerator)
    if memory is None and known is None:
        what = "a CPU" if is_cpu else "hardware that is not here"
        raise UsageError(
            f"{what} can be planned for only if its memory is known",
            "--accelerator cpu --memory 512GB" if is_cpu else "--devices 8 --memory 80GB",
        )
    size = memory if memory is not None else known.memory if known else 0
    if is_cpu:
        # what it multiplies fast is not known: the bfloat16 of plans needs less memory
        return Hardware(platform="cpu", name="CPU", count=1, memory=size, bandwidth=None)
    platform = known.platform if known else "gpu"
    return Hardware(
        platform=platform,
        name=known.label if known else "GPU",
        count=devices or max(MESH_SIZES),
        memory=usable(size, platform=platform),
        bandwidth=known.bandwidth if known else None,
        has_fast_links=known.has_fast_links if known else None,
    )
