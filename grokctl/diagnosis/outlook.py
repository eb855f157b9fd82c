"""What runs on some hardware, how fast, and what is missing if nothing does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from grokctl.checks import Status
from grokctl.diagnosis.accelerators import IMAGINED
from grokctl.diagnosis.disks import about, reshard_command
from grokctl.diagnosis.inventory import ready_nbytes
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.precision import KvType, Precision
from grokctl.planning.plans import Hardware, Plan, examples
from grokctl.text import format_bytes, format_rate

_PROMPT: Final = "-p 'The answer to life, the universe and everything is'"
_FAST: Final = 10
"""Tokens a second from which fractions are not shown."""
_MANY: Final = 4
"""The smallest number of devices in an example."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ability:
    """A command that can be run now, or why it cannot."""

    name: str
    """`download`, `reshard` or `run`."""
    status: Status
    """OK, WARN (with a drawback), FAIL (no), SKIP (done, or unknown)."""
    detail: str
    """Such as `yes, about 9 minutes`; if not, what is missing, with both numbers."""
    command: str = ""
    """To paste."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prospect:
    """Hardware, and the best plan for it."""

    hardware: Hardware
    plans: tuple[Plan, ...]
    """All plans for this hardware."""
    best: Plan | None
    """None if no plan fits."""
    elsewhere: tuple[Plan, ...]
    """Plans for published accelerators."""
    command: str
    """The command that runs the best plan."""
    instead_of: Hardware | None = None
    """This machine's accelerators, if they are too small."""


def run_elsewhere(prospect: Prospect) -> Ability:
    """Whether some hardware can run the model, whatever is on its disk."""
    best, hardware = prospect.best, prospect.hardware
    command = prospect.command
    if best is None:
        detail = _too_small(prospect)
        return Ability(name="run", status=Status.FAIL, detail=detail, command=IMAGINED)
    if hardware.platform == "cpu":
        return _on_cpu(prospect, best, command)
    each = " on each" if best.mesh.size > 1 else ""
    room = "" if best.memory is None else f" of {format_bytes(best.memory)}"
    takes = f"{_devices(hardware, best.mesh)}, {format_bytes(best.needs.total)}{room}{each}"
    if best.context < GROK_1.sequence_len:
        takes += f", context {best.context:,}"
    pace = _speed(best)
    if best.precision is not Precision.INT4:
        detail = f"yes: {best.precision} on {takes}{pace}"
        return Ability(name="run", status=Status.OK, detail=detail, command=command)
    detail = f"yes, at int4 only, on {takes}{pace}; {_for_int8(prospect)}"
    return Ability(name="run", status=Status.WARN, detail=detail, command=command)


def _on_cpu(prospect: Prospect, best: Plan, command: str) -> Ability:
    pace, first = _speed(best), ""
    if best.context < GROK_1.sequence_len:
        pace = f", context {best.context:,}{pace}"
    if prospect.instead_of is not None:
        small = prospect.instead_of
        first = f"{small.count} x {small.name} are too small; "
    if not best.is_paged:
        taken = f"{format_bytes(best.needs.total)} of {format_bytes(best.memory or 0)} of memory"
        detail = f"yes: {first}{best.precision} on the CPU, {taken}{pace}"
        return Ability(name="run", status=Status.OK, detail=detail, command=command)
    detail = (
        f"yes, slowly: {first}{best.precision} on the CPU; most of its "
        f"{format_bytes(best.needs.weights)} is read from the disk for every token{pace}"
    )
    if best.residence is not None:
        detail = f"yes, slowly: {first}{best.precision} on the CPU {_streaming(prospect, best)}"
    detail += f"; all of it fits {_examples(prospect.elsewhere)}"
    return Ability(name="run", status=Status.WARN, detail=detail, command=command)


def _streaming(prospect: Prospect, best: Plan) -> str:
    """What stays in memory, what a token waits for, and what twice the memory would change."""
    residence, hardware = best.residence, prospect.hardware
    assert residence is not None
    context = f", context {best.context:,}" if best.context < GROK_1.sequence_len else ""
    missed = format_bytes(int(residence.missed))
    text = (
        f"keeps {residence.pinned:,} of {residence.experts:,} experts in "
        f"{format_bytes(residence.memory)} and reads {missed} a token from the disk{context}"
    )
    if not hardware.read_rate or best.tokens_per_s is None:
        return text
    text += f" at {format_rate(hardware.read_rate)}{_speed(best)}"
    if best.first_token_s is not None:
        text += f", the first after about {about(best.first_token_s)}"
    memory = 2 * residence.memory
    more = residence.with_memory(memory)
    if more is not None:
        seconds = more.seconds(read_rate=hardware.read_rate, decode_rate=hardware.decode_rate)
        return f"{text}; with {format_bytes(memory)}{_paced(1 / seconds)}"
    rate = None if best.step is None else 1 / best.step.total_s
    return f"{text}; {format_bytes(memory)} hold all of them{_paced(rate)}"


