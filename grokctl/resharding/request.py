"""Plan a reshard from what a user asks for: open the source, choose the mesh and the name."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grokctl.checkpoint.frames import Compression
from grokctl.checkpoint.gguf_checkpoint import open_gguf
from grokctl.checkpoint.ready import open_ready
from grokctl.checkpoint.receipt import Receipt, proof_of
from grokctl.checkpoint.release import open_release
from grokctl.errors import UsageError
from grokctl.events import Observer, ignore
from grokctl.integrity.provenance import describe_hashed, describe_proof
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.paths import kind_of
from grokctl.resharding.estimate import Estimate
from grokctl.resharding.plan import ReshardOptions, ReshardPlan, plan_reshard, usual_name
from grokctl.resharding.publish import check_destination, check_space, destination

if TYPE_CHECKING:
    from grokctl.checkpoint.published import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardRequest:
    """What to reshard, and how; None takes the default."""

    root: Path
    """A release, a ready checkpoint, or an export in GGUF."""
    folder: Path
    """Gets the result under its usual name, unless `out` is given."""
    out: Path | None = None
    mesh: MeshShape | None = None
    """By default that of a ready checkpoint; a release has none."""
    precision: Precision | None = None
    group_size: int | None = None
    compression: Compression | None = None
    devices: frozenset[int] | None = None
    """Whose files to write."""
    jobs: int | None = None
    max_memory: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedReshard:
    """A plan, and what is known about the content of its source."""

    plan: ReshardPlan
    proof: Receipt | None
    """The receipt that covers a release, of the infohash or of a hub."""
    provenance: str
    """The same in one line for people."""


def plan_request(request: ReshardRequest, *, observe: Observer = ignore) -> PlannedReshard:
    """Open the source of a request and plan its reshard.

    Args:
        request: What is asked for.
        observe: Receives progress while a release is opened.

    Raises:
        UsageError: The request names no mesh for a release.
        GrokctlError: The source cannot be opened, or as `plan_reshard` does.
    """
    source: Checkpoint
    mesh, proof = request.mesh, None
    kind = kind_of(request.root)
    if kind == "ready":
        source = ready = open_ready(request.root, is_streamed=True)
        mesh = mesh or ready.mesh
        provenance = describe_hashed(ready)
    elif kind == "export":
        source = made = open_gguf(request.root)
        provenance = describe_hashed(made)
    else:
        source = release = open_release(request.root, observe=observe)
        found = proof_of(release)
        proof, provenance = found.best, describe_proof(found, request.root)
    if mesh is None:
        raise UsageError("the number of devices is required", "--devices 8")
    name = usual_name(
        source, mesh=mesh, precision=request.precision, compression=request.compression
    )
    options = ReshardOptions(
        mesh=mesh,
        out=destination(request.out or request.folder / name),
        precision=request.precision,
        group_size=request.group_size,
        compression=request.compression,
        devices=request.devices,
        jobs=request.jobs,
        max_memory=request.max_memory,
    )
    plan = plan_reshard(source, options)
    return PlannedReshard(plan=plan, proof=proof, provenance=provenance)


def check_feasible(plan: ReshardPlan, estimate: Estimate, *, force: bool) -> None:
    """Refuse what the reshard itself would refuse.

    Args:
        plan: Not executed yet.
        estimate: Of the plan.
        force: Whether to replace a ready checkpoint of the same name.

    Raises:
        UsageError: The destination is taken, or cannot be written.
        DiskFullError: The result does not fit.
    """
    check_destination(plan, force=force)
    check_space(plan, estimate.nbytes, estimate.free_nbytes)
