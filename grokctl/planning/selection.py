"""Which checkpoint to run, over which mesh, and how: of all that fits, the best."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from grokctl.checkpoint.tensor_source import Storage
from grokctl.errors import HardwareError, PlacementError
from grokctl.model.placement import MeshShape, check_mesh
from grokctl.model.precision import Compute, KvType, Precision
from grokctl.model.sizing import Terms
from grokctl.planning.plans import MESHES, Hardware, Plan, plan_for, plans
from grokctl.planning.spread import Spread
from grokctl.text import format_bytes

NOTHING_HELPS: Final = "grokctl doctor"
"""The hint where no choice of the user's makes anything fit."""
_SHORTEST_CHOSEN: Final = 512
"""Tokens of context: fewer only if the user asks for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A checkpoint that could be run."""

    name: str
    storage: Storage
    mesh: MeshShape | None = None
    """The mesh that it was cut for; None for a release, which suits every mesh alike."""
    is_mapped: bool = False
    """Whether a CPU can map its files, on that mesh, and read tensors only when it needs them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The user's choices; None leaves one to `choose`."""

    mesh: MeshShape | None = None
    compute: Compute | None = None
    context: int | None = None
    """Tokens."""
    sequences: int = 1
    """Sequences to run at a time."""
    may_be_fewer: bool = False
    """Whether half as many will do, and half of these, rather than less context than one has."""
    kv: KvType = KvType.COMPUTE


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The checkpoint to run, and how."""

    candidate: Candidate
    plan: Plan
    reason: str
    """A line for people: which checkpoint, on which hardware, and why."""

    @property
    def is_cut_again(self) -> bool:
        """Whether the checkpoint was cut for another mesh."""
        return _is_cut_again(self.candidate, self.plan)


@dataclass(frozen=True, slots=True)
class _Option:
    candidate: Candidate
    plan: Plan

    @property
    def step_s(self) -> float:
        assert self.plan.step is not None
        return self.plan.step.total_s

    @property
    def rank(self) -> tuple[object, ...]:
        is_cut_again = _is_cut_again(self.candidate, self.plan)
        return (*rank(self.plan, is_cut_again=is_cut_again), self.candidate.name)


def rank(plan: Plan, *, is_cut_again: bool, by_devices: bool = False) -> tuple[object, ...]:
    """The order of plans that fit, by which `run` chooses and `doctor` advises: smaller is better.

    Weights in memory come before weights that are read from the disk for every token, in memory
    every other precision before int4, more context before less, a checkpoint as it was cut before
    one that is cut again, and then the fastest.

    Args:
        plan: A plan that fits.
        is_cut_again: Whether its checkpoint was cut for another mesh, or has yet to be made.
        by_devices: Whether fewer devices come before speed.
    """
    return (
        *plan.drawbacks,
        -plan.context,
        is_cut_again,
        plan.mesh.size if by_devices else 0,
        plan.step.total_s if plan.step else 0.0,
        plan.mesh.size,
    )


def contexts(asked: int | None, *, longest: int) -> tuple[int, ...]:
    """Lengths of context to try, the longest first: what was asked for, or else all that help.

    Args:
        asked: Tokens, if the user chose.
        longest: Tokens that the model knows.
    """
    if asked is not None:
        return (asked,)
    powers = (2**power for power in reversed(range(longest.bit_length())))
    return (longest, *(length for length in powers if _SHORTEST_CHOSEN <= length < longest))


def choose(
    hardware: Hardware,
    candidates: Sequence[Candidate],
    asked: Asked,
    *,
    cpu: Hardware | None = None,
) -> Choice:
    """Choose a checkpoint, and how to run it: of all that fits, the first by `rank`.

    Args:
        hardware: The hardware to run it; with as many devices as a mesh that is asked for, or a
            CPU.
        candidates: Checkpoints of one model, at least one.
        asked: The user's choices.
        cpu: The CPU of a machine whose accelerators may be too small, for the hint.

    Raises:
        HardwareError: Nothing fits.
        PlacementError: The model does not divide over the mesh that is asked for.
    """
    if asked.may_be_fewer and asked.sequences > 1:
        return _choose_with_most(hardware, candidates, asked, cpu)
    if asked.mesh is not None:
        check_mesh(asked.mesh, candidates[0].storage.config)
    options = list(_options(hardware, candidates, asked))
    if not options:
        what = f"none of {len(candidates)} checkpoints can be cut for "
        raise PlacementError(
            what + (str(asked.mesh) if asked.mesh else f"{hardware.count} devices")
        )
    fitting = [option for option in options if option.plan.fits]
    if not fitting:
        raise _too_small(hardware, candidates, asked, options, cpu)
    best = min(fitting, key=lambda option: option.rank)
    what = describe(best.candidate, best.plan, hardware)
    return Choice(
        candidate=best.candidate,
        plan=best.plan,
        reason=", ".join(filter(None, [what, _why(best, fitting, len(candidates))])),
    )


def _choose_with_most(
    hardware: Hardware, candidates: Sequence[Candidate], asked: Asked, cpu: Hardware | None
) -> Choice:
    """The choice with the most sequences that cost nothing of what a single one would get."""
    alone = choose(hardware, candidates, replace(asked, sequences=1), cpu=cpu)
    sequences = asked.sequences
    while sequences > 1:
        with suppress(HardwareError):
            many = replace(asked, sequences=sequences, may_be_fewer=False)
            choice = choose(hardware, candidates, many, cpu=cpu)
            is_same = choice.candidate is alone.candidate and choice.plan.mesh == alone.plan.mesh
            is_paged_alike = choice.plan.is_paged == alone.plan.is_paged
            if is_same and is_paged_alike and choice.plan.context == alone.plan.context:
                return choice
        sequences //= 2
    return alone


def describe(candidate: Candidate, plan: Plan, hardware: Hardware) -> str:
    """A plan in words, with the memory that it takes."""
    longest = candidate.storage.config.sequence_len
    parts = f"{plan.compute}, context {plan.context:,}"
    if plan.context < longest:
        parts += f" of {longest:,}"
    if plan.slots > 1:
        parts += f", {plan.slots} sequences"
    needed = plan.needs
    if hardware.platform == "cpu":
        in_memory = needed.cache + needed.workspace + (0 if plan.is_paged else needed.weights)
        total = plan.residence.total if plan.residence else in_memory * plan.mesh.size
        taken = format_bytes(total)
        if hardware.memory is not None:
            taken += f" of {format_bytes(hardware.memory)} of memory"
    else:
        taken = format_bytes(needed.total)
        if plan.memory is not None:
            taken += f" of {format_bytes(plan.memory)}"
        taken += " on each" if plan.mesh.size > 1 else ""
    return f"{candidate.name} on {_where(plan, hardware)}, {parts}: {taken}"


def _options(
    hardware: Hardware, candidates: Sequence[Candidate], asked: Asked
) -> Iterator[_Option]:
    """Every way to run a candidate, with the longest context that fits, or a plan that does not."""
    for candidate in candidates:
        for mesh in _meshes(hardware, candidate, asked):
            try:
                weights = Spread.of(candidate.storage, mesh)
            except PlacementError as error:  # the model, or its int4 groups, do not divide over it
                if asked.mesh is not None and len(candidates) == 1:
                    hint = f"--mesh {candidate.mesh}" if candidate.mesh else error.hint
                    raise PlacementError(str(error), hint) from error
                continue
            plan = _longest(hardware, candidate, weights, asked)
            yield _Option(candidate, plan)


def _meshes(hardware: Hardware, candidate: Candidate, asked: Asked) -> tuple[MeshShape, ...]:
    if asked.mesh is not None:
        return (asked.mesh,)
    own = () if candidate.mesh is None else (candidate.mesh,)
    if hardware.platform == "cpu":
        return own or (MeshShape(1, 1),)  # virtual devices make nothing faster
    possible = (mesh for mesh in (*own, *MESHES) if mesh.size <= hardware.count)
    return tuple(dict.fromkeys(possible))


def _longest(hardware: Hardware, candidate: Candidate, weights: Spread, asked: Asked) -> Plan:
    """The plan with the longest context that fits, or the smallest that does not."""
    is_mapped = candidate.is_mapped and candidate.mesh == weights.mesh
    plan = None
    for context in contexts(asked.context, longest=candidate.storage.config.sequence_len):
        for compute in (asked.compute,) if asked.compute else hardware.computes:
            terms = Terms(context=context, compute=compute, slots=asked.sequences, kv=asked.kv)
            plan = plan_for(hardware, weights, terms, is_mapped=is_mapped)
            if plan.fits:
                return plan
    assert plan is not None
    return plan


def _is_cut_again(candidate: Candidate, plan: Plan) -> bool:
    return candidate.mesh is not None and candidate.mesh != plan.mesh


def _where(plan: Plan, hardware: Hardware) -> str:
    size = plan.mesh.size
    if hardware.platform == "cpu":
        return "the CPU" if size == 1 else f"the CPU as {size} devices ({plan.mesh})"
    return hardware.name if size == 1 else f"{size} x {hardware.name} ({plan.mesh})"


def _why(best: _Option, fitting: Sequence[_Option], count: int) -> str:
    """The reason for a choice; empty if only one was possible."""
    reasons = []
    if (residence := best.plan.residence) is not None:
        some = f"{residence.pinned:,} of {residence.experts:,} experts"
        reasons.append(f"{some} in memory and the others from the disk for every token")
    elif best.plan.is_paged:
        reasons.append("its weights are read from the disk for every token")
    rivals = [option for option in fitting if option.candidate is not best.candidate]
    equal = [option for option in rivals if option.plan.is_paged == best.plan.is_paged]
    faster = [option for option in equal if option.step_s < best.step_s]
    of = f"of {count} checkpoints"
    if count > 1 and not rivals:
        reasons.append(f"the only one {of} that fits")
    elif count > 1 and not faster:
        reasons.append(f"the fastest {of}")
    elif faster and all(option.plan.precision is Precision.INT4 for option in faster):
        reasons.append(f"the fastest {of}, int4 aside")
    elif faster:
        reasons.append(f"the fastest {of} as they were cut")
    return ", ".join(reasons)


def _too_small(
    hardware: Hardware,
    candidates: Sequence[Candidate],
    asked: Asked,
    options: Sequence[_Option],
    cpu: Hardware | None,
) -> HardwareError:
    """The error for the option that lacks least, with both numbers and advice."""
    nearest = min(options, key=lambda option: option.plan.missing)
    plan, needed = nearest.plan, nearest.plan.needs
    what = f"{nearest.candidate.name} on {_where(plan, hardware)}"
    hint = _hint(hardware, candidates, asked, cpu)
    if plan.residence is not None:
        context = f"for {plan.context:,} tokens of context"
        return HardwareError(f"{what}, {context}, takes {plan.residence.shortage}", hint)
    times = 1
    if hardware.platform == "cpu":
        times, are_free = plan.mesh.size, "of memory are free"
    else:
        are_free = "are free on each" if plan.mesh.size > 1 else "are free"
    weights = 0 if plan.is_paged else needed.weights
    total = weights + needed.cache + needed.workspace
    parts = [f"{format_bytes(times * needed.cache)} for {plan.context:,} tokens of context"]
    if plan.slots > 1:
        parts[0] += f" of {plan.slots} sequences"
    parts.append(f"{format_bytes(times * needed.workspace)} to compute in")
    if weights:
        parts.insert(0, f"{format_bytes(times * weights)} of weights")
    return HardwareError(
        f"{what} takes {format_bytes(times * total)} ({', '.join(parts)}), "
        f"{format_bytes(times * (plan.memory or 0))} {are_free}",
        hint,
    )


def _hint(
    hardware: Hardware, candidates: Sequence[Candidate], asked: Asked, cpu: Hardware | None
) -> str:
    """Advice if nothing fits: ask for less, cut the checkpoint for less, or ask `doctor`."""
    for other, flag in _lesser(asked):
        options = (option for option in _options(hardware, candidates, other) if option.plan.fits)
        best = min(options, key=lambda option: option.rank, default=None)
        if best is not None:
            return flag(best.plan)
    config = candidates[0].storage.config
    possible = [
        plan
        for plan in plans(
            hardware,
            config=config,
            context=asked.context or min(_SHORTEST_CHOSEN, config.sequence_len),
            slots=asked.sequences,
            kv=asked.kv,
            compute=asked.compute,
        )
        if plan.fits
    ]
    possible.sort(key=lambda plan: plan.drawbacks)
    if possible:
        precision = possible[0].precision
        command = f"grokctl reshard {_mesh_flag(possible[0])}"
        return command if precision is Precision.INT8 else f"{command} --precision {precision}"
    if cpu is not None and any(option.plan.fits for option in _options(cpu, candidates, asked)):
        return "JAX_PLATFORMS=cpu grokctl run …"
    return NOTHING_HELPS


def _lesser(asked: Asked) -> Iterator[tuple[Asked, Callable[[Plan], str]]]:
    """Choices that need less memory, each with its option of the command line."""
    if asked.context is not None:
        yield replace(asked, context=None), lambda plan: f"--context {plan.context}"
    if asked.compute is Compute.FLOAT32:
        yield replace(asked, compute=Compute.BFLOAT16), lambda _: "--compute bfloat16"
    if asked.kv is not KvType.INT8:
        yield replace(asked, kv=KvType.INT8), lambda _: "--kv int8"
    if asked.mesh is not None:
        yield replace(asked, mesh=None), _mesh_flag


def _mesh_flag(plan: Plan) -> str:
    """The option for the mesh of a plan."""
    mesh = plan.mesh
    return f"--devices {mesh.size}" if mesh.expert == 1 else f"--mesh {mesh}"
