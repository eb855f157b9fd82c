"""Show what `doctor` found."""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Final

from grokctl.checks import Check, Status
from grokctl.diagnosis import machine_report as particulars
from grokctl.diagnosis.outlook import Ability
from grokctl.diagnosis.redaction import Redaction
from grokctl.doctor import Diagnosis, Group
from grokctl.errors import HardwareError
from grokctl.machine.facts import Machine
from grokctl.model.placement import MeshShape
from grokctl.planning.plans import Hardware, Plan, examples
from grokctl.screen.console import Console, Mark, Stack
from grokctl.text import format_bytes, format_number, format_seconds

_PARTS: Final = ("weights", "cache", "workspace")
_ANSWERS: Final = {Status.OK: "yes", Status.WARN: "yes", Status.FAIL: "no"}
_ANSWER: Final = re.compile("^(yes|no)[:,]? ")
_VARIABLE: Final = re.compile("[A-Z]+(_[A-Z0-9]+)+")


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
        for title, facts in particulars.facts(machine, redact):
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
    memory = found.hardware.memory
    room = "unknown" if memory is None else format_bytes(memory)
    return HardwareError(
        f"{what}: a run may take {room} of each, and needs at least "
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
        "machine": None if machine is None else particulars.values(machine, redact),
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
