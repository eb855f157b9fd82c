"""Checks of accelerators: found by JAX, free, fast enough, and linked."""

from collections import Counter
from collections.abc import Iterator
from typing import Final

from grokctl.checks import Check, Status
from grokctl.diagnosis.software import INSTALL, numbers, plugins
from grokctl.machine.facts import Accelerator, Found, Machine
from grokctl.model.config import GROK_1
from grokctl.text import format_bytes

ON_CPU: Final = "JAX_PLATFORMS=cpu grokctl run -p 'Once upon a time'"
_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
IMAGINED: Final = "grokctl doctor --accelerator h100-80gb --devices 8"
_VIRTUAL: Final = "JAX_NUM_CPU_DEVICES"
_OLDEST_CUDA: Final = 12
"""Major version: JAX has no older plugin."""
_FAST_BFLOAT16: Final = (8, 0)
"""The first compute capability of GPUs that multiply bfloat16."""
_OWN_SHARE: Final = 0.04
"""The share of memory that an idle driver uses; a display uses about as much."""
_SUMS: Final = 2 * GROK_1.num_layers
"""Sums over all devices per token: after attention and after the experts of each layer."""


def driver(machine: Machine) -> Iterator[Check]:
    """Whether the NVIDIA driver answers, and is new enough."""
    nvml, name = machine.nvml, "NVIDIA driver"
    if nvml.found is Found.ABSENT:
        yield Check(name, Status.SKIP, "not installed")
        return
    if nvml.found is not Found.OK:
        detail = "does not answer" if nvml.found is Found.SILENT else f"fails: {_line(nvml.error)}"
        status = Status.WARN if machine.jax.accelerators else Status.FAIL
        yield Check(name, status, detail, "nvidia-smi  # if it fails: sudo reboot")
        return
    cuda = numbers(nvml.cuda)[:1]
    version = (
        f"{nvml.driver or 'unknown version'}, supports CUDA {nvml.cuda or '(unknown version)'}"
    )
    if cuda and cuda[0] < _OLDEST_CUDA:
        detail = f"{version}, JAX needs {_OLDEST_CUDA} or newer: install a newer driver"
        yield Check(name, Status.FAIL, detail)
        return
    needed = {major for plugin in plugins(machine) if (major := _cuda_of(plugin)) is not None}
    if cuda and needed and min(needed) > cuda[0]:
        detail = f"{version}, JAX's plugin needs CUDA {min(needed)}"
        yield Check(name, Status.FAIL, detail, INSTALL)
        return
    yield Check(name, Status.OK, version)


def _cuda_of(plugin: str) -> int | None:
    """The major version of CUDA that a plugin is for."""
    digits = plugin.removeprefix("jax-cuda").partition("-")[0]
    return int(digits) if digits.isdecimal() and digits.isascii() else None


def jax(machine: Machine) -> Iterator[Check]:
    """Whether JAX starts."""
    report, variables = machine.jax, machine.surroundings.variables
    platforms = variables.get("JAX_PLATFORMS", "")
    match report.found:
        case Found.OK:
            platform = report.platform or "an unknown platform"
            yield Check("JAX", Status.OK, f"starts in {report.seconds:.1f} s on {platform}")
        case Found.ABSENT:
            yield Check("JAX", Status.FAIL, "is not installed", INSTALL)
        case Found.SILENT:
            detail = f"did not answer in {report.seconds:.0f} s"
            fix = f"unset JAX_PLATFORMS; {ON_CPU}" if platforms == "cpu" else ON_CPU
            if _VIRTUAL in variables:  # JAX creates a large number of them one by one
                fix = f"unset {_VIRTUAL}"
            yield Check("JAX", Status.FAIL, detail, fix)
        case Found.FAILED:
            error = report.error.upper()  # JAX may write its own names in lower case
            blamed = next((name for name in variables if name.upper() in error), "")
            blamed = blamed or ("JAX_PLATFORMS" if platforms else "")
            detail = f"does not start: {_line(report.error)}"
            yield Check("JAX", Status.FAIL, detail, f"unset {blamed}" if blamed else ON_CPU)


def idle(machine: Machine) -> tuple[Accelerator, ...]:
    """GPUs that the driver sees and JAX cannot use, because something is broken."""
    if machine.accelerators or _hiding(machine):
        return ()
    return machine.nvml.gpus


def _hiding(machine: Machine) -> str:
    """The environment variable that hides all GPUs from JAX, if there is one."""
    variables = machine.surroundings.variables
    platforms = variables.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return "JAX_PLATFORMS"
    return _VISIBLE if variables.get(_VISIBLE) in {"", "-1", "NoDevFiles"} else ""


def accelerators(machine: Machine) -> Iterator[Check]:
    """The accelerators that JAX can use, or why it cannot use those of the driver."""
    usable, gpus = machine.accelerators, machine.nvml.gpus
    name = "accelerators"
    if machine.jax.found is not Found.OK:
        seen = f"{_kinds(gpus)} seen by the driver; " if gpus else ""
        yield Check(name, Status.SKIP, f"{seen}JAX cannot list them")
    elif usable:
        total = sum(gpu.memory or 0 for gpu in usable)
        memory = f", {format_bytes(total)} of memory together" if total else ""
        yield Check(name, Status.OK, f"{_kinds(usable)}{memory}")
    elif gpus:
        yield _unused(machine, f"{_kinds(gpus)} seen by the driver")
    else:
        yield Check(name, Status.WARN, "none: inference runs on the CPU, slowly", IMAGINED)


