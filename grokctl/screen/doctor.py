"""Print a diagnosis: checks, plans, and what can be done now."""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Final

from grokctl.checks import Check, Status
from grokctl.diagnosis import machine_report
from grokctl.diagnosis.outlook import Ability
from grokctl.diagnosis.redaction import Redaction
from grokctl.doctor import Diagnosis, Group
from grokctl.errors import HardwareError
from grokctl.machine.facts import Machine
from grokctl.model.placement import MeshShape
from grokctl.planning.plans import Hardware, Plan, examples
from grokctl.planning.residence import Residence
from grokctl.planning.step_time import KERNEL_REACHED, StepTime, reached
from grokctl.screen.console import Console
from grokctl.screen.residence import more_memory
from grokctl.screen.tables import StackedBar, StatusCell
from grokctl.text import format_bytes, format_number, format_rate, format_seconds

_PARTS: Final = ("weights", "cache", "workspace")
_CAUSES: Final = frozenset({"threads", "address space", "data segment", "open files"})
"""Checks of the limits of this process."""
_ANSWERS: Final = {Status.OK: "yes", Status.WARN: "yes", Status.FAIL: "no"}
_ANSWER: Final = re.compile("^(yes|no)[:,]? ")
_ASSUMED: Final = "assumed: nothing was measured on such a device"
_BASIS: Final = {
    "gpu": "operations and sums as counted in programs for an H100; nothing was measured on a GPU"
}
"""What is known of the times of a token."""
_VARIABLE: Final = re.compile("[A-Z]+(_[A-Z0-9]+)+")


def show(
    console: Console,
    diagnosis: Diagnosis,
    machine: Machine | None,
    redact: Redaction,
    *,
    is_full: bool,
) -> None:
    """Print a diagnosis.

    Args:
        console: Prints it.
        diagnosis: Of this machine, or of other hardware.
        machine: All facts about this machine, printed redacted; None for other hardware.
        redact: Removes private facts.
        is_full: Print the facts, too; `--json` always does.
    """
    if console.as_json:
        console.emit(_values(diagnosis, machine, redact))
        return
    if is_full and machine is not None:
        for title, facts in machine_report.facts(machine, redact):
            console.facts(title, facts)
    console.checks([(group.title, group.checks) for group in diagnosis.groups])
    _plans(console, diagnosis)
    abilities = [_as_check(ability) for ability in diagnosis.abilities]
    console.checks([("what you can do now", abilities)], words=_ANSWERS)


def redacted(diagnosis: Diagnosis, redact: Redaction) -> Diagnosis:
    """The diagnosis without private facts, for a bug report."""
    groups = tuple(
        Group(
            group.title,
            tuple(
                replace(check, detail=_detail(check, redact), fix=redact(check.fix))
                for check in group.checks
            ),
        )
        for group in diagnosis.groups
    )
    abilities = tuple(
        replace(ability, detail=redact(ability.detail), command=redact(ability.command))
        for ability in diagnosis.abilities
    )
    hardware = replace(diagnosis.hardware, name=redact(diagnosis.hardware.name))
    return replace(diagnosis, groups=groups, abilities=abilities, hardware=hardware)


def _detail(check: Check, redact: Redaction) -> str:
    is_variable = _VARIABLE.fullmatch(check.name) is not None
    return redact.variable(check.name, check.detail) if is_variable else redact(check.detail)


def failure(diagnosis: Diagnosis) -> HardwareError:
    """The error for a diagnosis that is not ok: its first failed check, or the missing memory.

    A limit of the process comes first: it is the cause of what else fails.
    """
    failed = [
        check for group in diagnosis.groups for check in group.checks if check.status is Status.FAIL
    ]
    failed.sort(key=lambda check: check.name not in _CAUSES)
    if failed:
        check = failed[0]
        return HardwareError(f"{check.name}: {check.detail}", check.fix or None)
    plans = [plan for plan in diagnosis.plans if plan.is_possible]
    least = min(plans, key=lambda plan: plan.missing, default=None)
    name = described(diagnosis.hardware)
    if least is None:
        return HardwareError(f"{name}: no mesh has that many devices")
    memory = diagnosis.hardware.memory
    available = "unknown" if memory is None else format_bytes(memory)
    return HardwareError(
        f"{name}: {available} available for a run on each, required at least "
        f"{format_bytes(least.needs.total)} ({least.precision} on {least.mesh})",
        "grokctl doctor --accelerator h100-80gb --devices 8",
    )


