"""What a machine can do with Grok-1, and a command to fix each problem."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from grokctl.checks import Check, Status
from grokctl.diagnosis import accelerators, disks, memory, software
from grokctl.diagnosis import environment as surroundings
from grokctl.diagnosis.abilities import download, reshard, run
from grokctl.diagnosis.inventory import Inventory, take_stock
from grokctl.diagnosis.outlook import (
    Ability,
    Prospect,
    reshard_elsewhere,
    run_command,
    run_elsewhere,
)
from grokctl.events import Observer, ignore
from grokctl.machine.facts import Found, Machine
from grokctl.machine.look import look
from grokctl.model.config import GROK_1
from grokctl.model.precision import KvType
from grokctl.paths import Home
from grokctl.planning.plans import Hardware, Plan, accelerated, hardware_for, hardware_of, plans
from grokctl.planning.selection import contexts, rank

__all__ = ["Ability", "Diagnosis", "Group", "Question", "doctor", "examine"]

_ON_CPU: Final = "JAX_PLATFORMS=cpu"
_TABLE: Final[tuple[tuple[str, tuple[Callable[[Machine], Iterable[Check]], ...]], ...]] = (
    ("accelerators", accelerators.CHECKS),
    ("processor and memory", memory.CHECKS),
    ("disks", ()),
    ("software", software.CHECKS),
    ("surroundings", surroundings.SURROUNDINGS),
    ("network", surroundings.NETWORK),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The question; named hardware is treated as not being on this machine."""

    accelerator: str | None = None
    """A published accelerator, or `cpu`."""
    devices: int | None = None
    memory: int | None = None
    """Bytes of each device."""
    context: int | None = None
    """Tokens; by default those of the model, or as many as fit."""
    batch: int = 1
    """Sequences decoded at a time."""
    kv: KvType = KvType.COMPUTE

    @property
    def is_here(self) -> bool:
        """Whether it is about this machine."""
        return self.accelerator is None and self.devices is None and self.memory is None


