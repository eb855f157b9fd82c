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
from grokctl.model.precision import KvType, Precision
from grokctl.paths import Home
from grokctl.planning.plans import Hardware, Plan, accelerated, hardware_for, hardware_of, plans

__all__ = ["Ability", "Diagnosis", "Group", "Question", "doctor", "examine"]

_ON_CPU: Final = "JAX_PLATFORMS=cpu"
_SHORTER: Final = (4096, 2048, 1024, 512)
"""Tokens of context that `run` falls back to where nobody asked for more."""
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
    """What would be run on some hardware: of what fits, what `run` would choose."""
    found = _plans(hardware, question, question.context)
    best = _best(found, question, inventory)
    for context in _SHORTER if question.context is None and _is_only_context(found, best) else ():
        shorter = _best(_plans(hardware, question, context), question, inventory)
        if shorter is not None and (best is None or _is_better(shorter, best)):
            best = shorter
    return Prospect(
        hardware=hardware,
        plans=found,
        best=best,
        elsewhere=_plans(None, question, question.context),
        command=run_command(question.context, question.batch, question.kv),
    )


def _plans(hardware: Hardware | None, question: Question, context: int | None) -> tuple[Plan, ...]:
    return plans(hardware, context=context, slots=question.batch, kv=question.kv)


def _is_only_context(found: Sequence[Plan], best: Plan | None) -> bool:
    """Whether less context would make something better fit: its weights alone do."""
    if best is not None and (best.is_paged or best.precision is not Precision.INT4):
        return False
    better = (plan for plan in found if best is None or plan.precision is not Precision.INT4)
    return any(
        plan.is_possible
        and plan.memory is not None
        and (plan.is_paged or plan.needs.weights < plan.memory)
        for plan in better
    )


def _is_better(shorter: Plan, best: Plan) -> bool:
    """Whether a shorter context buys another precision than int4, with all weights in memory."""
    return (
        best.precision is Precision.INT4
        and shorter.precision is not Precision.INT4
        and not shorter.is_paged
    )


def _best(found: Sequence[Plan], question: Question, inventory: Inventory | None) -> Plan | None:
    """Of what fits, what is run: from what is ready here, or else from what could be made."""
    fitting = [plan for plan in found if plan.fits]
    kept = () if inventory is None else inventory.ready_grok_1
    precisions, cuts = (
        {item.precision for item in kept},
        {(item.precision, item.mesh) for item in kept},
    )
    # whoever does not say how many devices there are asks for the fewest
    is_fewest = not question.is_here and question.devices is None

    def rank(plan: Plan) -> tuple[object, ...]:
        pace = 0.0 if plan.tokens_per_s is None or is_fewest else -plan.tokens_per_s
        return (
            *plan.drawbacks,
            bool(kept) and (plan.precision, plan.mesh) not in cuts,
            plan.mesh.size if is_fewest else pace,
            -plan.mesh.size,
            plan.mesh.expert,
            plan.needs.weights,
        )

    mapped = {item.precision for item in kept if item.is_mapped}
    there = [
        plan for plan in fitting if plan.precision in (mapped if plan.is_paged else precisions)
    ]
    return min(there or fitting, key=rank, default=None)


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
