"""Plan an export from what a user asks for: open the source, choose the type and the name."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grokctl.checkpoint.gguf_checkpoint import open_gguf
from grokctl.checkpoint.ready import open_ready
from grokctl.checkpoint.receipt import Receipt, proof_of
from grokctl.checkpoint.release import open_release
from grokctl.events import Observer, ignore
from grokctl.exporting.options import EmbeddingType, ExportOptions, ExportType, Format
from grokctl.exporting.plan import ExportPlan, plan_export
from grokctl.integrity.provenance import describe_hashed, describe_proof
from grokctl.model.precision import Precision
from grokctl.paths import kind_of
from grokctl.resharding.estimate import Estimate
from grokctl.resharding.publish import check_destination, check_space, destination

if TYPE_CHECKING:
    from grokctl.checkpoint.published import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What to export, and how; None takes the default."""

    root: Path
    """A release or a ready checkpoint."""
    folder: Path
    """Gets the result under its usual name, unless `out` is given."""
    format: Format = Format.GGUF
    type: ExportType | None = None
    embedding: EmbeddingType | None = None
    out: Path | None = None
    split: int | None = None
    jobs: int | None = None
    max_memory: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedExport:
    """A plan, and what is known about the content of its source."""

    plan: ExportPlan
    proof: Receipt | None
    """The receipt that covers a release, of the infohash or of a hub."""
    provenance: str
    """The same in one line for people."""


def plan_export_request(request: ExportRequest, *, observe: Observer = ignore) -> PlannedExport:
    """Open the source of a request and plan its export.

    Args:
        request: What is asked for.
        observe: Receives progress while a release is opened.

    Raises:
        GrokctlError: The source cannot be opened, or as `plan_export` does.
    """
    source: Checkpoint
    proof = None
    kind = kind_of(request.root)
    if kind in {"ready", "export"}:
        is_ready = kind == "ready"
        made = open_ready(request.root, is_streamed=True) if is_ready else open_gguf(request.root)
        source, name, precision = made, made.source.folder, made.precision
        provenance = describe_hashed(made)
    else:
        source = release = open_release(request.root, observe=observe)
        name, precision = release.name, Precision.INT8
        found = proof_of(release)
        proof, provenance = found.best, describe_proof(found, request.root)
    is_hf = request.format is Format.HF
    weights = request.type or (ExportType.BF16 if is_hf else _usual_type(precision))
    embedding = request.embedding
    if embedding is None:
        embedding = EmbeddingType.BF16 if is_hf else EmbeddingType.F32
    usual = request.folder / f"{name}-{weights}-{request.format}"
    options = ExportOptions(
        out=destination(request.out or usual),
        format=request.format,
        type=weights,
        embedding=embedding,
        name=name,
        split=request.split,
        jobs=request.jobs,
        max_memory=request.max_memory,
    )
    plan = plan_export(source, options)
    return PlannedExport(plan=plan, proof=proof, provenance=provenance)


def _usual_type(precision: Precision) -> ExportType:
    """The type that loses nothing, and takes the least room, for weights of a precision."""
    match precision:
        case Precision.INT8:
            return ExportType.Q8_0
        case Precision.INT4:
            return ExportType.Q4_0
        case Precision.BFLOAT16:
            return ExportType.BF16
        case Precision.FLOAT32:
            return ExportType.F32


def check_export(plan: ExportPlan, estimate: Estimate) -> None:
    """Refuse what the export itself would refuse.

    Raises:
        UsageError: The destination is taken, or cannot be written.
        DiskFullError: The result does not fit.
    """
    check_destination(plan, force=False)
    check_space(plan, estimate.nbytes, estimate.free_nbytes)
