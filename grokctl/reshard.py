"""Execute a planned reshard: in bounded memory, resumable, published atomically."""

import math
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from grokctl.checkpoint.manifest import FileRecord
from grokctl.checkpoint.ready import ReadyCheckpoint, open_ready
from grokctl.checkpoint.ready_receipt import keep_ready_receipt, receipt_now
from grokctl.checkpoint.receipt import Receipt, Stamp, stamps_of
from grokctl.checkpoint.sums import require_sums
from grokctl.errors import Reason, UsageError, corrupt
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started, ignore
from grokctl.ownership import why_exposed
from grokctl.paths import locked_open, quoted
from grokctl.resharding.convert import NOTHING, Squares, is_stored_alike
from grokctl.resharding.partial import PartialFolder, opened_partial
from grokctl.resharding.pipeline import Pipeline, Progress
from grokctl.resharding.plan import ReshardPlan
from grokctl.resharding.publish import (
    can_be_exchanged,
    check_destination,
    check_space,
    check_tokenizer,
    check_unchanged,
    leftovers,
    origin_of,
    partial_folder,
    publish,
    refuse_altered,
    take_back,
    write_rest,
    writing,
)
from grokctl.resharding.slices import cuts_of
from grokctl.resharding.source_hashing import SourceHashing
from grokctl.resharding.writers import DeviceWriter, Entry, Flusher, Journal, resume


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A reshard on its way."""

    plan: ReshardPlan
    partial: PartialFolder
    stamps: Mapping[Path, Stamp | None]
    """Of the source's files when it began."""
    proof: Receipt | None
    is_earlier: bool
    """Whether an earlier version began it, or somebody else may have."""


def reshard(
    plan: ReshardPlan,
    *,
    proof: Receipt | None = None,
    force: bool = False,
    observe: Observer = ignore,
) -> ReadyCheckpoint:
    """Write a ready checkpoint; its folder appears only once every byte of it is on disk.

    Device files grow side by side in a hidden sibling folder, and are hashed as they are written.
    A killed run continues after the last tensor that all of them contain, once the files so far
    have been hashed again. The files of a ready checkpoint are hashed while they are read, and
    compared with its manifest before anything is published, unless its receipt covers them.

    Args:
        plan: From `plan_reshard`.
        proof: The receipt of a release, of the infohash or of a hub; the manifest records it.
        force: Whether to replace a ready checkpoint of the same name.
        observe: Receives progress in bytes written, before compression.

    Raises:
        UsageError: The destination exists, or cannot be written.
        DiskFullError: The disk is full; the partial folder is kept for the next run.
        CorruptCheckpointError: The source changed, or is not as its manifest or its proof says.
    """
    source = plan.source
    if isinstance(source, ReadyCheckpoint):
        require_sums(source)
    stamps = stamps_of(source)
    check_tokenizer(source)
    with writing(plan.out):
        check_destination(plan, force=force)
        usual, is_earlier = partial_folder(plan, stamps, is_exposed=can_be_exchanged(source))
        with opened_partial(usual, observe) as partial:
            if (problem := why_exposed(partial.path)) is not None:
                observe(Noted(message=f"{problem}: other users can replace the checkpoint"))
            for other in leftovers(partial.path, plan.out):
                message = "left by another reshard, or in use by one"
                observe(Noted(message=f"{other}: {message}; to delete it: rm -r {quoted(other)}"))
            is_earlier = partial.is_of_others or (is_earlier and partial.path == usual)
            run = _Run(
                plan=plan, partial=partial, stamps=stamps, proof=proof, is_earlier=is_earlier
            )
            _write(run, force=force, observe=observe)
    return open_ready(plan.out)


