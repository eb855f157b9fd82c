"""Show what `doctor` found."""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from grokctl.checks import Check, Status
from grokctl.console import Console, Mark, Stack
from grokctl.diagnosis.outlook import Ability
from grokctl.doctor import Diagnosis, Group
from grokctl.errors import HardwareError
from grokctl.machine.facts import Accelerator, Disk, Found, Machine, Memory
from grokctl.model.placement import MeshShape
from grokctl.plans import Hardware, Plan, examples
from grokctl.redaction import Redaction
from grokctl.units import format_bytes, format_number, format_rate, format_seconds

Facts = list[tuple[str, str]]

_PARTS: Final = ("weights", "cache", "workspace")
_ANSWERS: Final = {Status.OK: "yes", Status.WARN: "yes", Status.FAIL: "no"}
_ANSWER: Final = re.compile("^(yes|no)[:,]? ")
_VARIABLE: Final = re.compile("[A-Z]+(_[A-Z0-9]+)+")
_VERSION: Final = re.compile(r"[0-9][\w.+!-]{0,40}")
_VERSIONS: Final = frozenset({"driver", "cuda", "grokctl", "python", "packages"})
"""Fields that hold versions, of which some look like addresses."""


def show(
    console: Console,
    found: Diagnosis,
    machine: Machine | None,
    redact: Redaction,
    *,
    is_full: bool,
) -> None:
    """Print a diagnosis.

    Args:
        console: Where.
        found: What is to be said.
        machine: What it was made of, never shown without redaction; None if it is about another.
        redact: Takes out what must not be seen by strangers.
        is_full: Whether to show the machine, too; `--json` always does.
    """
    if console.as_json:
        console.emit(_values(found, machine, redact))
        return
    if is_full and machine is not None:
        for title, facts in _machine(machine, redact):
            console.facts(title, facts)
    console.checks([(group.title, group.checks) for group in found.groups])
    _plans(console, found)
    abilities = [_as_check(ability) for ability in found.abilities]
    console.checks([("what you can do now", abilities)], words=_ANSWERS)


def redacted(found: Diagnosis, redact: Redaction) -> Diagnosis:
    """A diagnosis that strangers may read."""
    groups = tuple(
        Group(
            group.title,
            tuple(
                replace(check, detail=_detail(check, redact), fix=redact(check.fix))
                for check in group.checks
            ),
        )
        for group in found.groups
    )
    abilities = tuple(
        replace(ability, detail=redact(ability.detail), command=redact(ability.command))
        for ability in found.abilities
    )
    hardware = replace(found.hardware, name=redact(found.hardware.name))
    return replace(found, groups=groups, abilities=abilities, hardware=hardware)


def _detail(check: Check, redact: Redaction) -> str:
    is_variable = _VARIABLE.fullmatch(check.name) is not None
    return redact.variable(check.name, check.detail) if is_variable else redact(check.detail)


def failure(found: Diagnosis) -> HardwareError:
    """The one sentence for a diagnosis that is not ok."""
    for group in found.groups:
        for check in group.checks:
            if check.status is Status.FAIL:
                return HardwareError(f"{check.name}: {check.detail}", check.fix or None)
    plans = [plan for plan in found.plans if plan.is_possible]
    least = min(plans, key=lambda plan: plan.missing, default=None)
    what = described(found.hardware)
    if least is None:
        return HardwareError(f"{what}: no mesh has that many devices")
    return HardwareError(
        f"{what}: a run may take {_bytes(found.hardware.memory)} of each, and needs at least "
        f"{format_bytes(least.needs.total)} ({least.precision} on {least.mesh})",
        "grokctl doctor --accelerator h100-80gb --devices 8",
    )


def described(hardware: Hardware) -> str:
    """`8 x H100 80GB`, or a CPU's name."""
    if hardware.platform == "cpu":
        return hardware.name
    return f"{hardware.count} x {hardware.name}"


def _as_check(ability: Ability) -> Check:
    said = _ANSWER.sub("", ability.detail, count=1)  # the word beside it says so
    return Check(ability.name, ability.status, said, ability.command)


# --json