def _unused(machine: Machine, seen: str) -> Check:
    """GPUs that the driver sees and JAX does not."""
    name, variable = "accelerators", _hiding(machine)
    if variable:
        setting = f"{variable}={machine.surroundings.variables[variable]}"
        return Check(
            name, Status.WARN, f"{seen}, hidden from JAX by {setting}", f"unset {variable}"
        )
    if not plugins(machine):
        detail = f"{seen}, none by JAX: it has no plugin for CUDA"
        return Check(name, Status.FAIL, detail, INSTALL)
    reason = f": {_line(machine.jax.error)}" if machine.jax.error else ""
    look = "python -c \"import jax; print(jax.devices('cuda'))\"  # shows the error"
    return Check(name, Status.FAIL, f"{seen}, none by JAX{reason}", look)


def hidden(machine: Machine) -> Iterator[Check]:
    """Whether some are hidden from this process."""
    used, seen = len(machine.jax.accelerators), len(machine.nvml.gpus)
    if machine.jax.platform != "gpu" or not 0 < used < seen:
        return
    visible = machine.surroundings.variables.get(_VISIBLE)
    if visible is None:
        detail = f"JAX uses {used} of {seen} GPUs that the driver sees"
        yield Check("all of them", Status.WARN, detail, "nvidia-smi -L")
        return
    detail = f"{_VISIBLE}={visible} leaves {used} of {seen} GPUs"
    cluster = machine.surroundings.cluster
    if cluster:
        yield Check("all of them", Status.OK, f"{detail}, as assigned by {cluster}")
    else:
        yield Check("all of them", Status.WARN, detail, f"unset {_VISIBLE}")


def mixed(machine: Machine) -> Iterator[Check]:
    """Whether they are all of one model: the smallest and slowest limits the mesh."""
    kinds = Counter(gpu.name for gpu in machine.accelerators)
    if len(kinds) < 2:  # noqa: PLR2004 (one kind, or none)
        return
    most = kinds.most_common(1)[0][0]
    numbered = [str(index) for index in range(len(machine.accelerators))]
    visible = machine.surroundings.variables.get(_VISIBLE, "").split(",")
    names = visible if len(visible) == len(numbered) else numbered
    named = zip(names, machine.accelerators, strict=True)
    chosen = [name.strip() for name, gpu in named if gpu.name == most]
    platform = machine.jax.platform
    fix = f"export {_VISIBLE}={','.join(chosen)}" if platform == "gpu" else ""
    detail = f"{_kinds(machine.accelerators)}: the smallest and slowest of them limits a mesh"
    yield Check("one kind", Status.WARN, detail, fix)


def in_use(machine: Machine) -> Iterator[Check]:
    """Whether other processes use their memory."""
    known = [
        (index, gpu.memory, gpu.memory - gpu.free)
        for index, gpu in enumerate(machine.accelerators)
        if gpu.memory and gpu.free is not None
    ]
    taken = [item for item in known if item[2] > item[1] * _OWN_SHARE]
    if not known:
        return
    if not taken:
        yield Check("free memory", Status.OK, "no other process uses it")
        return
    index, memory, used = max(taken, key=lambda item: item[2])
    detail = (
        f"device {index}: other processes use {format_bytes(used)} of {format_bytes(memory)}"
        + (f", and {len(taken) - 1} more devices" if len(taken) > 1 else "")
    )
    yield Check("free memory", Status.WARN, detail, "nvidia-smi  # lists the processes")


def capability(machine: Machine) -> Iterator[Check]:
    """Whether they support bfloat16."""
    known = [gpu.compute_capability for gpu in machine.accelerators if gpu.compute_capability]
    if not known:
        return
    least = min(known)
    version = f"compute capability {least[0]}.{least[1]}"
    if least >= _FAST_BFLOAT16:
        yield Check("bfloat16", Status.OK, f"{version} supports it")
        return
    wanted = f"{_FAST_BFLOAT16[0]}.{_FAST_BFLOAT16[1]}"
    detail = f"{version}, expected {wanted} or newer: float32 is as fast and more exact"
    fix = "grokctl run --compute float32 -p 'Once upon a time'"
    yield Check("bfloat16", Status.WARN, detail, fix)


def links(machine: Machine) -> Iterator[Check]:
    """How they are linked."""
    gpus = machine.accelerators
    if len(gpus) < 2:  # noqa: PLR2004 (nothing to link)
        return
    known = {gpu.has_nvlink for gpu in gpus}
    if known == {True}:
        yield Check("links", Status.OK, "NVLink between them")
    elif False in known:
        traffic = _SUMS * GROK_1.emb_size * 4
        detail = (
            f"PCIe only: {_SUMS} sums over all devices per token, "
            f"{format_bytes(traffic)} per prompt token"
        )
        yield Check("links", Status.WARN, detail, "nvidia-smi topo -m  # shows the topology")
    else:
        yield Check("links", Status.SKIP, "unknown")


def _kinds(gpus: tuple[Accelerator, ...]) -> str:
    """`8 x NVIDIA H100 80GB HBM3 (85.5 GB)`, for each model."""
    kinds = Counter((gpu.name, gpu.memory) for gpu in gpus)
    return ", ".join(
        f"{count} x {name or 'unnamed device'}" + (f" ({format_bytes(memory)})" if memory else "")
        for (name, memory), count in kinds.items()
    )


def _line(error: str) -> str:
    """The last line of an error."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


CHECKS: Final = (driver, jax, accelerators, hidden, mixed, in_use, capability, links)
