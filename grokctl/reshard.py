"""Plan, then execute, the rewrite of a checkpoint for a mesh: bounded memory, resumable, atomic."""

import math
import shutil
from pathlib import Path

from grokctl.checkpoint.manifest import FileRecord
from grokctl.checkpoint.ready import ReadyCheckpoint, open_ready
from grokctl.checkpoint.receipt import Receipt
from grokctl.errors import Reason, UsageError, corrupt
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started, ignore
from grokctl.paths import locked, quoted
from grokctl.resharding.convert import NOTHING, Squares, is_stored_alike
from grokctl.resharding.pipeline import Pipeline, Progress
from grokctl.resharding.plan import ReshardPlan
from grokctl.resharding.publish import (
    JOURNAL,
    check_destination,
    check_space,
    check_unchanged,
    digest,
    left_over,
    publish,
    stamps_of,
    write_rest,
    writing,
)
from grokctl.resharding.slices import cuts_of
from grokctl.resharding.writers import DeviceWriter, Entry, Flusher, Journal, resume


def reshard(
    plan: ReshardPlan,
    *,
    proof: Receipt | None = None,
    force: bool = False,
    observe: Observer = ignore,
) -> ReadyCheckpoint:
    """Write a ready checkpoint; its name appears when every byte of it is on disk, not before.

    Device files grow side by side in a hidden sibling folder, hashed as they are written. A killed
    run goes on behind the last tensor that all of them hold, after hashing again what it keeps.

    Args:
        plan: From `plan`.
        proof: The receipt that covers a release, if there is one; the manifest records it.
        force: Whether to replace a ready checkpoint of the same name.
        observe: Receives progress in bytes written, before compression.

    Raises:
        UsageError: The name is taken, or the destination cannot be written.
        DiskFullError: It does not fit; what was written is kept for the next run.
        CorruptCheckpointError: The source changed under our hands.
    """
    stamps = stamps_of(plan.source)
    partial = plan.out.parent / f".{plan.out.name}.{digest(plan, stamps)[:12]}.partial"
    with writing(plan.out):
        check_destination(plan, force=force)
        partial.mkdir(parents=True, exist_ok=True)
        for other in left_over(partial, plan.out):
            message = "another run left it, or is at work there"
            observe(Noted(message=f"{other}: {message}; to remove it: rm -r {quoted(other)}"))
        busy = UsageError(f"{partial}: another grokctl is writing there")
        with locked(partial, busy=busy, is_folder=True):
            check_destination(plan, force=force)  # another run may have ended just now
            records, errors = _write_devices(plan, partial, observe)
            write_rest(plan, partial, proof, records, errors)
            check_unchanged(plan.source, stamps, partial)
            check_destination(plan, force=force)  # somebody may have put something there
            publish(partial, plan.out)
    return open_ready(plan.out)


def _write_devices(
    plan: ReshardPlan, partial: Path, observe: Observer
) -> tuple[list[FileRecord], dict[str, float]]:
    """Every device's file, synced, and what converting did to each weight."""
    if plan.compression is None:  # else nobody knows how much it will be
        kept = sum(file.stat().st_size for file in partial.iterdir())
        check_space(plan, plan.bytes_out - kept, shutil.disk_usage(partial).free)
    writers: list[DeviceWriter] = []
    try:
        writers.extend(DeviceWriter(layout, partial, plan.compression) for layout in plan.layouts)
        journal = Journal(partial / JOURNAL, len(writers))
        is_begun = journal.path.exists() and journal.path.stat().st_size > 0
        observe(Started(stage=Stage.RESHARD, total=plan.bytes_out))
        done = resume(writers, journal, observe)
        count = len(plan.layouts[0].tensors)
        if done:
            observe(Noted(message=f"goes on after {done} of {count} tensors of an interrupted run"))
        elif is_begun:
            message = "begins again: the journal of an interrupted run does not fit its files"
            observe(Noted(message=message))
        _cut_tensors(plan, writers, journal, observe)
        observe(Finished(stage=Stage.RESHARD))
        return [writer.record() for writer in writers], _errors(plan, journal)
    finally:
        for writer in writers:
            writer.close()


def _cut_tensors(
    plan: ReshardPlan, writers: list[DeviceWriter], journal: Journal, observe: Observer
) -> None:
    """Make what the journal does not have yet."""
    done = len(journal.entries)
    written = sum(writer.plain_nbytes for writer in writers)
    squares: dict[str, Squares] = {}
    flusher = Flusher(writers)

    def note(progress: Progress) -> None:
        nonlocal written
        key = progress.tensor.key
        written += progress.nbytes
        squares[key] = squares.get(key, NOTHING) + progress.squares
        observe(Advanced(stage=Stage.RESHARD, done=written, detail=key))
        if progress.marks:
            if not math.isfinite(squares[key].error + squares[key].total):
                raise corrupt(
                    key,
                    Reason.ALTERED,
                    f"holds values that are no numbers, or too large for {plan.precision}",
                    f"grokctl inspect {quoted(plan.source.root)} --stats",
                )
            journal.note(Entry(progress.marks, squares.pop(key)))
            flusher.poke(sum(writer.nbytes for writer in writers))

    tensors = [held.tensor for held in plan.layouts[0].tensors]
    with (
        flusher,
        Pipeline(
            plan.tensors,
            writers,
            compression=plan.compression,
            jobs=plan.jobs,
            arrays=plan.arrays,
            array_nbytes=plan.array_nbytes,
        ) as pipeline,
    ):
        made = set()
        for index in range(done, len(tensors)):
            tensor = tensors[index]
            if tensor.is_scales and tensor.spec in made:
                pipeline.add_scales(tensor)
            else:
                for cut in cuts_of(plan.layouts, index, limit=plan.array_nbytes):
                    for progress in pipeline.add(cut):
                        note(progress)
                if tensor.is_matrix and not is_stored_alike(plan.tensors, tensor):
                    made.add(tensor.spec)
            pipeline.mark(tensor)
        for progress in pipeline.drain():
            note(progress)
        flusher.finish()


def _errors(plan: ReshardPlan, journal: Journal) -> dict[str, float]:
    """Relative root mean square error of every weight that the release quantises."""
    return {
        held.tensor.key: entry.squares.relative_rms
        for held, entry in zip(plan.layouts[0].tensors, journal.entries, strict=True)
        if held.tensor.spec.is_quantized and not held.tensor.is_scales
    }