def _values(found: Diagnosis, machine: Machine | None, redact: Redaction) -> dict[str, Any]:
    hardware = found.hardware
    return {
        "ok": found.is_ok,
        "checks": [
            {"group": group.title, **asdict(check)}
            for group in found.groups
            for check in group.checks
        ],
        "hardware": {
            "platform": hardware.platform,
            "name": hardware.name,
            "count": hardware.count,
            "memory_bytes": hardware.memory,
            "bandwidth_bytes_per_s": hardware.bandwidth,
            "is_measured": hardware.is_measured,
        },
        "is_here": found.is_here,
        "plans": [_plan_values(plan) for plan in found.plans],
        "best": None if found.best is None else _plan_values(found.best),
        "abilities": [asdict(ability) for ability in found.abilities],
        "machine": None if machine is None else _plain(machine, redact),
    }


def _plan_values(plan: Plan) -> dict[str, Any]:
    return {
        "devices": plan.mesh.size,
        "mesh": str(plan.mesh),
        "precision": plan.precision,
        "compute": plan.compute,
        "kv": plan.kv,
        "context": plan.context,
        "streams": plan.streams,
        "bytes_per_device": plan.needs.total,
        "weights_bytes": plan.needs.weights,
        "cache_bytes": plan.needs.cache,
        "workspace_bytes": plan.needs.workspace,
        "memory_bytes": plan.memory,
        "fits": plan.fits,
        "missing_bytes": plan.missing,
        "is_paged": plan.is_paged,
        "load_s": plan.load_s,
        "tokens_per_s": plan.tokens_per_s,
    }


def _plain(value: object, redact: Redaction, name: str = "") -> Any:
    """What JSON can hold of a value, with nothing private in any of its texts."""
    if is_dataclass(value):
        named = ((field.name, getattr(value, field.name)) for field in fields(value))
        return {key: _plain(part, redact, key) for key, part in named}
    if isinstance(value, Mapping):
        if name == "variables":
            return {redact(key): redact.variable(key, text) for key, text in value.items()}
        return {redact(key): _plain(part, redact, name) for key, part in value.items()}
    if isinstance(value, tuple):
        return [_plain(part, redact, name) for part in value]
    if isinstance(value, str | Path):  # and what is an enumeration of texts
        text = str(value)
        return text if name in _VERSIONS and _VERSION.fullmatch(text) else redact(text)
    return value


# plans


def _plans(console: Console, found: Diagnosis) -> None:
    known = [plan for plan in found.plans if plan.is_possible or plan.memory is not None]
    possible = sorted((plan for plan in known if plan.is_possible), key=_rank)
    best = found.best or next(iter(possible), None)
    if found.hardware.platform != "cpu":
        _matrix(console, found.hardware, known)
    running = [plan for plan in possible if plan.fits]
    if best is not None and best.fits:
        running = [best, *(plan for plan in running if plan != best)]
    _speeds(console, found.hardware, running)
    if best is not None:
        _bars(console, best, found.hardware)
    if found.hardware.platform == "cpu":  # of accelerators, the table above says it
        _elsewhere(console, [plan for plan in found.plans if plan not in known])


def _rank(plan: Plan) -> tuple[object, ...]:
    """Smaller is better; where nothing fits, what misses least."""
    return plan.missing, *plan.drawbacks, -(plan.tokens_per_s or 0), plan.mesh.size


def _matrix(console: Console, hardware: Hardware, plans: Sequence[Plan]) -> None:
    """What fits: a row for each mesh, a column for each precision."""
    precisions = list(dict.fromkeys(plan.precision for plan in plans))
    cells = {(plan.mesh, plan.precision): _fit(plan) for plan in plans}
    console.table(
        f"what fits on {described(hardware)}, {_room(hardware)}",
        ("devices", *precisions),
        [
            (_mesh(mesh), *(cells.get((mesh, precision), "") for precision in precisions))
            for mesh in dict.fromkeys(plan.mesh for plan in plans)
        ],
        optional=precisions[:1:-1],
    )


def _room(hardware: Hardware) -> str:
    if hardware.memory is None:
        return "of which nobody says how much memory they have"
    memory = format_bytes(hardware.memory)
    if hardware.platform == "cpu":
        return f"with {memory} of memory for a run"
    return f"with {memory} for a run" + (" on each" if hardware.count > 1 else "")


def _mesh(mesh: MeshShape) -> str:
    return str(mesh.size) if mesh.expert == 1 else f"{mesh.expert} x {mesh.model}"