@dataclass(frozen=True, slots=True)
class Group:
    """Checks that belong together."""

    title: str
    checks: tuple[Check, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Checks, plans, and what to do next."""

    groups: tuple[Group, ...]
    hardware: Hardware
    """The hardware of the plans: this machine's, or the question's."""
    is_here: bool
    """Whether it is this machine's."""
    plans: tuple[Plan, ...]
    """For this hardware; if it is a CPU or too small, then also for published accelerators, without
    memory."""
    abilities: tuple[Ability, ...]
    best: Plan | None = None
    """The best plan; with a shorter context than the others if only that fits."""

    @property
    def is_ok(self) -> bool:
        """Whether no check failed and, for other hardware, something can be run."""
        fails = any(c.status is Status.FAIL for group in self.groups for c in group.checks)
        can_run = self.best is not None or any(plan.fits for plan in self.plans)
        return not fails and (self.is_here or can_run)


def examine(
    home: Home,
    question: Question,
    *,
    download: Path | None = None,
    timeout_s: int = 20,
    observe: Observer = ignore,
) -> tuple[Diagnosis, Machine | None]:
    """Diagnose this machine as it is now, or other hardware without a look at this machine.

    Args:
        home: Where checkpoints are kept.
        question: This machine or other hardware, and how to run on it.
        download: A folder to check for a download, instead of that under home.
        timeout_s: Seconds after which a disk or a driver that does not answer is given up.
        observe: Receives progress.

    Returns:
        The diagnosis, and all facts about this machine; None for other hardware.

    Raises:
        GrokctlError: As `doctor` does.
    """
    if not question.is_here:
        return doctor(None, question=question), None
    machine = look(home.root.absolute(), download, timeout_s=timeout_s, observe=observe)
    inventory = take_stock(home, timeout_s=timeout_s)
    return doctor(machine, inventory, question=question), machine


def doctor(
    machine: Machine | None, inventory: Inventory | None = None, *, question: Question
) -> Diagnosis:
    """Diagnose a machine.

    Args:
        machine: Its facts; not used if the question is about other hardware.
        inventory: The checkpoints under home; likewise.
        question: Hardware, context and batch.

    Raises:
        UsageError: The question names an accelerator or a context that does not exist.
        PlacementError: No mesh has this many devices.
    """
    if machine is None or inventory is None or not question.is_here:
        return _elsewhere(question)
    prospect = _here(machine, inventory, question)
    cut = reshard(machine, inventory, prospect.best)
    return Diagnosis(
        groups=_examine(machine, inventory, prospect.best),
        hardware=prospect.hardware,
        is_here=True,
        plans=_shown(prospect),
        abilities=(
            download(machine, inventory, prospect.best),
            cut,
            run(machine, inventory, prospect, cut),
        ),
        best=prospect.best,
    )


def _here(machine: Machine, inventory: Inventory, question: Question) -> Prospect:
    """The best plan for this machine, once JAX uses all of its accelerators."""
    unused = accelerated(accelerators.idle(machine), is_whole=True)
    prospect = _prospect(unused or hardware_of(machine), question, inventory)
    if prospect.best is None and prospect.hardware.platform != "cpu":
        return _on_cpu(machine, question, inventory, prospect)
    if unused is None and machine.jax.found is Found.SILENT:
        return replace(prospect, command=f"{_ON_CPU} {prospect.command}")
    return prospect


def _elsewhere(question: Question) -> Diagnosis:
    """Diagnose other hardware by its numbers."""
    hardware = hardware_for(
        accelerator=question.accelerator, devices=question.devices, memory=question.memory
    )
    prospect = _prospect(hardware, question, None)
    cut = () if prospect.best is None else (reshard_elsewhere(prospect.best),)
    return Diagnosis(
        groups=(),
        hardware=hardware,
        is_here=False,
        plans=_shown(prospect),
        abilities=(*cut, run_elsewhere(prospect)),
        best=prospect.best,
    )


def _examine(machine: Machine, inventory: Inventory, best: Plan | None) -> tuple[Group, ...]:
    """Run every check."""
    wanted = disks.USUAL if best is None else (best.precision, best.mesh)
    groups = []
    for title, checks in _TABLE:
        made = [check for checker in checks for check in checker(machine)]
        if title == "disks":
            made += disks.checks(machine, inventory, wanted)
        groups.append(Group(title, tuple(made)))
    return tuple(groups)


def _prospect(hardware: Hardware, question: Question, inventory: Inventory | None) -> Prospect:
    """The plan that `run` would choose on some hardware."""
    options = [
        plan
        for context in contexts(question.context, longest=GROK_1.sequence_len)
        for plan in _plans(hardware, question, context)
    ]
    return Prospect(
        hardware=hardware,
        plans=_plans(hardware, question, question.context),
        best=_best(options, question, inventory),
        elsewhere=_plans(None, question, question.context),
        command=run_command(question.context, question.batch, question.kv),
    )


def _plans(hardware: Hardware | None, question: Question, context: int | None) -> tuple[Plan, ...]:
    return plans(hardware, context=context, slots=question.batch, kv=question.kv)


def _best(options: Sequence[Plan], question: Question, inventory: Inventory | None) -> Plan | None:
    """Of the plans that fit, the first by `rank`: of a ready checkpoint, or else of any."""
    kept = () if inventory is None else inventory.ready_grok_1
    precisions = {item.precision for item in kept}
    mapped = {item.precision for item in kept if item.is_mapped}
    cuts = {(item.precision, item.mesh) for item in kept}
    # a question without a number of devices asks for the fewest
    by_devices = not question.is_here and question.devices is None

    def place(plan: Plan) -> tuple[object, ...]:
        is_cut_again = bool(kept) and (plan.precision, plan.mesh) not in cuts
        return rank(plan, is_cut_again=is_cut_again, by_devices=by_devices)

    fitting = [plan for plan in options if plan.fits]
    ready = [
        plan for plan in fitting if plan.precision in (mapped if plan.is_paged else precisions)
    ]
    return min(ready or fitting, key=place, default=None)


def _on_cpu(
    machine: Machine, question: Question, inventory: Inventory, small: Prospect
) -> Prospect:
    """The best plan for the CPU, if accelerators are too small and the CPU is not."""
    without = replace(machine, jax=replace(machine.jax, platform="cpu", accelerators=()))
    prospect = _prospect(hardware_of(without), question, inventory)
    if prospect.best is None:
        return small
    command = f"{_ON_CPU} {prospect.command}"
    return replace(prospect, command=command, instead_of=small.hardware)


def _shown(prospect: Prospect) -> tuple[Plan, ...]:
    """The plans to show."""
    if prospect.best is not None and prospect.hardware.platform != "cpu":
        return prospect.plans
    return (*prospect.plans, *prospect.elsewhere)
