"""Fetch, verify and reshard a release with one command, which goes on where it stopped."""

import time
from dataclasses import dataclass
from pathlib import Path

from grokctl.checkpoint.ready import ReadyCheckpoint, read_manifest
from grokctl.checkpoint.refusal import read_refusal
from grokctl.checkpoint.sums import proof_kind
from grokctl.events import Observer, ignore
from grokctl.fetch import fetch
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.overlap import Overlap, Target
from grokctl.paths import kind_of
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardPlan
from grokctl.resharding.request import ReshardRequest, plan_request
from grokctl.transfer.fetched import Fetched
from grokctl.transfer.sources import FetchOptions
from grokctl.verify import verifying


@dataclass(frozen=True, slots=True, kw_only=True)
class UpRequest:
    """A release to get ready for devices."""

    source: str
    """`grok-1`, a magnet link, or the path of a `.torrent` file."""
    root: Path
    """The release's folder."""
    ready: Path
    """The folder of ready checkpoints."""
    mesh: MeshShape
    precision: Precision | None
    """None keeps the released integers."""
    options: FetchOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class GotReady:
    """A release that was fetched and proven, and the ready checkpoint made from it."""

    fetched: Fetched
    ready: ReadyCheckpoint
    proven_by: str | None
    """`infohash`, `hub sha256`, or None."""
    is_new: bool
    """Whether the ready checkpoint was made now; another run may have made it before."""
    seconds: float


def up(request: UpRequest, *, observe: Observer = ignore) -> GotReady:
    """Fetch, verify and reshard a release, as far as that is not done yet.

    Killed at any moment, the same call goes on: each stage continues where it stopped, and one that
    is complete takes a look at stamps. From a swarm, files come in the order in which they are cut;
    each one that is complete is read once, to prove it and to cut it, while the next ones arrive.
    Nothing is published before every byte is proven.

    Args:
        request: What to fetch, and for which devices.
        observe: Receives the progress of each stage.

    Raises:
        GrokctlError: As the stage that failed does: `fetch`, `verify` or `reshard`.
    """
    began = time.monotonic()
    overlap = Overlap(
        Target(
            root=request.root,
            folder=request.ready,
            mesh=request.mesh,
            precision=request.precision,
        )
    )
    try:
        observe_all = overlap.relayed(observe)
        fetched = fetch(
            request.source, request.root, request.options, arrivals=overlap, observe=observe_all
        )
        made = overlap.finish(observe)
    finally:
        overlap.close()
    is_new = True
    if made is None:
        made, is_new = _made_after(request, observe)
    return GotReady(
        fetched=fetched,
        ready=made,
        proven_by=proof_kind(made, is_hashed=False),
        is_new=is_new,
        seconds=time.monotonic() - began,
    )


def _made_after(request: UpRequest, observe: Observer) -> tuple[ReadyCheckpoint, bool]:
    """The ready checkpoint of a release that is all there, and whether it is new."""
    planned = plan_request(
        ReshardRequest(
            root=request.root,
            folder=request.ready,
            mesh=request.mesh,
            precision=request.precision,
        ),
        observe=observe,
    )
    plan, proof = planned.plan, planned.proof
    if (made := _made_before(plan)) is not None:
        return made, False
    check = verifying(request.root, observe=observe) if proof is None else None
    return reshard(plan, proof=proof, check=check, observe=observe), True


def _made_before(plan: ReshardPlan) -> ReadyCheckpoint | None:
    """The ready checkpoint of a plan, if it is there: whole, of this mesh, and not damaged."""
    if kind_of(plan.out) != "ready" or read_refusal(plan.out) is not None:
        return None
    ready = read_manifest(plan.out)
    is_same = ready.is_whole and (ready.mesh, ready.storage) == (plan.mesh, plan.storage)
    return ready if is_same else None