def _for_int8(prospect: Prospect) -> str:
    """What int8 would need."""
    known = [plan for plan in prospect.plans if plan.precision is Precision.INT8]
    possible = [plan for plan in known if plan.is_possible]
    nearest = min(possible, key=lambda plan: plan.missing, default=None)
    text = "int8"
    if nearest is not None:
        each = " on each" if nearest.mesh.size > 1 else ""
        text += f" takes {format_bytes(nearest.needs.total)}{each}"
    enough = [plan.mesh.size for plan in known if not plan.missing and not plan.is_possible]
    if enough:
        return f"{text}{', and' if nearest is not None else ''} needs {min(enough)} of them"
    return f"{text}: {_examples(prospect.elsewhere)}"


def _too_small(prospect: Prospect) -> str:
    """Why nothing fits, and examples that do."""
    possible = [plan for plan in prospect.plans if plan.is_possible]
    nearest = min(possible, key=lambda plan: plan.missing, default=None)
    detail = "no"
    if nearest is not None and nearest.residence is not None:
        detail += f": the CPU needs {nearest.residence.shortage}"
    elif nearest is not None and nearest.is_paged:
        others = nearest.needs.cache + nearest.needs.workspace
        detail += (
            f": the CPU needs {format_bytes(others)} even with the weights on disk, "
            f"{format_bytes(nearest.memory or 0)} are available"
        )
    elif nearest is not None:
        each = " on each" if nearest.mesh.size > 1 else ""
        detail += (
            f": {nearest.precision} on {_devices(prospect.hardware, nearest.mesh)} needs "
            f"{format_bytes(nearest.needs.total)}{each}, "
            f"{format_bytes(nearest.memory or 0)} are available"
        )
    enough = [plan for plan in prospect.plans if not plan.missing and not plan.is_possible]
    if enough:
        least = min(enough, key=lambda plan: plan.mesh.size)
        detail += f"; {least.mesh.size} of them hold {least.precision}"
    return f"{detail}; int8 fits {_examples(prospect.elsewhere)}"


def _examples(plans: Sequence[Plan]) -> str:
    """`4 x H200 141GB, 8 x L40S 48GB`: the smallest published accelerators that fit int8."""
    smallest = []
    for plan in plans:
        is_usual = plan.precision is Precision.INT8 and plan.mesh.expert == 1
        fitting = examples(plan) if is_usual and plan.mesh.size >= _MANY else ()
        if fitting:
            smallest.append(f"{plan.mesh.size} x {fitting[0].label}")
    return ", ".join(smallest) or "no published accelerator"


def reshard_elsewhere(best: Plan) -> Ability:
    """How to reshard a release for other hardware."""
    nbytes = ready_nbytes(best.precision, best.mesh)
    return Ability(
        name="reshard",
        status=Status.OK,
        detail=f"{format_bytes(nbytes)} at {best.precision} for {best.mesh}",
        command=reshard_command(best.precision, best.mesh),
    )


def run_command(context: int | None, batch: int, kv: KvType) -> str:
    """The command that runs the question's settings."""
    many = f" --prompts-file prompts.jsonl --batch {batch}"
    parts = [f"grokctl run{many}" if batch > 1 else f"grokctl run {_PROMPT}"]
    parts += [f"--context {context}"] if context is not None else []
    parts += [f"--kv {kv}"] if kv is not KvType.COMPUTE else []
    return " ".join(parts)


def _devices(hardware: Hardware, mesh: MeshShape) -> str:
    return f"{mesh.size} x {hardware.name or 'unnamed accelerators'}"


def _speed(plan: Plan) -> str:
    """`, about 30 tokens/s (estimate)`; empty if unknown."""
    return _paced(plan.tokens_per_s)


def _paced(rate: float | None) -> str:
    """The same of a number of tokens a second."""
    if not rate:
        return ""
    speed = (
        f"{rate:.{0 if rate >= _FAST else 1}f} tokens/s"
        if rate >= 1
        else f"{about(1 / rate)} per token"
    )
    return f", about {speed} (estimate)"
