"""Execute a plan: in bounded memory, resumable, published atomically."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from grokctl.checkpoint.hub_record import HUB_PROOF, INFOHASH_PROOF
from grokctl.checkpoint.manifest import Source
from grokctl.checkpoint.ready_receipt import keep_ready_receipt, receipt_now
from grokctl.checkpoint.receipt import Receipt, Stamp, stamps_of
from grokctl.checkpoint.release import Release
from grokctl.checkpoint.sums import require_sums
from grokctl.errors import CorruptCheckpointError, UnsafePickleError, UsageError
from grokctl.events import Finished, Noted, Observer
from grokctl.ownership import why_exposed
from grokctl.paths import locked_open, quoted
from grokctl.resharding.filling import Filled, fill
from grokctl.resharding.output import OutputPlan
from grokctl.resharding.partial import PartialFolder, opened_partial
from grokctl.resharding.publish import (
    can_be_exchanged,
    check_destination,
    check_tokenizer,
    check_unchanged,
    leftovers,
    origin_of,
    partial_folder,
    publish,
    refuse_altered,
    take_back,
    writing,
)
from grokctl.resharding.source_check import SourceCheck
from grokctl.resharding.source_hashing import SourceHashing

Finish = Callable[[PartialFolder, Source, Filled], str]
"""Writes all other files into a partial folder, adds their records, and returns the sha256 of the
manifest, which it writes last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """An execution on its way."""

    plan: OutputPlan
    partial: PartialFolder
    stamps: Mapping[Path, Stamp | None]
    """Of the source's files when it began."""
    proof: Receipt | None
    check: SourceCheck
    is_earlier: bool
    """Whether an earlier version began it, or somebody else may have."""


def execute(
    plan: OutputPlan,
    finish: Finish,
    *,
    proof: Receipt | None,
    check: SourceCheck | None = None,
    force: bool,
    observe: Observer,
) -> None:
    """Write a folder; it appears only once every byte of it is on disk.

    Files grow side by side in a hidden sibling folder, and are hashed as they are written. A killed
    run continues after the last tensor that all of them contain, once the files so far have been
    hashed again. The files of a ready checkpoint are hashed while they are read, and compared with
    its manifest before anything is published, unless its receipt covers them.

    Args:
        plan: What to write, and where.
        finish: Writes the small files.
        proof: The receipt of a release, of the infohash or of a hub; the manifest records it.
        check: Proves the source while it is read; by default, a proof or the sums of a ready
            checkpoint are enough.
        force: Whether to replace a folder of the same name and kind.
        observe: Receives progress in bytes written, before compression.

    Raises:
        UsageError: The destination exists, or cannot be written.
        DiskFullError: The disk is full; the partial folder is kept for the next run.
        CorruptCheckpointError: The source changed, or is not as its manifest or its proof says.
    """
    source = plan.source
    if not isinstance(source, Release):
        require_sums(source)
    identity = None if check is None else check.identity
    # what arrives is proven before it is read, and its stamps are compared with those of the proof
    stamps = {} if identity else stamps_of(source)
    check_tokenizer(source)
    with writing(plan.out):
        check_destination(plan, force=force)
        is_exposed = identity is None and can_be_exchanged(source)
        usual, is_earlier = partial_folder(plan, stamps, is_exposed=is_exposed, identity=identity)
        with opened_partial(usual, plan.kind, observe) as partial:
            if (problem := why_exposed(partial.path)) is not None:
                observe(Noted(message=f"{problem}: other users can replace the checkpoint"))
            for other in leftovers(partial.path, plan.out):
                message = "left by another run, or in use by one"
                observe(Noted(message=f"{other}: {message}; to delete it: rm -r {quoted(other)}"))
            is_earlier = partial.is_of_others or (is_earlier and partial.path == usual)
            run = _Run(
                plan=plan,
                partial=partial,
                stamps=stamps,
                proof=proof,
                check=SourceHashing(source, plan.stage) if check is None else check,
                is_earlier=is_earlier,
            )
            _write(run, finish, force=force, observe=observe)


def _write(run: _Run, finish: Finish, *, force: bool, observe: Observer) -> None:
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
        with run.check as check:
            filled = fill(plan, partial, check, observe)
            try:
                damage = check.finish(plan.bytes_out, observe)
            except (CorruptCheckpointError, UnsafePickleError):
                partial.delete()  # it was made from wrong bytes
                raise
            refuse_altered(source, damage, partial)
        observe(Finished(stage=plan.stage))
        proof = run.proof or check.receipt
        origin = origin_of(source, proof, is_earlier=run.is_earlier)
        manifest_sha256 = finish(partial, origin, filled)
        check_unchanged(source, run.stamps, proof, partial)
        check_destination(plan, force=force)  # another program may have written it
        publish(partial, plan.out, observe)
        # every byte was hashed as it was written, and no name or mode changes any more
        names = [record.name for record in filled.records]
        receipt = receipt_now(
            plan.out,
            manifest_sha256,
            names,
            root_of_trust=origin.root_of_trust or "",
            proven_by=INFOHASH_PROOF if origin.proven else HUB_PROOF,
            manifest=plan.kind.manifest,
        )
        keep_ready_receipt(plan.out, receipt, observe, manifest=plan.kind.manifest)
