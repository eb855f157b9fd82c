"""Execute a planned export: the files that other engines read, resumable and atomic."""

from functools import partial

from grokctl.checkpoint.export_manifest import (
    Export,
    ExportManifest,
    export_manifest_bytes,
    open_export,
)
from grokctl.checkpoint.manifest import Source
from grokctl.checkpoint.receipt import Receipt
from grokctl.events import Observer, ignore
from grokctl.exporting.plan import ExportPlan
from grokctl.resharding.execution import execute
from grokctl.resharding.filling import Filled
from grokctl.resharding.partial import PartialFolder
from grokctl.resharding.small_files import write_manifest, write_small, write_tokenizer


def export(plan: ExportPlan, *, proof: Receipt | None = None, observe: Observer = ignore) -> Export:
    """Write an export; its folder appears only once every byte of it is on disk.

    Args:
        plan: From `plan_export`.
        proof: The receipt of a release, of the infohash or of a hub; the manifest records it.
        observe: Receives progress in bytes written.

    Raises:
        UsageError: The destination exists, or cannot be written.
        DiskFullError: The disk is full; the partial folder is kept for the next run.
        CorruptCheckpointError: The source changed, is not as its manifest or its proof says, or has
            values that are not finite.
    """
    execute(plan, partial(_write_rest, plan), proof=proof, force=False, observe=observe)
    return open_export(plan.out)


def _write_rest(plan: ExportPlan, folder: PartialFolder, origin: Source, filled: Filled) -> str:
    """Write the small files, the checksums and, last, the manifest; returns the sha256 of that."""
    filled.records.extend(write_tokenizer(plan.source, origin, folder))
    filled.records.extend(write_small(folder, name, data) for name, data in plan.small.items())
    errors = {
        part.name: squares.relative_rms
        for part, squares in zip(plan.parts, filled.squares, strict=True)
        if squares.error
    }
    manifest = ExportManifest(
        format=plan.options.format,
        type=plan.options.type,
        embedding=plan.options.embedding,
        config=plan.storage.config,
        source=origin,
        errors=errors,
        folded=tuple(sorted(plan.fitted.shifts)),
        float32=tuple(plan.float32),
        files=tuple(filled.records),
    )
    return write_manifest(folder, filled.records, export_manifest_bytes(manifest))
