"""Plans: the memory and the speed of a run on this machine's or on other hardware."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Final

from grokctl.checkpoint.storage import released_storage, storage_in
from grokctl.errors import PlacementError, UsageError, invalid
from grokctl.machine.facts import Accelerator, Machine
from grokctl.model.config import GROK_1, GrokConfig
from grokctl.model.memory_share import environment_share, usable
from grokctl.model.placement import MESH_SIZES, MeshShape
from grokctl.model.precision import Compute, KvType, Precision
from grokctl.model.sizing import Needs, Terms, cache_bytes, needs
from grokctl.planning import accelerators as published
from grokctl.planning.accelerators import PUBLISHED, Published
from grokctl.planning.residence import Residence, place
from grokctl.planning.spread import Spread, missed_bytes, read_bytes
from grokctl.planning.step_time import (
    KERNEL_REACHED,
    StepTime,
    counts_of,
    reached,
    step_time,
    sums_s,
)

MESHES: Final = (*(MeshShape(1, size) for size in MESH_SIZES), MeshShape(2, 8))
"""Meshes that plans are made for."""
PRECISIONS: Final = (Precision.INT8, Precision.INT4, Precision.BFLOAT16, Precision.FLOAT32)
"""The released one first, then by bytes."""
_NEWEST_WITHOUT_BFLOAT16: Final = (7, 5)
"""Compute capability of the last NVIDIA GPUs that multiply no bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Devices of one kind: the facts that a plan needs."""

    platform: str
    """`cpu`, `gpu` or `tpu`."""
    name: str
    """For people, such as `NVIDIA H100 80GB HBM3`."""
    count: int
    """Devices; 1 for a CPU, on which any number of virtual ones share one memory."""
    memory: int | None
    """Bytes on each that a run may take: an accelerator's driver keeps the rest. None if unknown,
    which counts as enough."""
    bandwidth: float | None
    """Bytes a second of each device's memory."""
    is_measured: bool = False
    """Whether the bandwidth was measured on this machine; otherwise it is published."""
    kernel_rate: float | None = None
    """Bytes a second of weights that the native kernel of a CPU reads, measured; None without."""
    has_fast_bfloat16: bool = True
    has_fast_links: bool | None = None
    """Whether devices reach each other over more than PCIe."""
    read_rate: float | None = None
    """Bytes a second of the disk with the checkpoint."""

    @property
    def decode_rate(self) -> float | None:
        """Bytes a second of weights that decoding one sequence reads; None if unknown."""
        if self.kernel_rate is not None:
            return self.kernel_rate * KERNEL_REACHED
        return None if self.bandwidth is None else self.bandwidth * reached(self.platform)

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
    """Bytes that each device has for it; None without hardware to compare with."""
    is_possible: bool
    """Whether the hardware has enough devices, or is a CPU."""
    is_paged: bool
    """Whether weights are read from the disk for every token: a CPU with too little memory. Those
    of one device are streamed, those of several come as the kernel reads mapped files."""
    load_s: float | None
    """Estimate, from the rate of the disk; None if weights are never all in memory."""
    tokens_per_s: float | None
    """Estimate for one sequence at the end of the context; from the disk's rate if it is paged."""
    residence: Residence | None = None
    """Which experts stay in memory, if others are streamed: a CPU of one device with too little."""
    first_token_s: float | None = None
    """Estimate of the least that a prompt waits for its experts, if some are streamed."""
    step: StepTime | None = None
    """The time of a token if all weights lay in memory, for comparing plans; None without hardware
    to compare on."""
    shared_tokens_per_s: float | None = None
    """Estimate for each of as many sequences as there are slots, all running; None if there is
    only one, or weights come from the disk."""

    @property
    def missing(self) -> int:
        """Bytes that each device lacks; 0 if the plan fits or the memory is unknown."""
        if self.memory is None:
            return 0
        if self.residence is not None:
            return self.residence.missing
        needed = self.needs.cache + self.needs.workspace if self.is_paged else self.needs.total
        return max(0, needed - self.memory)

    @property
    def estimate(self) -> StepTime | None:
        """What `tokens_per_s` is made of; None if it is unknown, or waits for the disk."""
        return None if self.tokens_per_s is None or self.is_paged else self.step

    @property
    def drawbacks(self) -> tuple[bool, bool]:
        """The first criteria between plans that fit, smaller being better.

        Weights that come from the disk for every token, and int4 in memory. From the disk, int4 is
        no drawback: half the bytes are half the wait.
        """
        return self.is_paged, not self.is_paged and self.precision is Precision.INT4

    @property
    def fits(self) -> bool:
        """Whether the hardware can run it."""
        return self.is_possible and self.missing == 0


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
        hardware: The hardware to run on; for a CPU, only the mesh of one device is planned. None
            plans without memory to compare with.
        config: The model.
        context: Tokens; by default the model's longest.
        slots: Sequences at a time.
        kv: Type of keys and values.
        compute: Type of computation; by default the best for the hardware.

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
    """The plan for a checkpoint's weights on a mesh.

    Args:
        hardware: The hardware to run on, or None.
        weights: The weights, spread over the mesh.
        terms: Context, types and slots.
        is_mapped: Whether a CPU can read weights from the mapped file when it needs them, without
            all of them in memory.
    """
    platform, mesh = hardware.platform if hardware else "gpu", weights.mesh
    needed = needs(
        weights.storage.config,
        mesh,
        terms,
        weights=max(weights.stored),
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
    residence = None
    if is_paged and memory is not None and mesh.size == 1:
        config, (experts,) = weights.storage.config, weights.experts
        residence = place(config, needed, experts=experts, memory=memory)
    shared = None
    if hardware and hardware.decode_rate and terms.slots > 1 and not is_paged:
        shared = 1 / step_of(hardware, weights, terms, sequences=terms.slots).total_s
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
        load_s=sum(weights.stored) / rate if rate and not is_paged else None,
        tokens_per_s=_speed(hardware, weights, terms, room, residence) if hardware else None,
        residence=residence,
        first_token_s=residence.swept / rate if residence and rate else None,
        step=step_of(hardware, weights, terms) if hardware else None,
        shared_tokens_per_s=shared,
    )


