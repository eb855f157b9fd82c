"""Execute a planned reshard: in bounded memory, resumable, published atomically."""

from functools import partial

from grokctl.checkpoint.manifest import Manifest, Source, manifest_bytes
from grokctl.checkpoint.ready import ReadyCheckpoint, open_ready
from grokctl.checkpoint.receipt import Receipt
from grokctl.events import Observer, ignore
from grokctl.resharding.convert import Squares
from grokctl.resharding.execution import execute
from grokctl.resharding.filling import Filled
from grokctl.resharding.partial import PartialFolder
from grokctl.resharding.plan import ReshardPlan
from grokctl.resharding.small_files import write_manifest, write_tokenizer
from grokctl.resharding.source_check import SourceCheck


def reshard(
    plan: ReshardPlan,
    *,
    proof: Receipt | None = None,
    check: SourceCheck | None = None,
    force: bool = False,
    observe: Observer = ignore,
) -> ReadyCheckpoint:
    """Write a ready checkpoint; its folder appears only once every byte of it is on disk.

    Args:
        plan: From `plan_reshard`.
        proof: The receipt of a release, of the infohash or of a hub; the manifest records it.
        check: Proves a release while it is read, instead of a receipt: from `verify.verifying`.
        force: Whether to replace a ready checkpoint of the same name.
        observe: Receives progress in bytes written, before compression.

    Raises:
        UsageError: The destination exists, or cannot be written.
        DiskFullError: The disk is full; the partial folder is kept for the next run.
        CorruptCheckpointError: The source changed, or is not as its manifest or its proof says.
    """
    finish = partial(_write_rest, plan)
    execute(plan, finish, proof=proof, check=check, force=force, observe=observe)
    return open_ready(plan.out)


def _write_rest(plan: ReshardPlan, folder: PartialFolder, origin: Source, filled: Filled) -> str:
    """Write the tokenizer, the checksums and, last, the manifest; returns the sha256 of that."""
    filled.records.extend(write_tokenizer(plan.source, origin, folder))
    manifest = manifest_bytes(
        Manifest(
            storage=plan.storage,
            mesh=plan.mesh,
            source=origin,
            devices=tuple(layout.device for layout in plan.layouts),
            compression=plan.compression,
            errors=_errors(plan, filled.squares),
            files=tuple(filled.records),
        )
    )
    return write_manifest(folder, filled.records, manifest)


def _errors(plan: ReshardPlan, squares: tuple[Squares, ...]) -> dict[str, float]:
    """Relative root mean square error of every weight that the release quantizes."""
    return {
        item.tensor.key: own.relative_rms
        for item, own in zip(plan.layouts[0].tensors, squares, strict=True)
        if item.tensor.spec.is_quantized and not item.tensor.is_scales
    }