def described(hardware: Hardware) -> str:
    """`8 x H100 80GB`, or a CPU's name."""
    if hardware.platform == "cpu":
        return hardware.name
    return f"{hardware.count} x {hardware.name}"


def _as_check(ability: Ability) -> Check:
    detail = _ANSWER.sub("", ability.detail, count=1)  # the status is the answer
    return Check(ability.name, ability.status, detail, ability.command)


# --json


def _values(diagnosis: Diagnosis, machine: Machine | None, redact: Redaction) -> dict[str, Any]:
    hardware = diagnosis.hardware
    return {
        "ok": diagnosis.is_ok,
        "checks": [
            {"group": group.title, **asdict(check)}
            for group in diagnosis.groups
            for check in group.checks
        ],
        "hardware": {
            "platform": hardware.platform,
            "name": hardware.name,
            "count": hardware.count,
            "memory_bytes": hardware.memory,
            "bandwidth_bytes_per_s": hardware.bandwidth,
            "is_measured": hardware.is_measured,
            "kernel_bytes_per_s": hardware.kernel_rate,
        },
        "is_here": diagnosis.is_here,
        "plans": [_plan_values(plan) for plan in diagnosis.plans],
        "best": None if diagnosis.best is None else _plan_values(diagnosis.best),
        "abilities": [asdict(ability) for ability in diagnosis.abilities],
        "machine": None if machine is None else machine_report.values(machine, redact),
    }


def _plan_values(plan: Plan) -> dict[str, Any]:
    return {
        "devices": plan.mesh.size,
        "mesh": str(plan.mesh),
        "precision": plan.precision,
        "compute": plan.compute,
        "kv": plan.kv,
        "context": plan.context,
        "streams": plan.slots,
        "bytes_per_device": plan.needs.total,
        "weights_bytes": plan.needs.weights,
        "cache_bytes": plan.needs.cache,
        "workspace_bytes": plan.needs.workspace,
        "memory_bytes": plan.memory,
        "fits": plan.fits,
        "missing_bytes": plan.missing,
        "is_paged": plan.is_paged,
        "residence": None if plan.residence is None else _residence_values(plan.residence),
        "first_token_s": plan.first_token_s,
        "load_s": plan.load_s,
        "tokens_per_s": plan.tokens_per_s,
        "shared_tokens_per_s": plan.shared_tokens_per_s,
        "step": None if plan.estimate is None else _step_values(plan.estimate),
    }


def _residence_values(residence: Residence) -> dict[str, Any]:
    return {
        "pinned": residence.pinned,
        "experts": residence.experts,
        "transient": residence.transient,
        "expert_bytes": residence.expert_nbytes,
        "hit_rate": residence.hit_rate,
        "disk_bytes_per_token": int(residence.missed),
        "total_bytes": residence.total,
        "larger": [_larger_values(memory, larger) for memory, larger in residence.larger()],
    }


def _larger_values(memory: int, residence: Residence | None) -> dict[str, Any]:
    return {
        "memory_bytes": memory,
        "pinned": None if residence is None else residence.pinned,
        "disk_bytes_per_token": 0 if residence is None else int(residence.missed),
    }


def _step_values(step: StepTime) -> dict[str, Any]:
    return {
        "launches": step.counts.launches,
        "sums": step.counts.sums,
        "bytes": step.nbytes,
        "launches_s": step.launches_s,
        "sums_s": step.sums_s,
        "reading_s": step.reading_s,
        "ends_s": step.ends_s,
    }


# plans


