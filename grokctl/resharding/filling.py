"""Write the files of a plan, side by side, in bounded memory; continue after an interruption."""

import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from grokctl.checkpoint.manifest import FileRecord
from grokctl.errors import DiskFullError, Reason, corrupt
from grokctl.events import Advanced, Noted, Observer, Started
from grokctl.paths import quoted
from grokctl.resharding.convert import NOTHING, Squares
from grokctl.resharding.output import OutputPlan
from grokctl.resharding.partial import PartialFolder
from grokctl.resharding.pipeline import Pipeline, Progress
from grokctl.resharding.publish import check_space
from grokctl.resharding.source_check import SourceCheck
from grokctl.resharding.writers import Entry, FileWriter, Flusher, Journal, resume


@dataclass(frozen=True, slots=True)
class Filled:
    """Files that are on disk to the last byte."""

    records: list[FileRecord]
    squares: tuple[Squares, ...]
    """The rounding error of each tensor of the plan."""


def fill(plan: OutputPlan, partial: PartialFolder, check: SourceCheck, observe: Observer) -> Filled:
    """Write and sync every file of a plan.

    Args:
        plan: What to write.
        partial: Where; what an earlier run has written of it is kept if it has its hashes.
        check: Of the source, which trails the writing.
        observe: Receives progress in bytes written, before compression.

    Raises:
        DiskFullError: The disk is full.
        CorruptCheckpointError: The source changed, or has values that are not finite.
    """
    if plan.compression is None:  # the size of compressed files is unknown
        _require_room(plan, partial)
    with ExitStack() as stack:
        writers: list[FileWriter] = []
        for layout in plan.layouts:
            writers.append(FileWriter(layout, partial, plan.compression))
            stack.callback(writers[-1].close)
        journal = Journal(partial, len(writers))
        stack.callback(journal.close)
        is_begun = journal.is_begun
        observe(Started(stage=plan.stage, total=plan.bytes_out))
        done = resume(writers, journal, plan.stage, observe)
        if done:
            check.include_all()
            message = f"continuing after {done} of {len(plan.keys)} tensors of an interrupted run"
            observe(Noted(message=message))
        elif is_begun:
            message = "starting again: the journal of an interrupted run does not match its files"
            observe(Noted(message=message))
        _write_tensors(plan, writers, journal, check, observe)
        squares = tuple(entry.squares for entry in journal.entries)
        return Filled([writer.record() for writer in writers], squares)


def _require_room(plan: OutputPlan, partial: PartialFolder) -> None:
    """Refuse what does not fit; a folder in which nothing is begun goes away again."""
    free = shutil.disk_usage(partial.handle).free
    try:
        check_space(plan, plan.bytes_out - partial.nbytes, free)
    except DiskFullError:
        if partial.is_empty:
            partial.delete()
        raise


def _write_tensors(
    plan: OutputPlan,
    writers: Sequence[FileWriter],
    journal: Journal,
    check: SourceCheck,
    observe: Observer,
) -> None:
    """Write the tensors that are not in the journal yet."""
    done = len(journal.entries)
    written = sum(writer.plain_nbytes for writer in writers)
    squares: dict[str, Squares] = {}
    flusher = Flusher(writers)

    def record(progress: Progress) -> None:
        nonlocal written
        key = progress.key
        written += progress.nbytes
        squares[key] = squares.get(key, NOTHING) + progress.squares
        observe(Advanced(stage=plan.stage, done=written, detail=key))
        check.follow(written, plan.bytes_out, observe)
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

    with flusher, Pipeline(plan, writers) as pipeline:
        for index in range(done, len(plan.keys)):
            first = plan.made_with(index)
            if first is not None and first >= done:
                pipeline.add_scales(plan.keys[index])
            else:
                for piece in plan.pieces(index):
                    for progress in pipeline.add(piece):
                        record(progress)
            pipeline.end_tensor(plan.keys[index])
        for progress in pipeline.drain():
            record(progress)
        flusher.finish()