def _fit(plan: Plan) -> Mark:
    needed = format_bytes(plan.needs.total)
    if plan.memory is None:
        return Mark(Status.SKIP, "may fit", needed)
    if plan.missing:
        return Mark(Status.FAIL, f"lacks {format_bytes(plan.missing)}", needed)
    if plan.is_paged:
        return Mark(Status.WARN, "from disk", needed)
    if not plan.is_possible:
        return Mark(Status.SKIP, "would fit", needed)
    return Mark(Status.OK, "fits", needed)


def _speeds(console: Console, hardware: Hardware, running: Sequence[Plan]) -> None:
    """How fast what runs would be, the best first: estimates, and called so."""
    if not running:
        return
    title = f"what runs on {described(hardware)}"
    if hardware.platform == "cpu":
        title += f", {_room(hardware)}"
    terms = f"{format_number(running[0].streams, 'stream')} of {running[0].context:,} tokens"
    columns: dict[str, list[str | Mark]] = {}
    if hardware.platform != "cpu":
        columns["mesh"] = [str(plan.mesh) for plan in running]
    columns["precision"] = [plan.precision for plan in running]
    columns["compute"] = [plan.compute for plan in running]
    if len({plan.context for plan in running}) > 1:
        terms = format_number(running[0].streams, "stream")
        columns["context"] = [f"{plan.context:,}" for plan in running]
    columns["needed"] = [format_bytes(plan.needs.total) for plan in running]
    if running[0].streams > 1:
        terms += ", speeds are those of one alone"
    columns[""] = [replace(_fit(plan), first="") for plan in running]
    if any(plan.load_s is not None for plan in running):
        columns["load, about"] = [_known_seconds(plan.load_s) for plan in running]
    if any(plan.tokens_per_s is not None for plan in running):
        columns["tokens/s, about"] = [_pace(plan.tokens_per_s) for plan in running]
    console.table(
        f"{title}: {terms}",
        tuple(columns),
        list(zip(*columns.values(), strict=True)),
        right=("context", "needed", "load, about", "tokens/s, about"),
        optional=("compute",),
    )


def _known_seconds(seconds: float | None) -> str:
    return "?" if seconds is None else format_seconds(seconds)


def _pace(rate: float | None) -> str:
    if rate is None:
        return "?"
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"  # noqa: PLR2004  # two digits


def _bars(console: Console, plan: Plan, hardware: Hardware) -> None:
    """What each device would hold; those that hold the same share a bar."""
    needs, room = plan.needs, plan.memory
    if room is None:
        return
    parts = (needs.weights, needs.cache, needs.workspace)
    numbers = " + ".join(f"{part / 1e9:,.1f}" for part in parts)
    label = f"device 0-{plan.mesh.size - 1}" if plan.mesh.size > 1 else "device 0"
    title = f"what a device holds: {plan.precision} on {plan.mesh}"
    if hardware.platform == "cpu":
        label, title = "memory", f"what memory holds: {plan.precision} on the CPU"
    stack = Stack(label, parts, room, f"{numbers} of {room / 1e9:,.1f} GB")
    console.stacked(title, _PARTS, "free", [stack])


def _elsewhere(console: Console, plans: Sequence[Plan]) -> None:
    """What hardware would be needed."""
    if not plans:
        return
    by_place = {(plan.mesh, plan.precision): plan for plan in plans}
    precisions = list(dict.fromkeys(plan.precision for plan in plans))
    named = [f"such as, for {precision}" for precision in precisions[:2]]
    rows = []
    for mesh in dict.fromkeys(plan.mesh for plan in plans):
        row = [by_place.get((mesh, precision)) for precision in precisions]
        needed = ("" if plan is None else format_bytes(plan.needs.total) for plan in row)
        rows.append((_mesh(mesh), *needed, *map(_example, row[: len(named)])))
    console.table(
        "what accelerators would need, on each",
        ("devices", *precisions, *named),
        rows,
        right=precisions,
        optional=named[::-1],
    )


def _example(plan: Plan | None) -> str:
    found = examples(plan) if plan is not None else ()
    return found[0].label if found else "none"


# -v


