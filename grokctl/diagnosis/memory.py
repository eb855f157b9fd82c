"""Checks of the processor and of main memory, for inference on the CPU."""

from collections.abc import Iterator
from typing import Final

from grokctl.checks import Check, Status
from grokctl.diagnosis.accelerators import idle
from grokctl.diagnosis.inventory import ready_nbytes
from grokctl.machine.facts import Found, Machine, Memory
from grokctl.model.placement import MESH_SIZES, MeshShape
from grokctl.model.precision import Precision
from grokctl.planning.plans import REACHED
from grokctl.text import format_bytes, format_number, format_rate

_SHARED: Final = "/dev/shm"  # noqa: S108  # only its name: nothing is written there
_ENOUGH_SHARED: Final = 2**30
"""Bytes of /dev/shm that NVIDIA recommends when GPUs communicate through it."""
_UNITS: Final = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve2", "sve", "asimd")
"""Instruction sets that decide the speed of products, best first."""
_ALONE: Final = MeshShape(1, 1)


def processor(machine: Machine) -> Iterator[Check]:
    """Its model, cores and instruction sets."""
    cpu = machine.cpu
    detail = f"{cpu.model or 'unknown'}, {format_number(cpu.cores, 'core')}, {cpu.architecture}"
    decisive = [flag for flag in _UNITS if flag in cpu.flags]
    units = f", {' '.join(decisive)}" if decisive else ""
    yield Check("processor", Status.OK, f"{detail}{units}")
    if machine.accelerators:
        return
    if "amx_bf16" in cpu.flags:
        yield Check("matrix unit", Status.OK, "AMX: multiplies bfloat16")
    elif cpu.has_fast_bfloat16:
        yield Check("matrix unit", Status.OK, "none, but dot products of bfloat16")
    else:
        yield Check("matrix unit", Status.OK, "none for bfloat16: operands are float32")


def bandwidth(machine: Machine) -> Iterator[Check]:
    """The bandwidth of memory, which decides the speed of decoding."""
    rate = machine.cpu.bandwidth
    if rate is None:
        yield Check("bandwidth", Status.SKIP, "not measured")
    else:
        yield Check("bandwidth", Status.OK, f"{format_rate(rate)}, measured")


def kernel(machine: Machine) -> Iterator[Check]:
    """Whether the native kernel multiplies; accelerators do not need it."""
    found, name = machine.kernel, "kernel"
    if found is None or machine.accelerators:
        return
    if found.found is Found.OK:
        rate = "" if found.rate is None else f", reads weights at {format_rate(found.rate)}"
        yield Check(name, Status.OK, f"native, {found.instruction_set}{rate}")
        return
    cost = f"XLA multiplies, decoding reaches {REACHED:.0%} of the bandwidth instead of more"
    status = Status.WARN if found.fix else Status.SKIP
    yield Check(name, status, f"none: {found.reason}; {cost}", found.fix)


def nodes(machine: Machine) -> Iterator[Check]:
    """Whether one process would read the memory of several nodes."""
    found, name = machine.nodes, "memory nodes"
    if len(found) < 2:  # noqa: PLR2004 (nothing to choose from)
        return
    each = ", ".join(
        f"{node.number} (cores {node.cores}"
        + (")" if node.memory is None else f", {format_bytes(node.memory)})")
        for node in found
    )
    detail = f"{len(found)}: {each}"
    used = [node for node in found if node.usable]
    if machine.accelerators or len(used) < 2:  # noqa: PLR2004 (bound to one)
        yield Check(name, Status.OK, detail)
        return
    count = max(size for size in MESH_SIZES if size <= len(used))
    numbers = " ".join(str(node.number) for node in used[:count])
    fix = (
        f"for n in {numbers}; do numactl --cpunodebind=$n --preferred=$n grokctl run"
        " -p 'Once upon a time' --coordinator localhost:61500"
        f" --num-processes {count} --process-id $n & done; wait"
    )
    yield Check(name, Status.WARN, f"{detail}: one process waits for the other's memory", fix)


def memory(machine: Machine) -> Iterator[Check]:
    """Whether the weights fit; accelerators have their own memory."""
    here = machine.memory
    least, most = (ready_nbytes(kind, _ALONE) for kind in (Precision.INT4, Precision.INT8))
    have = f"{format_bytes(here.usable)} of {format_bytes(here.total)} are free"
    gpus = [gpu.memory for gpu in (*machine.accelerators, *idle(machine))]
    if gpus and (None in gpus or sum(filter(None, gpus)) >= least):
        detail = f"{have}: weights go to the accelerators, files are mapped"
        yield Check("memory", Status.OK, detail)
    elif here.usable >= most:
        yield Check("memory", Status.OK, f"{have}, Grok-1 needs {format_bytes(most)} at int8")
    else:
        needs = f"Grok-1 needs {format_bytes(most)} at int8, {format_bytes(least)} at int4"
        paged = "" if here.usable >= least else ": the rest is read from the disk for every token"
        fix = "grokctl reshard --devices 1 --precision int4"
        yield Check("memory", Status.WARN, f"{have}, {needs}{paged}", fix)


def limit(machine: Machine) -> Iterator[Check]:
    """Whether a cgroup limits memory."""
    here = machine.memory
    if here.limit is None:
        return
    usage = (
        f"the cgroup allows {format_bytes(here.limit)} of {format_bytes(here.total)}, "
        f"{format_bytes(here.used)} are used"
    )
    least = ready_nbytes(Precision.INT4, _ALONE)
    if machine.accelerators or not _binds(here, least):
        yield Check("memory limit", Status.OK, usage)
        return
    wanted = least * 11 // 10  # a tenth more than the weights
    fix = _raised(machine.surroundings.cluster, -(-wanted // 2**30))
    yield Check("memory limit", Status.WARN, f"{usage}: int4 needs {format_bytes(least)}", fix)


def _binds(memory: Memory, needed: int) -> bool:
    """Whether the machine has enough memory, and only the limit forbids it."""
    return memory.usable < needed <= memory.total


def _raised(cluster: str, gibibytes: int) -> str:
    match cluster:
        case "Slurm":
            return f"srun --mem={gibibytes}G grokctl run -p 'Once upon a time'"
        case "Kubernetes":
            return f"kubectl set resources deployment NAME --limits=memory={gibibytes}Gi"
        case _:
            return f"docker run --memory={gibibytes}g IMAGE grokctl run -p 'Once upon a time'"


def shared(machine: Machine) -> Iterator[Check]:
    """Whether GPUs without links have enough shared memory to communicate."""
    size, gpus = machine.memory.shm, machine.accelerators
    over_memory = len(gpus) > 1 and any(gpu.has_nvlink is False for gpu in gpus)
    if size is None:
        yield Check(_SHARED, Status.SKIP, "none; grokctl needs none")
    elif over_memory and size < _ENOUGH_SHARED:
        detail = (
            f"{format_bytes(size)}, expected {format_bytes(_ENOUGH_SHARED)}: "
            "GPUs without NVLink may talk through it"
        )
        yield Check(_SHARED, Status.WARN, detail, f"sudo mount -o remount,size=1g {_SHARED}")
    else:
        yield Check(_SHARED, Status.OK, f"{format_bytes(size)}; grokctl needs none of it")


CHECKS: Final = (processor, bandwidth, kernel, nodes, memory, limit, shared)
