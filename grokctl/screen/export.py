"""Print a plan for an export, or a finished export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grokctl.checkpoint.hub_record import INFOHASH_PROOF
from grokctl.paths import quoted
from grokctl.screen.console import show
from grokctl.text import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:  # a screen imports no stage
    from collections.abc import Collection
    from pathlib import Path

    from grokctl.checkpoint.export_manifest import Export
    from grokctl.exporting.plan import ExportPlan
    from grokctl.resharding.estimate import Estimate
    from grokctl.screen.console import Console


def export_plan(console: Console, plan: ExportPlan, estimate: Estimate) -> None:
    """Print what an export would write, and an estimate of its time."""
    seconds = estimate.seconds(plan)
    disk = "not writable" if estimate.disk_rate is None else format_rate(estimate.disk_rate)
    is_fitting = estimate.nbytes <= estimate.free_nbytes
    fits = "fits" if is_fitting else "does NOT fit"
    room = f"{format_bytes(estimate.free_nbytes)} free: {fits}"
    files = [layout.name for layout in plan.layouts]
    show(
        console,
        {
            "export": str(plan.out),
            "format": plan.options.format,
            "type": plan.options.type,
            "embedding": plan.options.embedding,
            "files": files,
            "bytes_in": plan.bytes_in,
            "bytes": plan.bytes_out,
            "lossless": plan.is_lossless,
            "scales": {
                "checked": plan.fitted.checked,
                "misfits": plan.fitted.misfits,
                "folded": sorted(plan.fitted.shifts),
            },
            "float32": plan.float32,
            "peak_bytes": plan.peak_bytes,
            "free_bytes": estimate.free_nbytes,
            "fits": is_fitting,
            "work_bytes_per_s": estimate.work_rate,
            "disk_bytes_per_s": estimate.disk_rate,
            "seconds": seconds,
            "jobs": plan.jobs,
        },
        "would export",
        [
            ("to", str(plan.out)),
            ("files", files[0] if len(files) == 1 else f"{files[0]} … of {len(files)}"),
            ("type", _type(plan.options.type, plan.options.embedding)),
            *_scales(plan),
            ("reads", format_bytes(plan.bytes_in)),
            ("writes", f"{format_bytes(plan.bytes_out)}; {room}"),
            ("memory", f"{format_bytes(plan.peak_bytes)} in {plan.jobs} threads"),
            ("work", f"{format_rate(estimate.work_rate)}, measured on a sample"),
            ("disk", disk),
            ("time", f"about {format_seconds(seconds)}"),
        ],
    )


def exported(
    console: Console,
    export: Export,
    plan: ExportPlan,
    *,
    proven_by: str | None,
    seconds: float,
    peak_rss: int,
) -> None:
    """Print a finished export."""
    manifest = export.manifest
    show(
        console,
        {
            "export": str(export.root),
            "format": manifest.format,
            "type": manifest.type,
            "embedding": manifest.embedding,
            "files": [record.name for record in manifest.files],
            "bytes": export.nbytes,
            "lossless": manifest.is_lossless,
            "relative_rms_error": manifest.errors,
            "folded": manifest.folded,
            "float32": manifest.float32,
            "proven": proven_by == INFOHASH_PROOF,
            "proven_by": proven_by,
            "peak_rss_bytes": peak_rss,
            "seconds": seconds,
        },
        f"exported {export.source.name}",
        [
            ("export", str(export.root)),
            ("type", _type(manifest.type, manifest.embedding)),
            *_scales(plan),
            ("error", _loss(manifest.errors)),
            ("bytes", f"{format_bytes(export.nbytes)} in {format_seconds(seconds)}"),
            ("peak memory", format_bytes(peak_rss)),
            *_next(export.root, plan),
        ],
        brief=f"exported {export.source.name}: {export.root}",
    )


def _next(root: Path, plan: ExportPlan) -> list[tuple[str, str]]:
    """The command that runs the export."""
    if plan.options.format != "gguf":
        return [("next", f"less {quoted(root / 'README.md')}")]
    first = quoted(root / plan.layouts[0].name)
    return [("next", f"llama-cli -m {first} -p 'The answer to life is' -n 32 -no-cnv")]


def _type(kind: str, embedding: str) -> str:
    return kind if kind == embedding else f"{kind}, embedding {embedding}"


def _loss(errors: dict[str, float] | object) -> str:
    """The largest relative root mean square error over all tensors."""
    assert isinstance(errors, dict)
    if not errors:
        return "none: all weights are exact"
    worst = max(errors, key=lambda name: errors[name])
    return f"at most {errors[worst]:.2%} (rms), of {worst}"


def _scales(plan: ExportPlan) -> list[tuple[str, str]]:
    """What was found about scales, and the weights that are float32."""
    fitted, rows = plan.fitted, []
    if fitted.checked:
        words = "all exact in float16"
        if fitted.misfits:
            words = f"{fitted.misfits:,} of {fitted.checked:,} do not fit float16"
            words += _named("; folded by powers of two: ", fitted.shifts.keys())
            words += _named("; written as float32: ", fitted.float32)
        rows.append(("scales", words))
    if plan.contents.narrow:
        rows.append(("float32", _named("inputs are no whole blocks of 32: ", plan.contents.narrow)))
    return rows


def _named(words: str, names: Collection[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{words}{min(names)}{more}"