def _speed(
    hardware: Hardware,
    weights: Spread,
    terms: Terms,
    room: int | None,
    residence: Residence | None,
) -> float | None:
    """Tokens a second of one sequence; None if the rate of memory or disk is unknown."""
    if not hardware.decode_rate:
        return None
    if residence is not None:
        if not hardware.read_rate:
            return None
        return 1 / residence.seconds(read_rate=hardware.read_rate, decode_rate=hardware.decode_rate)
    missed = 0.0 if room is None else weights.mesh.size * missed_bytes(weights, room)
    if not missed:
        return 1 / step_of(hardware, weights, terms).total_s
    if not hardware.read_rate:
        return None
    in_memory = sum(weights.read) - missed
    return 1 / (in_memory / hardware.decode_rate + missed / hardware.read_rate)


def step_of(
    hardware: Hardware,
    weights: Spread,
    terms: Terms,
    *,
    sequences: int = 1,
    bandwidth: float = 1e12,
) -> StepTime:
    """The estimated time of the last token of a context, with all weights in memory.

    The device that reads most decides the time of reading. Virtual devices of a CPU share its
    memory; its keys and values are not counted: at the longest context of Grok-1 they add a
    twentieth at most.

    Args:
        hardware: The hardware.
        weights: The weights, spread over a mesh.
        terms: The context, and the type of its keys and values.
        sequences: That get a token each in the same step.
        bandwidth: Bandwidth to assume if the hardware's is unknown, for comparisons.
    """
    config, mesh, platform = weights.storage.config, weights.mesh, hardware.platform
    if platform == "cpu":
        nbytes = sum(read_bytes(weights, sequences))
    else:
        dtype = terms.cache_dtype
        seen = cache_bytes(config, mesh, slots=sequences, past=terms.context, dtype=dtype)
        nbytes = max(read_bytes(weights, sequences)) + seen
    return step_time(
        counts_of(config, mesh, platform=platform),
        nbytes=nbytes,
        rate=hardware.decode_rate or bandwidth * reached(platform),
        sums_s=sums_s(config, mesh, platform=platform, has_fast_links=hardware.has_fast_links),
        platform=platform,
    )


def examples(plan: Plan) -> tuple[Published, ...]:
    """Published accelerators that hold a plan, one for each device of its mesh.

    GPUs first, which come in any number, and the smallest first. A plan for a CPU counts as one for
    an accelerator.
    """
    holding = (
        kind
        for kind in PUBLISHED
        if usable(kind.memory, platform=kind.platform) >= plan.needs.total
    )
    return tuple(sorted(holding, key=lambda kind: (kind.platform != "gpu", kind.memory)))


def hardware_of(machine: Machine) -> Hardware:
    """A machine's hardware for a model: accelerators that JAX can use, or else its CPU."""
    home = next((disk for disk in machine.disks if disk.purpose == "home"), None)
    rate = home.read_rate if home else None
    share = environment_share(machine.surroundings.variables)
    gpus_or_tpus = accelerated(machine.accelerators, is_whole=True, share=share, read_rate=rate)
    return gpus_or_tpus or Hardware(
        platform="cpu",
        name=machine.cpu.model or "CPU",
        count=1,
        memory=machine.memory.usable,
        bandwidth=machine.cpu.bandwidth,
        is_measured=machine.cpu.bandwidth is not None,
        kernel_rate=None if machine.kernel is None else machine.kernel.rate,
        has_fast_bfloat16=machine.cpu.has_fast_bfloat16,
        read_rate=rate,
    )


def accelerated(
    accelerators: Sequence[Accelerator],
    *,
    is_whole: bool,
    share: float | None = None,
    read_rate: float | None = None,
) -> Hardware | None:
    """Accelerators as one kind of hardware, as large as the smallest; None if there are none.

    Args:
        accelerators: The accelerators.
        is_whole: Whether their memory is all of it, and not the share that JAX has taken.
        share: JAX's share, if the environment sets one.
        read_rate: Bytes a second of the disk.
    """
    if not accelerators:
        return None
    first = accelerators[0]
    known = published.match(first.name)
    sizes = [each.free for each in accelerators if each.free is not None]
    for each in accelerators:
        if each.memory is not None:
            taken = usable(each.memory, platform=each.platform, share=share)
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
    """Hardware by its numbers, such as that of another machine.

    Args:
        accelerator: A published accelerator, or `cpu`; by default, a GPU of unknown name.
        devices: Number of devices; by default that of the largest mesh, or one CPU.
        memory: Bytes of each device, if not the published size; of a CPU, its RAM.

    Raises:
        UsageError: The accelerator is unknown, or the memory is required.
        PlacementError: No mesh has this number of devices.
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
        # whether it multiplies bfloat16 fast is unknown: plans take it, which needs less memory
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