def _plans(console: Console, diagnosis: Diagnosis) -> None:
    hardware = diagnosis.hardware
    known = [plan for plan in diagnosis.plans if plan.is_possible or plan.memory is not None]
    possible = sorted((plan for plan in known if plan.is_possible), key=_rank)
    best = diagnosis.best or next(iter(possible), None)
    if hardware.platform != "cpu":
        _matrix(console, hardware, known)
    fitting = [plan for plan in possible if plan.fits]
    if best is not None and best.fits:
        fitting = [best, *(plan for plan in fitting if plan != best)]
    _speeds(console, hardware, fitting)
    if fitting and hardware.platform != "cpu":
        _parts_of_speed(console, hardware, fitting[0])
    if best is not None:
        _bars(console, best, hardware)
    more_memory(console, possible, hardware)
    if hardware.platform == "cpu":  # for accelerators, the matrix shows it
        _elsewhere(console, [plan for plan in diagnosis.plans if plan not in known])


def _rank(plan: Plan) -> tuple[object, ...]:
    """Smaller is better; if nothing fits, the least missing memory comes first."""
    return plan.missing, *plan.drawbacks, -(plan.tokens_per_s or 0), plan.mesh.size


def _matrix(console: Console, hardware: Hardware, plans: Sequence[Plan]) -> None:
    """Print what fits: a row for each mesh, a column for each precision."""
    precisions = list(dict.fromkeys(plan.precision for plan in plans))
    cells = {(plan.mesh, plan.precision): _fit(plan) for plan in plans}
    console.table(
        f"what fits on {described(hardware)}, {_memory(hardware)}",
        ("devices", *precisions),
        [
            (_mesh(mesh), *(cells.get((mesh, precision), "") for precision in precisions))
            for mesh in dict.fromkeys(plan.mesh for plan in plans)
        ],
        optional=precisions[:1:-1],
    )


def _memory(hardware: Hardware) -> str:
    if hardware.memory is None:
        return "of unknown memory"
    memory = format_bytes(hardware.memory)
    if hardware.platform == "cpu":
        return f"with {memory} of memory for a run"
    return f"with {memory} for a run" + (" on each" if hardware.count > 1 else "")


def _mesh(mesh: MeshShape) -> str:
    return str(mesh.size) if mesh.expert == 1 else f"{mesh.expert} x {mesh.model}"


def _fit(plan: Plan) -> StatusCell:
    required = format_bytes(plan.needs.total)
    if plan.memory is None:
        return StatusCell(Status.SKIP, "may fit", required)
    if plan.missing:
        return StatusCell(Status.FAIL, f"lacks {format_bytes(plan.missing)}", required)
    if plan.is_paged:
        return StatusCell(Status.WARN, _from_disk(plan), required)
    if not plan.is_possible:
        return StatusCell(Status.SKIP, "would fit", required)
    return StatusCell(Status.OK, "fits", required)


def _from_disk(plan: Plan) -> str:
    """How much of a plan comes from the disk for every token."""
    if plan.residence is None:
        return "from disk"
    return f"{1 - plan.residence.hit_rate:.0%} from disk"


def _speeds(console: Console, hardware: Hardware, fitting: Sequence[Plan]) -> None:
    """Print estimated speeds of the plans that fit, the best first."""
    if not fitting:
        return
    title = f"what runs on {described(hardware)}"
    if hardware.platform == "cpu":
        title += f", {_memory(hardware)}"
    terms = f"{format_number(fitting[0].slots, 'sequence')} of {fitting[0].context:,} tokens"
    columns: dict[str, list[str | StatusCell]] = {}
    if hardware.platform != "cpu":
        columns["mesh"] = [str(plan.mesh) for plan in fitting]
    columns["precision"] = [plan.precision for plan in fitting]
    columns["compute"] = [plan.compute for plan in fitting]
    if len({plan.context for plan in fitting}) > 1:
        terms = format_number(fitting[0].slots, "sequence")
        columns["context"] = [f"{plan.context:,}" for plan in fitting]
    columns["memory"] = [format_bytes(plan.needs.total) for plan in fitting]
    slots = fitting[0].slots
    is_shared = any(plan.shared_tokens_per_s is not None for plan in fitting)
    if slots > 1:
        terms += ", speed of one alone" + (f" and of each of {slots}" if is_shared else "")
    columns[""] = [replace(_fit(plan), first="") for plan in fitting]
    if any(plan.load_s is not None for plan in fitting):
        columns["load, about"] = [_known_seconds(plan.load_s) for plan in fitting]
    if any(plan.first_token_s is not None for plan in fitting):
        columns["first, about"] = [_known_seconds(plan.first_token_s) for plan in fitting]
    if any(plan.tokens_per_s is not None for plan in fitting):
        columns["tokens/s, about"] = [_two_digits(plan.tokens_per_s) for plan in fitting]
    if is_shared:
        columns[f"each of {slots}"] = [_two_digits(plan.shared_tokens_per_s) for plan in fitting]
    console.table(
        f"{title}: {terms}",
        tuple(columns),
        list(zip(*columns.values(), strict=True)),
        right=(
            *("context", "memory", "load, about", "first, about", "tokens/s, about"),
            f"each of {slots}",
        ),
        optional=("compute",),
    )


