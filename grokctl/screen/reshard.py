"""Print a plan for a reshard, or a finished ready checkpoint."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from grokctl.checkpoint.hub_record import INFOHASH_PROOF
from grokctl.paths import quoted
from grokctl.screen.console import show
from grokctl.text import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:  # a screen imports no stage
    from grokctl.checkpoint.ready import ReadyCheckpoint
    from grokctl.model.placement import MeshShape
    from grokctl.resharding.estimate import Estimate
    from grokctl.resharding.plan import ReshardPlan
    from grokctl.screen.console import Console


def reshard_plan(console: Console, plan: ReshardPlan, estimate: Estimate) -> None:
    """Print what a reshard would write, and an estimate of its time."""
    seconds = estimate.seconds(plan)
    written = format_bytes(plan.bytes_out)
    if plan.compression:
        written = f"about {format_bytes(estimate.nbytes)}, {written} before {plan.compression}"
    disk = "not writable" if estimate.disk_rate is None else format_rate(estimate.disk_rate)
    fits = "fits" if estimate.nbytes <= estimate.free_nbytes else "does NOT fit"
    show(
        console,
        {
            "ready": str(plan.out),
            "devices": plan.mesh.size,
            "mesh": str(plan.mesh),
            "precision": plan.precision,
            "compression": None if plan.compression is None else str(plan.compression),
            "bytes_in": plan.bytes_in,
            "bytes": estimate.nbytes,
            "plain_bytes": plan.bytes_out,
            "bytes_per_device": plan.layouts[0].nbytes,
            "peak_bytes": plan.peak_bytes,
            "free_bytes": estimate.free_nbytes,
            "fits": estimate.nbytes <= estimate.free_nbytes,
            "work_bytes_per_s": estimate.work_rate,
            "disk_bytes_per_s": estimate.disk_rate,
            "seconds": seconds,
            "jobs": plan.jobs,
        },
        "would reshard",
        [
            ("to", str(plan.out)),
            ("devices", _devices(plan.mesh, len(plan.layouts))),
            ("precision", plan.precision),
            ("reads", format_bytes(plan.bytes_in)),
            ("writes", f"{written}; {format_bytes(estimate.free_nbytes)} free: {fits}"),
            ("for each device", format_bytes(plan.layouts[0].nbytes)),
            ("memory", f"{format_bytes(plan.peak_bytes)} in {plan.jobs} threads"),
            ("work", f"{format_rate(estimate.work_rate)}, measured on a sample"),
            ("disk", disk),
            ("time", f"about {format_seconds(seconds)}"),
        ],
    )


def _devices(mesh: MeshShape, count: int) -> str:
    part = "" if count == mesh.size else f"{count} of "
    return f"{part}{mesh.size} ({mesh})"


def resharded(
    console: Console,
    ready: ReadyCheckpoint,
    plan: ReshardPlan,
    *,
    proven_by: str | None,
    seconds: float,
    peak_rss: int,
) -> None:
    """Print a finished ready checkpoint."""
    show(
        console,
        {
            "ready": str(ready.root),
            "devices": ready.mesh.size,
            "only_devices": None if ready.is_whole else ready.manifest.devices,
            "mesh": str(ready.mesh),
            "precision": ready.precision,
            "compression": None if plan.compression is None else str(plan.compression),
            "bytes": ready.nbytes,
            "plain_bytes": plan.bytes_out,
            "bytes_in": plan.bytes_in,
            "proven": proven_by == INFOHASH_PROOF,
            "proven_by": proven_by,
            "relative_rms_error": ready.manifest.errors,
            "peak_rss_bytes": peak_rss,
            "seconds": seconds,
        },
        f"resharded {ready.source.name}",
        [
            ("ready", str(ready.root)),
            ("devices", _devices(ready.mesh, len(ready.manifest.devices))),
            ("precision", ready.precision),
            *_losses(ready),
            ("bytes", f"{format_bytes(ready.nbytes)} in {format_seconds(seconds)}"),
            *_compressed(ready, plan, seconds),
            ("peak memory", format_bytes(peak_rss)),
            ("next", f"grokctl run {quoted(ready.root)}"),
        ],
        brief=f"resharded {ready.source.name}: {ready.root}",
    )


def _losses(ready: ReadyCheckpoint) -> list[tuple[str, str]]:
    """The largest relative root mean square error of each weight over all layers."""
    worst: dict[str, float] = {}
    for key, error in ready.manifest.errors.items():
        name = re.sub(r"^layers\.[0-9]+\.|\.weight$", "", key)
        worst[name] = max(worst.get(name, 0.0), error)
    if not any(worst.values()):
        return [("error", "none: all weights are exact")]
    width = max(map(len, worst))
    return [
        ("error (rms)" if not place else "", f"{name:{width}}  {error:.2%}")
        for place, (name, error) in enumerate(sorted(worst.items(), key=lambda item: -item[1]))
    ]


def _compressed(ready: ReadyCheckpoint, plan: ReshardPlan, seconds: float) -> list[tuple[str, str]]:
    if plan.compression is None:
        return []
    ratio = ready.nbytes / plan.bytes_out
    rate = format_rate(plan.bytes_out / seconds)
    return [
        (
            "compressed",
            f"to {ratio:.0%} of {format_bytes(plan.bytes_out)}, {rate} before compression",
        )
    ]