def _write(run: _Run, *, force: bool, observe: Observer) -> None:
    """Fill the partial folder, and publish it."""
    plan, partial, source = run.plan, run.partial, run.plan.source
    busy = UsageError(f"{partial.path}: another grokctl is writing to it")
    with locked_open(partial.handle, busy=busy):
        check_destination(plan, force=force)  # another run may have published it just now
        if partial.path.parent == plan.out:
            take_back(partial, plan.out)
        if run.is_earlier:
            message = (
                "begun by an earlier version, or elsewhere; its result will not count as proven"
            )
            observe(Noted(message=f"{partial.path}: {message}"))
        with SourceHashing(source) as hashing:
            records, errors = _write_devices(plan, partial, hashing, observe)
            refuse_altered(source, hashing.finish(plan.bytes_out, observe), partial)
        observe(Finished(stage=Stage.RESHARD))
        origin = origin_of(source, run.proof, is_earlier=run.is_earlier)
        manifest_sha256 = write_rest(plan, partial, origin, records, errors)
        check_unchanged(source, run.stamps, run.proof, partial)
        check_destination(plan, force=force)  # another program may have written it
        publish(partial, plan.out, observe)
        # every byte was hashed as it was written, and no name or mode changes any more
        names = [record.name for record in records]
        trust = (origin.root_of_trust or "") if origin.proven else ""
        receipt = receipt_now(plan.out, manifest_sha256, names, root_of_trust=trust)
        keep_ready_receipt(plan.out, receipt, observe)


def _write_devices(
    plan: ReshardPlan, partial: PartialFolder, hashing: SourceHashing, observe: Observer
) -> tuple[list[FileRecord], dict[str, float]]:
    """Write and sync every device file; returns their records, and the error of each weight."""
    if plan.compression is None:  # the size of compressed files is unknown
        free = shutil.disk_usage(partial.handle).free
        check_space(plan, plan.bytes_out - partial.nbytes, free)
    with ExitStack() as stack:
        writers: list[DeviceWriter] = []
        for layout in plan.layouts:
            writers.append(DeviceWriter(layout, partial, plan.compression))
            stack.callback(writers[-1].close)
        journal = Journal(partial, len(writers))
        stack.callback(journal.close)
        is_begun = journal.is_begun
        observe(Started(stage=Stage.RESHARD, total=plan.bytes_out))
        done = resume(writers, journal, observe)
        count = len(plan.layouts[0].tensors)
        if done:
            hashing.include_all()
            message = f"continuing after {done} of {count} tensors of an interrupted run"
            observe(Noted(message=message))
        elif is_begun:
            message = "starting again: the journal of an interrupted run does not match its files"
            observe(Noted(message=message))
        _write_tensors(plan, writers, journal, hashing, observe)
        return [writer.record() for writer in writers], _errors(plan, journal)


def _write_tensors(
    plan: ReshardPlan,
    writers: list[DeviceWriter],
    journal: Journal,
    hashing: SourceHashing,
    observe: Observer,
) -> None:
    """Write the tensors that are not in the journal yet."""
    done = len(journal.entries)
    written = sum(writer.plain_nbytes for writer in writers)
    squares: dict[str, Squares] = {}
    flusher = Flusher(writers)

    def record(progress: Progress) -> None:
        nonlocal written
        key = progress.tensor.key
        written += progress.nbytes
        squares[key] = squares.get(key, NOTHING) + progress.squares
        observe(Advanced(stage=Stage.RESHARD, done=written, detail=key))
        hashing.follow(written, plan.bytes_out, observe)
        if progress.states:
            if not math.isfinite(squares[key].error + squares[key].total):
                raise corrupt(
                    key,
                    Reason.MALFORMED,
                    f"has values that are not finite, or too large for {plan.precision}",
                    f"grokctl inspect {quoted(plan.source.root)} --stats",
                )
            journal.append(Entry(progress.states, squares.pop(key)))
            flusher.advance(sum(writer.nbytes for writer in writers))

    tensors = [item.tensor for item in plan.layouts[0].tensors]
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
        with_scales = set()
        for index in range(done, len(tensors)):
            tensor = tensors[index]
            if tensor.is_scales and tensor.spec in with_scales:
                pipeline.add_scales(tensor)
            else:
                for cut in cuts_of(plan.layouts, index, limit=plan.array_nbytes):
                    for progress in pipeline.add(cut):
                        record(progress)
                if tensor.is_matrix and not is_stored_alike(plan.tensors, tensor):
                    with_scales.add(tensor.spec)
            pipeline.end_tensor(tensor)
        for progress in pipeline.drain():
            record(progress)
        flusher.finish()


def _errors(plan: ReshardPlan, journal: Journal) -> dict[str, float]:
    """Relative root mean square error of every weight that the release quantizes."""
    return {
        item.tensor.key: entry.squares.relative_rms
        for item, entry in zip(plan.layouts[0].tensors, journal.entries, strict=True)
        if item.tensor.spec.is_quantized and not item.tensor.is_scales
    }
