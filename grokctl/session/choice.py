"""Choose the checkpoint of a run, the devices, and how it runs on them."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

from grokctl.errors import CorruptCheckpointError, HardwareError
from grokctl.events import Noted, Observer
from grokctl.inference.devices import accelerators, has_fast_bfloat16
from grokctl.machine.memory import limited, memory
from grokctl.model.placement import MESH_SIZES, MeshShape
from grokctl.planning.plans import Hardware, accelerated
from grokctl.planning.selection import NOTHING_HELPS, Asked, Candidate, Choice, choose
from grokctl.session.candidates import CandidateCheckpoint, damaged, open_candidate

_STEP: Final = 11
"""Part of a size by which the next one to try is larger."""


def settle(
    checkpoints: Sequence[CandidateCheckpoint],
    asked: Asked,
    *,
    processes: int,
    machines: int = 1,
    max_memory: int | None = None,
    observe: Observer,
) -> tuple[CandidateCheckpoint, Choice]:
    """Choose a checkpoint, and open it; damaged ones are skipped.

    Args:
        checkpoints: Candidates, all of one model.
        asked: What the user has decided.
        processes: That run it together.
        machines: That these processes run on, and whose memory they share.
        max_memory: Most bytes of each one's main memory, if its CPU runs the model.
        observe: Receives notes about what was skipped.

    Raises:
        CorruptCheckpointError: All are damaged.
        HardwareError: None fits.
        PlacementError: The model does not divide over the mesh.
    """
    hardware = accelerated(accelerators(processes), is_whole=False)
    if hardware is not None and max_memory is not None:
        observe(Noted(message="--max-memory: has an effect on the memory of a CPU only"))
    if processes > 1:
        if hardware is not None:  # a rank with fewer devices says so itself
            hardware = replace(hardware, count=hardware.count * processes)
        if asked.mesh is None:
            asked, checkpoints = _over_processes(asked, checkpoints, hardware, processes)
    cpu = Hardware(
        platform="cpu",
        name="CPU",
        count=1,
        memory=limited(memory().usable, max_memory) * machines,
        bandwidth=None,
        has_fast_bfloat16=has_fast_bfloat16(),
    )
    while True:
        candidates = [checkpoint.candidate for checkpoint in checkpoints]
        choice = _choose(hardware, cpu, candidates, asked, is_limited=max_memory is not None)
        chosen = next(
            checkpoint for checkpoint in checkpoints if checkpoint.candidate is choice.candidate
        )
        if chosen.source is not None:
            return chosen, choice
        try:
            opened = open_candidate(chosen.root, observe=observe)
        except CorruptCheckpointError as error:
            if len(checkpoints) == 1:
                raise
            observe(damaged(chosen.candidate.name, error))
            checkpoints = [checkpoint for checkpoint in checkpoints if checkpoint is not chosen]
        else:
            return replace(opened, candidate=chosen.candidate), choice


def _advised(
    error: HardwareError, cpu: Hardware, candidates: Sequence[Candidate], asked: Asked
) -> HardwareError:
    """The error for too little memory, which the user has limited, with a limit that suffices.

    It is about a tenth above the least. Other advice stays, and so does an error that all memory
    that is free would not avoid.
    """
    size = cpu.memory or 0
    while error.hint == NOTHING_HELPS and 0 < size < memory().usable:
        size += -(-size // _STEP)
        with suppress(HardwareError):
            choose(replace(cpu, memory=size), candidates, asked)
            name, unit = ("GB", 10**9) if size >= 10**9 else ("MB", 10**6)
            enough = f"{-(-10 * size // unit) / 10:g}{name}"
            return HardwareError(str(error), f"--max-memory {enough}")
    return error


def mesh_over(processes: int, devices: int) -> MeshShape:
    """Experts over processes, and as many of the devices as a mesh can have."""
    size = max((size for size in MESH_SIZES if processes <= size <= devices), default=processes)
    return MeshShape(processes, size // processes)


def _over_processes(
    asked: Asked,
    checkpoints: Sequence[CandidateCheckpoint],
    hardware: Hardware | None,
    processes: int,
) -> tuple[Asked, Sequence[CandidateCheckpoint]]:
    """The mesh of several processes where the user named none, and the checkpoints that suit it.

    Experts are divided over processes, because their sums cross the network once a layer, and
    everything else stays within a process; unless all checkpoints were resharded otherwise.
    """
    usual = mesh_over(processes, hardware.count if hardware else max(MESH_SIZES))
    own = [checkpoint.candidate.mesh for checkpoint in checkpoints if checkpoint.candidate.mesh]
    possible = [mesh for mesh in own if mesh.size % processes == 0]
    mesh = usual if usual in possible or not possible else possible[0]
    suiting = [checkpoint for checkpoint in checkpoints if checkpoint.candidate.mesh == mesh]
    return replace(asked, mesh=mesh), suiting or checkpoints


def _choose(
    hardware: Hardware | None,
    cpu: Hardware,
    candidates: Sequence[Candidate],
    asked: Asked,
    *,
    is_limited: bool,
) -> Choice:
    """Choose on accelerators or else on the CPU, whose memory the user may have limited."""
    try:
        return _choose_hardware(hardware, cpu, candidates, asked)
    except HardwareError as error:
        if not is_limited:
            raise
        raise _advised(error, cpu, candidates, asked) from error


def _choose_hardware(
    hardware: Hardware | None, cpu: Hardware, candidates: Sequence[Candidate], asked: Asked
) -> Choice:
    """Choose on accelerators or else on the CPU, which has as many devices as any mesh."""
    if hardware is None or (asked.mesh is not None and asked.mesh.size > hardware.count):
        return choose(cpu, candidates, asked)
    try:
        return choose(hardware, candidates, asked, cpu=cpu)
    except HardwareError as error:
        larger = [one for one in candidates if one.mesh and one.mesh.size > hardware.count]
        if asked.mesh is not None or not larger:
            raise
        try:
            return choose(cpu, larger, asked)
        except HardwareError:
            raise error from None