def _parts_of_speed(console: Console, hardware: Hardware, plan: Plan) -> None:
    """Print what the estimate for one token is made of."""
    step = plan.estimate
    if step is None:
        return
    if hardware.kernel_rate is not None:
        share = f"{KERNEL_REACHED:.0%} of the kernel's {format_rate(hardware.kernel_rate)}"
    elif hardware.bandwidth is not None:
        share = f"{reached(hardware.platform):.0%} of {format_rate(hardware.bandwidth)}"
    else:
        return
    parts = (
        ("reading", f"{format_bytes(step.nbytes)} on a device, at {share}", step.reading_s),
        ("launches", format_number(step.counts.launches, "operation"), step.launches_s),
        ("sums", f"{format_number(step.counts.sums, 'sum')} over devices", step.sums_s),
        ("ends", "the call, and the draw of the token", step.ends_s),
    )
    console.facts(
        f"time of a token: {plan.precision} on {plan.mesh}, at position {plan.context:,}",
        [
            *((name, f"{1e3 * spent:.1f} ms: {what}") for name, what, spent in parts if spent),
            ("basis", _BASIS.get(hardware.platform, _ASSUMED)),
        ],
    )


def _known_seconds(seconds: float | None) -> str:
    return "?" if seconds is None else format_seconds(seconds)


def _two_digits(rate: float | None) -> str:
    if rate is None:
        return "?"
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"  # noqa: PLR2004


def _bars(console: Console, plan: Plan, hardware: Hardware) -> None:
    """Print the memory of a device as a bar; all devices of a mesh need the same."""
    needs, memory = plan.needs, plan.memory
    if memory is None:
        return
    parts = (needs.weights, needs.cache, needs.workspace)
    if (residence := plan.residence) is not None:  # the rest stays on the disk
        parts = (residence.total - needs.cache - needs.workspace, needs.cache, needs.workspace)
    label = f"device 0-{plan.mesh.size - 1}" if plan.mesh.size > 1 else "device 0"
    title = f"memory of a device: {plan.precision} on {plan.mesh}"
    if hardware.platform == "cpu":
        label, title = "memory", f"main memory: {plan.precision} on the CPU"
    text = f"{' + '.join(map(format_bytes, parts))} of {format_bytes(memory)}"
    console.stacked(title, _PARTS, "free", [StackedBar(label, parts, memory, text)])


def _elsewhere(console: Console, plans: Sequence[Plan]) -> None:
    """Print which accelerators would be large enough."""
    if not plans:
        return
    by_place = {(plan.mesh, plan.precision): plan for plan in plans}
    precisions = list(dict.fromkeys(plan.precision for plan in plans))
    named = [f"example for {precision}" for precision in precisions[:2]]
    rows = []
    for mesh in dict.fromkeys(plan.mesh for plan in plans):
        row = [by_place.get((mesh, precision)) for precision in precisions]
        required = ("" if plan is None else format_bytes(plan.needs.total) for plan in row)
        rows.append((_mesh(mesh), *required, *map(_example, row[: len(named)])))
    console.table(
        "memory required of each accelerator",
        ("devices", *precisions, *named),
        rows,
        right=precisions,
        optional=named[::-1],
    )


def _example(plan: Plan | None) -> str:
    accelerators = examples(plan) if plan is not None else ()
    return accelerators[0].label if accelerators else "none"
