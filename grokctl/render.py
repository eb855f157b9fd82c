"""Every result twice: as the JSON object that programs rely on, and as what people read."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grokctl.console import Console, format_bytes, format_seconds

if TYPE_CHECKING:  # a verb pays for its own stage only
    from grokctl.checkpoint.ready import ReadyCheckpoint
    from grokctl.checkpoint.receipt import Receipt
    from grokctl.demo import Demonstration
    from grokctl.destination import FetchPlan
    from grokctl.fetch import Fetched
    from grokctl.generation import Generation, Score
    from grokctl.inspect import Inspection
    from grokctl.reshard import ReshardPlan
    from grokctl.verify import Verdict

Facts = Sequence[tuple[str, str]]


def _show(console: Console, values: dict[str, Any], title: str, facts: Facts) -> None:
    if console.as_json:
        console.emit(values)
    else:
        console.facts(title, facts)


def proof(receipt: Receipt | None, root: Path) -> str:
    """What is known about the content of a release, in one line."""
    if receipt is not None:
        return f"{root.name}: every byte was proven on {receipt.verified_at}"
    command = f"grokctl verify {shlex.quote(str(root))}"
    return f"{root.name}: its content is not proven ({command})"


def fetch_plan(console: Console, plan: FetchPlan, root: Path) -> None:
    """What a fetch would do."""
    wanted = sum(file.is_wanted for file in plan.files)
    fits = "yes" if plan.fits else f"no, {format_bytes(plan.needed_nbytes)} are needed"
    _show(
        console,
        {
            "release": str(root),
            "infohash": plan.infohash,
            "bytes": plan.wanted_nbytes,
            "present_bytes": plan.present_nbytes,
            "free_bytes": plan.free_nbytes,
            "fits": plan.fits,
        },
        f"would fetch {plan.name}",
        [
            ("to", str(root)),
            ("infohash", plan.infohash),
            ("files", f"{wanted} of {len(plan.files)}"),
            ("bytes", format_bytes(plan.wanted_nbytes)),
            ("here already", format_bytes(plan.present_nbytes)),
            ("free on disk", format_bytes(plan.free_nbytes)),
            ("fits", fits),
        ],
    )


def fetched(console: Console, result: Fetched) -> None:
    """A finished download, and that its verification is owed."""
    _show(
        console,
        {
            "release": str(result.root),
            "infohash": result.infohash,
            "bytes": result.nbytes,
            "downloaded_bytes": result.downloaded,
            "seconds": result.seconds,
            "complete": result.is_complete,
            "extras": list(result.extras),
            "verified": False,
        },
        f"fetched {result.root.name}" + ("" if result.is_complete else ", not all of it"),
        [
            ("release", str(result.root)),
            ("infohash", result.infohash),
            ("bytes", format_bytes(result.nbytes)),
            (
                "downloaded",
                f"{format_bytes(result.downloaded)} in {format_seconds(result.seconds)}",
            ),
            *([("other files", ", ".join(result.extras))] if result.extras else []),
            ("still to do", f"grokctl verify {shlex.quote(str(result.root))}"),
        ],
    )


def verdict(console: Console, root: Path, found: Verdict, *, quick: bool, seconds: float) -> None:
    """What a verification found: all damage, or what is proven."""
    infohash = found.verified.receipt.infohash if found.verified else None
    if console.as_json:
        console.emit(
            {
                "checkpoint": str(root),
                "ok": not found.damage,
                "files": found.files,
                "bytes": found.nbytes,
                "hashed_bytes": found.hashed,
                "proven": found.verified is not None,
                "infohash": infohash,
                "damage": [asdict(damage) for damage in found.damage],
                "seconds": seconds,
            }
        )
        return
    if found.damage:
        console.table(
            f"{len(found.damage)} of {found.files} files are damaged",
            ("file", "reason", "bytes", "detail"),
            [
                (
                    damage.file,
                    damage.reason,
                    ", ".join(f"{low:,} to {high:,}" for low, high in damage.ranges),
                    damage.detail,
                )
                for damage in found.damage
            ],
        )
        return
    what = "the structure is sound; no content is proven" if quick else "every byte is right"
    console.facts(
        f"{found.name}: {what}",
        [
            ("files", f"{found.files:,}"),
            ("bytes", format_bytes(found.nbytes)),
            ("hashed now", f"{format_bytes(found.hashed)} in {format_seconds(seconds)}"),
            *([("infohash", infohash)] if infohash else []),
        ],
    )


def inspection(console: Console, found: Inspection) -> None:
    """A table of tensors."""
    if console.as_json:
        console.emit(
            {
                "checkpoint": str(found.root),
                "kind": found.kind,
                "config": found.config.to_dict(),
                "bytes": found.total_nbytes,
                "tensors": [asdict(row) for row in found.rows],
            }
        )
        return
    console.table(
        f"{found.root.name}: {found.kind} checkpoint, {format_bytes(found.total_nbytes)}",
        ("file", "tensor", "shape", "type", "scales", "size"),
        [
            (
                row.file,
                row.name,
                "x".join(map(str, row.shape)),
                row.dtype,
                str(row.scale_groups or ""),
                format_bytes(row.nbytes),
            )
            for row in found.rows
        ],
        right=("shape", "scales", "size"),
    )


def reshard_plan(console: Console, plan: ReshardPlan) -> None:
    """What a reshard would write."""
    _show(
        console,
        {
            "ready": str(plan.out),
            "devices": plan.mesh.size,
            "mesh": str(plan.mesh),
            "precision": plan.precision,
            "bytes_in": plan.bytes_in,
            "bytes": plan.bytes_out,
            "bytes_per_device": plan.layouts[0].nbytes,
            "peak_bytes": plan.peak_bytes,
            "jobs": plan.jobs,
        },
        "would reshard",
        [
            ("to", str(plan.out)),
            ("devices", f"{plan.mesh.size} ({plan.mesh})"),
            ("precision", plan.precision),
            ("reads", format_bytes(plan.bytes_in)),
            ("writes", format_bytes(plan.bytes_out)),
            ("a device", format_bytes(plan.layouts[0].nbytes)),
            ("memory", f"{format_bytes(plan.peak_bytes)} in {plan.jobs} threads"),
        ],
    )


def resharded(console: Console, ready: ReadyCheckpoint, *, seconds: float, peak_rss: int) -> None:
    """A finished ready checkpoint."""
    _show(
        console,
        {
            "ready": str(ready.root),
            "devices": ready.mesh.size,
            "mesh": str(ready.mesh),
            "precision": ready.precision,
            "bytes": ready.nbytes,
            "proven": ready.source.proven,
            "peak_rss_bytes": peak_rss,
            "seconds": seconds,
        },
        f"resharded {ready.source.name}",
        [
            ("ready", str(ready.root)),
            ("devices", f"{ready.mesh.size} ({ready.mesh})"),
            ("precision", ready.precision),
            ("bytes", f"{format_bytes(ready.nbytes)} in {format_seconds(seconds)}"),
            ("peak memory", format_bytes(peak_rss)),
            ("next", f"grokctl run {shlex.quote(str(ready.root))}"),
        ],
    )


def generation(console: Console, result: Generation) -> None:
    """The JSON object of a run; people have read the text already."""
    console.emit(
        {
            "prompt_tokens": result.prompt_tokens,
            "tokens": result.ids,
            "text": result.text,
            "finish_reason": result.finish_reason,
            "seed": result.seed,
            "stats": asdict(result.stats),
        }
    )


def stats(console: Console, result: Generation) -> None:
    """How fast a run was, in three lines on stderr."""
    found = result.stats
    rate = f"{found.decode_tokens_per_s:.1f} tokens/s"
    if found.bandwidth_fraction is not None:
        rate += f", {found.bandwidth_fraction:.1%} of memory bandwidth"
    console.note(
        f"load {format_seconds(found.load_s)} · compile {format_seconds(found.compile_s)} · "
        f"first token {format_seconds(found.first_token_s)}"
    )
    console.note(
        f"prompt {result.prompt_tokens} tokens at {found.prefill_tokens_per_s:.1f} tokens/s · "
        f"{len(result.ids)} new at {rate}"
    )
    console.note(
        f"{format_bytes(found.bytes_per_token)} a token · ended by {result.finish_reason} · "
        f"seed {result.seed}"
    )


def score(console: Console, found: Score, logits: Path | None) -> None:
    """A likelihood."""
    _show(
        console,
        {"tokens": found.tokens, "nll": found.nll, "perplexity": found.perplexity},
        "score",
        [
            ("tokens", f"{found.tokens:,}"),
            ("nll", f"{found.nll:.4f} nats"),
            ("perplexity", f"{found.perplexity:.4f}"),
            *([("logits", str(logits))] if logits else []),
        ],
    )


def demonstration(console: Console, found: Demonstration, keep: Path | None) -> None:
    """What the demo did, how long it took, and how to do the real thing."""
    if console.as_json:
        console.emit(
            {
                "ok": found.agrees,
                "steps": [asdict(step) for step in found.steps],
                "prompt": found.prompt,
                "texts": {str(devices): text for devices, text in found.texts.items()},
            }
        )
        return
    console.table(
        "what happened, for real, on a miniature",
        ("step", "result", "time"),
        [(step.name, step.result, format_seconds(step.seconds)) for step in found.steps],
        right=("time",),
    )
    same = "the same text" if found.agrees else "DIFFERENT TEXTS"
    console.facts(
        f"{same} on {', '.join(map(str, found.texts))} devices (weights are random, so is it)",
        [
            ("prompt", found.prompt),
            *((f"{devices} devices", text) for devices, text in found.texts.items()),
            *([("kept", str(keep))] if keep else []),
        ],
    )
    console.facts(
        "the real thing: 318 GB to fetch, as much again to reshard",
        [
            ("1", "grokctl fetch && grokctl verify"),
            ("2", "grokctl reshard --devices 8"),
            ("3", "grokctl run -p 'The answer to life is'"),
        ],
    )