def _machine(machine: Machine, redact: Redaction) -> Iterable[tuple[str, Facts]]:
    """All that was found, as names and values without anything private."""
    software, cpu, memory, network = (
        machine.software,
        machine.cpu,
        machine.memory,
        machine.network,
    )
    yield (
        "software",
        [
            ("grokctl", software.grokctl),
            ("python", _known(software.python, redact)),
            ("system", redact(software.system)),
            *((redact(name), _known(text, redact)) for name, text in software.packages.items()),
        ],
    )
    yield "accelerators", _accelerators(machine, redact)
    yield (
        "processor",
        [
            ("model", redact(cpu.model)),
            ("architecture", redact(cpu.architecture)),
            ("cores", str(cpu.cores)),
            ("flags", redact(" ".join(cpu.flags)) or "none that matter"),
            ("reads memory at", _rate(cpu.bandwidth)),
        ],
    )
    yield (
        "memory",
        [
            ("total", format_bytes(memory.total)),
            ("available", format_bytes(memory.available)),
            ("cgroup", _cgroup(memory)),
            ("shared memory", _bytes(memory.shm, "none")),
        ],
    )
    yield "disks", [fact for disk in machine.disks for fact in _disk(disk, redact)]
    surroundings = machine.surroundings
    yield (
        "surroundings",
        [
            ("cluster", redact(surroundings.cluster) or "none"),
            ("processes", f"{surroundings.processes}, {surroundings.local_processes} of them here"),
            *(
                (redact(name), redact.variable(name, value) or "empty")
                for name, value in surroundings.variables.items()
            ),
        ],
    )
    yield (
        "network and limits",
        [
            ("proxy", redact(network.proxy) or "none"),
            ("certificates", redact(network.certificates) or "none"),
            ("torrent port", "none" if network.port is None else str(network.port)),
            *([("error", redact(network.error))] if network.error else []),
            (
                "open files",
                f"{_count(machine.open_files)}, at most {_count(machine.open_files_most)}",
            ),
            ("address space", _bytes(machine.address_space, "no limit")),
        ],
    )


def _cgroup(memory: Memory) -> str:
    if memory.limit is None:
        return "no limit"
    return f"{format_bytes(memory.used)} of {format_bytes(memory.limit)} used"


def _accelerators(machine: Machine, redact: Redaction) -> Facts:
    nvml, jax = machine.nvml, machine.jax
    driver = f"{_known(nvml.driver, redact)}, CUDA {_known(nvml.cuda, redact)}"
    facts = [
        ("NVIDIA driver", driver if nvml.found is Found.OK else nvml.found.value),
        ("JAX", f"{jax.platform or jax.found} in {jax.seconds:.1f} s"),
    ]
    errors = (("driver says", nvml.error), ("JAX says", jax.error))
    facts += [(name, redact(error)) for name, error in errors if error]
    place = 0
    for device, alike in groupby(machine.accelerators):
        last = place + len(list(alike)) - 1
        name = f"device {place}" if last == place else f"device {place}-{last}"
        facts.append((name, redact(_accelerator(device))))
        place = last + 1
    return facts


def _accelerator(device: Accelerator) -> str:
    parts = [device.name, f"{_bytes(device.memory)}, {_bytes(device.free)} free"]
    if device.compute_capability:
        parts.append("compute capability {}.{}".format(*device.compute_capability))
    if device.has_nvlink is not None:
        parts.append("NVLink" if device.has_nvlink else "no NVLink")
    return ", ".join(parts)


def _disk(disk: Disk, redact: Redaction) -> Facts:
    kind = redact(disk.file_system) or "unknown file system"
    speeds = f"writes {_rate(disk.write_rate)}, reads {_rate(disk.read_rate)}"
    facts = [
        (disk.purpose, redact(str(disk.path))),
        ("", f"{kind}{', remote' if disk.is_remote else ''}"),
        ("", f"{_bytes(disk.free)} free of {_bytes(disk.total)}"),
        ("", speeds if disk.is_writable else "cannot be written"),
    ]
    return [*facts, ("", redact(disk.error))] if disk.error else facts


def _count(limit: int) -> str:
    return "no limit" if limit == sys.maxsize else f"{limit:,}"


def _known(version: str, redact: Redaction) -> str:
    return version if _VERSION.fullmatch(version) else redact(version) or "unknown"


def _bytes(count: int | None, nothing: str = "unknown") -> str:
    return nothing if count is None else format_bytes(count)


def _rate(rate: float | None) -> str:
    return "an unknown rate" if rate is None else format_rate(rate)
