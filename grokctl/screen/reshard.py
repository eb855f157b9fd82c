"""A plan for a reshard, and a finished ready checkpoint."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from grokctl.paths import quoted
from grokctl.screen.console import show
from grokctl.text import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:  # a verb pays for its own stage only
    from grokctl.checkpoint.ready import ReadyCheckpoint
    from grokctl.model.placement import MeshShape
    from grokctl.resharding.estimate import Estimate
    from grokctl.resharding.plan import ReshardPlan
    from grokctl.screen.console import Console


def reshard_plan(console: Console, plan: ReshardPlan, found: Estimate) -> None:
    """What a reshard would write, and how long that would take here."""
    seconds = found.seconds(plan)
    written = format_bytes(plan.bytes_out)
    if plan.compression:
        written = f"about {format_bytes(found.nbytes)}, {written} before {plan.compression}"
    disk = "cannot be written" if found.disk_rate is None else format_rate(found.disk_rate)
    fits = "fits" if found.nbytes <= found.free_nbytes else "does NOT fit"
    show(
        console,
        {
            "ready": str(plan.out),
            "devices": plan.mesh.size,
            "mesh": str(plan.mesh),
            "precision": plan.precision,
            "compression": None if plan.compression is None else str(plan.compression),
            "bytes_in": plan.bytes_in,
            "bytes": found.nbytes,
            "plain_bytes": plan.bytes_out,
            "bytes_per_device": plan.layouts[0].nbytes,
            "peak_bytes": plan.peak_bytes,
            "free_bytes": found.free_nbytes,
            "fits": found.nbytes <= found.free_nbytes,
            "work_bytes_per_s": found.work_rate,
            "disk_bytes_per_s": found.disk_rate,
            "seconds": seconds,
            "jobs": plan.jobs,
        },
        "would reshard",
        [
            ("to", str(plan.out)),
            ("devices", _devices(plan.mesh, len(plan.layouts))),
            ("precision", plan.precision),
            ("reads", format_bytes(plan.bytes_in)),
            ("writes", f"{written}; {format_bytes(found.free_nbytes)} free: {fits}"),
            ("a device", format_bytes(plan.layouts[0].nbytes)),
            ("memory", f"{format_bytes(plan.peak_bytes)} in {plan.jobs} threads"),
            ("work", f"{format_rate(found.work_rate)}, tried on a little of it"),
            ("disk", disk),
            ("time", f"about {format_seconds(seconds)}"),
        ],
    )


def _devices(mesh: MeshShape, count: int) -> str:
    some = "" if count == mesh.size else f"{count} of "
    return f"{some}{mesh.size} ({mesh})"


def resharded(
    console: Console, ready: ReadyCheckpoint, plan: ReshardPlan, *, seconds: float, peak_rss: int
) -> None:
    """A finished ready checkpoint."""
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
            "proven": ready.source.proven,
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
    )


def _losses(ready: ReadyCheckpoint) -> list[tuple[str, str]]:
    """The largest relative root mean square error of each kind of weight."""
    worst: dict[str, float] = {}
    for key, error in ready.manifest.errors.items():
        kind = re.sub(r"^layers\.[0-9]+\.|\.weight$", "", key)
        worst[kind] = max(worst.get(kind, 0.0), error)
    if not any(worst.values()):
        return [("lost", "nothing: every weight is exactly what it was")]
    width = max(map(len, worst))
    return [
        ("lost (rms)" if not place else "", f"{kind:{width}}  {error:.2%}")
        for place, (kind, error) in enumerate(sorted(worst.items(), key=lambda item: -item[1]))
    ]


def _compressed(ready: ReadyCheckpoint, plan: ReshardPlan, seconds: float) -> list[tuple[str, str]]:
    if plan.compression is None:
        return []
    ratio = ready.nbytes / plan.bytes_out
    rate = format_rate(plan.bytes_out / seconds)
    return [("compressed", f"to {ratio:.0%} of {format_bytes(plan.bytes_out)}, {rate} before it")]
