"""Every result twice: as the JSON object that programs rely on, and as what people read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grokctl.paths import quoted
from grokctl.text import format_bytes, format_number, format_rate, format_seconds

if TYPE_CHECKING:  # a verb pays for its own stage only
    from grokctl.bench import Bench
    from grokctl.checkpoint.ready import ReadyCheckpoint
    from grokctl.checkpoint.receipt import Receipt
    from grokctl.checkpoint.value_stats import Spread
    from grokctl.demo import Demonstration
    from grokctl.errors import Damage
    from grokctl.fetch import Fetched
    from grokctl.infer import EngineOptions
    from grokctl.inference.generation import BatchStats, Generation, Score
    from grokctl.inspect import Inspection, Row
    from grokctl.model.placement import MeshShape
    from grokctl.reshard import ReshardPlan
    from grokctl.resharding.estimate import Estimate
    from grokctl.screen.console import Console
    from grokctl.transfer.preflight import FetchPlan
    from grokctl.verify import Verdict

_LISTED = 2
"""Ranges that a row of a table names."""

Facts = Sequence[tuple[str, str]]


def _show(console: Console, values: dict[str, Any], title: str, facts: Facts) -> None:
    if console.as_json:
        console.emit(values)
    else:
        console.facts(title, facts)


def proof(receipt: Receipt | None, root: Path) -> str:
    """What is known about the content of a release, in one line."""
    if receipt is not None:
        since, until = receipt.since, receipt.verified_at
        when = f"on {until}" if since == until else f"between {since} and {until}"
        return f"{root.name}: every byte was proven {when}"
    command = f"grokctl verify {quoted(root)}"
    return f"{root.name}: its content is not proven ({command})"


def fetch_plan(console: Console, plan: FetchPlan, root: Path) -> None:
    """What a fetch would do, and what stands in its way."""
    wanted = sum(file.is_wanted for file in plan.files)
    if console.as_json:
        console.emit(
            {
                "release": str(root),
                "infohash": plan.infohash,
                "bytes": plan.wanted_nbytes,
                "present_bytes": plan.present_nbytes,
                "free_bytes": plan.free_nbytes,
                "fits": plan.fits,
                "checks": [asdict(check) for check in plan.checks],
            }
        )
        return
    console.facts(
        f"would fetch {plan.name}",
        [
            ("to", str(root)),
            ("infohash", plan.infohash),
            ("files", f"{wanted} of {len(plan.files)}"),
            ("bytes", format_bytes(plan.wanted_nbytes)),
            ("here already", format_bytes(plan.present_nbytes)),
            ("free on disk", format_bytes(plan.free_nbytes)),
        ],
    )
    console.table(
        "nothing stands in its way" if plan.fits else "this stands in its way",
        ("check", "state", "found"),
        [(check.name, check.status, check.detail) for check in plan.checks],
    )


def fetched(console: Console, result: Fetched) -> None:
    """A finished download, what it owes to whom, and whether its verification is owed."""
    root = quoted(result.root)
    owed = []
    if not result.is_proven:
        owed.append(("still to do", f"grokctl verify {root}"))
    if not result.has_tokenizer:
        source = quoted(result.source)
        owed.append(("for text", f"grokctl fetch {source} --to {root} --tokenizer FILE"))
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
            "verified": result.is_proven,
            "tokenizer": result.has_tokenizer,
            "sources": [asdict(share) for share in result.shares],
            "troubles": [asdict(trouble) for trouble in result.troubles],
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
            *(
                (f"  {share.source}", format_bytes(share.nbytes))
                for share in result.shares
                if len(result.shares) > 1
            ),
            *((trouble.source, trouble.reason) for trouble in result.troubles),
            *([("other files", ", ".join(result.extras))] if result.extras else []),
            *([("verified", "every byte, and untouched since")] if result.is_proven else []),
            *owed,
        ],
    )


def verdict(
    console: Console,
    root: Path,
    found: Verdict,
    fetched: Fetched | None,
    *,
    quick: bool,
    seconds: float,
) -> None:
    """What a verification found: all damage and what mending it costs, or what is proven."""
    infohash = found.verified.receipt.infohash if found.verified else None
    if console.as_json:
        console.emit(
            {
                "checkpoint": str(root),
                "ok": not found.damage,
                "files": found.files,
                "bytes": found.nbytes,
                "hashed_bytes": found.hashed,
                "spared_files": found.spared,
                "spared_since": found.since,
                "proven": found.verified is not None,
                "infohash": infohash,
                "damage": [_damage_values(damage) for damage in found.damage],
                "mend_bytes": found.mend_nbytes,
                "downloaded_bytes": fetched.downloaded if fetched else None,
                "seconds": seconds,
            }
        )
        return
    if found.damage:
        _damages(console, found)
        return
    what = "the structure is sound; no content is proven" if quick else "every byte is right"
    spared = f"{found.spared:,} files, untouched since they were, from {found.since}"
    console.facts(
        f"{found.name}: {what}",
        [
            ("files", f"{found.files:,}"),
            ("bytes", format_bytes(found.nbytes)),
            ("hashed now", f"{format_bytes(found.hashed)} in {format_seconds(seconds)}"),
            *([("proven before", spared)] if found.spared else []),
            *([("downloaded", format_bytes(fetched.downloaded))] if fetched else []),
            *([("infohash", infohash)] if infohash else []),
        ],
    )


def _damage_values(damage: Damage) -> dict[str, Any]:
    values = asdict(damage)
    values["mend_bytes"] = values.pop("mend_nbytes")
    return values


def _damages(console: Console, found: Verdict) -> None:
    console.table(
        f"{len(found.damage)} of {found.files} files are damaged",
        ("file", "damage", "pieces", "to fetch"),
        [
            (
                damage.file,
                _described(damage),
                _listed(
                    f"{first:,}" if last == first + 1 else f"{first:,}-{last - 1:,}"
                    for first, last in damage.pieces
                ),
                format_bytes(damage.mend_nbytes) if damage.pieces else "",
            )
            for damage in found.damage
        ],
        right=("to fetch",),
    )
    if found.bad_pieces:
        many = len(found.bad_pieces)
        pieces = "1 bad piece" if many == 1 else f"{many:,} bad pieces"
        console.write(f"{pieces}: {format_bytes(found.mend_nbytes)} to download\n")


def _described(damage: Damage) -> str:
    text = ", ".join(filter(None, (damage.reason, damage.detail)))
    ranges = _listed(f"{low:,} to {high:,}" for low, high in damage.ranges)
    return f"{text}; bytes {ranges}" if ranges else text


def _listed(parts: Iterable[str]) -> str:
    """Some of many, and how many more there are."""
    found = list(parts)
    more = len(found) - _LISTED
    return ", ".join(found[:_LISTED]) + (f" +{more:,}" if more > 0 else "")


def inspection(console: Console, found: Inspection, *, one_by_one: bool) -> None:
    """A table of tensors, those of identical layers in one row, and what they come to."""
    if console.as_json:
        console.emit(
            {
                "checkpoint": str(found.root),
                "kind": found.kind,
                "config": found.config.to_dict(),
                "bytes": found.total_nbytes,
                "parameters": sum(total.parameters for total in found.totals),
                "totals": [asdict(total) for total in found.totals],
                "tensors": [_row_values(row) for row in found.rows],
            }
        )
        return
    groups = [[row] for row in found.rows] if one_by_one else _alike(found.rows)
    named = [(_name_of(rows, found.config.num_layers), rows) for rows in groups]
    title = f"{found.root.name}: {found.kind} checkpoint, {format_bytes(found.total_nbytes)}"
    if all(row.spread is None for row in found.rows):
        _tensors(console, title, named)
    else:
        _spreads(console, title, named)
    whole = sum(total.nbytes for total in found.totals)
    console.table(
        f"{sum(total.parameters for total in found.totals):,} parameters",
        ("part", "tensors", "parameters", "size", "share"),
        [
            (
                total.kind,
                f"{total.tensors:,}",
                f"{total.parameters:,}",
                format_bytes(total.nbytes),
                f"{total.nbytes / whole:.1%}",
            )
            for total in found.totals
        ],
        right=("tensors", "parameters", "size", "share"),
        optional=("share", "tensors"),
    )


def _row_values(row: Row) -> dict[str, Any]:
    values = asdict(row)
    del values["spread"]
    spread = row.spread
    if spread is None:
        return {**values, "stats": None}
    is_finite = spread.count > spread.nonfinite
    shares = [count / max(1, spread.integers) for count in spread.cells]
    stats = {
        "min": spread.minimum if is_finite else None,
        "max": spread.maximum if is_finite else None,
        "rms": spread.rms if is_finite else None,
        "nonfinite": spread.nonfinite,
        "zero_share": spread.zeros / spread.integers if spread.integers else None,
        "saturated_share": spread.saturated / spread.integers if spread.integers else None,
        "use": shares if spread.integers else None,
    }
    return {**values, "stats": stats}


def _alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Put the same parameter of all layers together, where it is stored alike."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        name = re.sub(r"^layers\.[0-9]+\.", "", row.name)
        key = (name, row.shape, row.dtype, row.scale_groups, row.nbytes)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _name_of(rows: Sequence[Row], num_layers: int) -> str:
    """`layers.*.moe.gate` for all layers' gates, `layers.0-3,5.moe.gate` for those of some."""
    if len(rows) == 1:
        return rows[0].name
    part = rows[0].name.split(".", 2)[2]
    if len(rows) == num_layers:
        return f"layers.*.{part}"
    layers = sorted(int(row.name.split(".")[1]) for row in rows)
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    spans = [
        str(start) if start == end else f"{start}-{end}"
        for start, end in zip(starts, ends, strict=True)
    ]
    return f"layers.{','.join(spans)}.{part}"


def _tensors(console: Console, title: str, groups: Sequence[tuple[str, Sequence[Row]]]) -> None:
    cells = [
        {
            "index": _index(rows),
            "tensor": name,
            "count": str(len(rows)),
            "shape": "x".join(map(str, rows[0].shape)),
            "type": rows[0].dtype,
            "scales": str(rows[0].scale_groups or ""),
            "size": format_bytes(sum(row.nbytes for row in rows)),
            "file": rows[0].file,
        }
        for name, rows in groups
    ]
    is_single = all(len(rows) == 1 for _, rows in groups)
    _table(
        console,
        title,
        cells,
        without=("count",) if is_single else ("index", "file"),
        right=("index", "count", "shape", "scales", "size"),
        optional=("file", "count", "scales", "index", "type"),
    )


def _spreads(console: Console, title: str, groups: Sequence[tuple[str, Sequence[Row]]]) -> None:
    found = [_sum(rows) for _, rows in groups]
    cells = []
    for (name, rows), spread in zip(groups, found, strict=True):
        has_range, of = spread.count > spread.nonfinite, spread.integers
        cells.append(
            {
                "index": _index(rows),
                "tensor": name,
                "type": rows[0].dtype,
                "min": f"{spread.minimum:.3g}" if has_range else "",
                "max": f"{spread.maximum:.3g}" if has_range else "",
                "rms": f"{spread.rms:.3g}" if has_range else "",
                "zero": f"{spread.zeros / of:.1%}" if of else "",
                "at 127": f"{spread.saturated / of:.1%}" if of else "",
                "|q| 0 to 127": _strip(spread.cells, console.bars) if of else "",
            }
        )
    is_single = all(len(rows) == 1 for _, rows in groups)
    _table(
        console,
        title,
        cells,
        without=() if is_single else ("index",),
        right=("index", "min", "max", "rms", "zero", "at 127"),
        optional=("index", "type", "zero", "at 127", "min", "max"),
    )
    for (name, _), spread in zip(groups, found, strict=True):
        if spread.nonfinite:
            many = f"{spread.nonfinite:,} of {spread.count:,} values"
            console.note(f"{name}: {many} are no finite numbers")


def _index(rows: Sequence[Row]) -> str:
    return "" if rows[0].index is None else str(rows[0].index)


def _table(
    console: Console,
    title: str,
    cells: Sequence[Mapping[str, str]],
    *,
    without: Sequence[str],
    right: Sequence[str],
    optional: Sequence[str],
) -> None:
    """A table without some columns, and without those that are empty."""
    columns = [name for name in cells[0] if name not in without and any(row[name] for row in cells)]
    console.table(
        title,
        columns,
        [[row[name] for name in columns] for row in cells],
        right=right,
        optional=[name for name in optional if name in columns],
    )


def _sum(rows: Sequence[Row]) -> Spread:
    return reduce(add, [row.spread for row in rows if row.spread is not None])


def _strip(cells: Sequence[int], bars: str) -> str:
    """A histogram in one line: the tallest cell is full, and any count at all is seen."""
    tallest = max(cells)
    steps = len(bars) - 1
    return "".join(bars[-(-count * steps // tallest)] for count in cells)


def reshard_plan(console: Console, plan: ReshardPlan, found: Estimate) -> None:
    """What a reshard would write, and how long that would take here."""
    seconds = found.seconds(plan)
    written = format_bytes(plan.bytes_out)
    if plan.compression:
        written = f"about {format_bytes(found.nbytes)}, {written} before {plan.compression}"
    disk = "cannot be written" if found.disk_rate is None else format_rate(found.disk_rate)
    fits = "fits" if found.nbytes <= found.free_nbytes else "does NOT fit"
    _show(
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


def unhashed(root: Path) -> str:
    """What is not known about the files of a ready checkpoint, in one line."""
    return (
        f"{root.name}: its files are read as they are (grokctl verify {quoted(root)} hashes them)"
    )


def resharded(
    console: Console, ready: ReadyCheckpoint, plan: ReshardPlan, *, seconds: float, peak_rss: int
) -> None:
    """A finished ready checkpoint."""
    _show(
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


def generation(
    console: Console,
    result: Generation,
    *,
    index: int | None = None,
    name: str | int | None = None,
) -> None:
    """The JSON object of a run, or of one prompt of many; people have read the text already."""
    console.emit(
        {
            **({} if index is None else {"index": index}),
            **({} if name is None else {"id": name}),
            "prompt_tokens": result.prompt_tokens,
            "tokens": result.ids,
            "text": result.text,
            "finish_reason": result.finish_reason,
            "seed": result.seed,
            "stats": asdict(result.stats),
        }
    )


def generations(console: Console, stats: BatchStats, prompts: int) -> None:
    """The JSON object of a run over many prompts, which had an object each before."""
    console.emit(
        {
            "prompts": prompts,
            "tokens": stats.tokens,
            "prompt_tokens": stats.prompt_tokens,
            "seconds": stats.seconds,
            "stats": {
                "load_s": stats.load_s,
                "compile_s": stats.compile_s,
                "prefill_tokens_per_s": stats.prefill_tokens_per_s,
                "decode_tokens_per_s": stats.decode_tokens_per_s,
                "steps": stats.steps,
                "bytes_per_step": stats.bytes_per_step,
                "bandwidth_fraction": stats.bandwidth_fraction,
            },
        }
    )


def closing(console: Console, result: Generation, *, has_loaded: bool, is_drawn: bool) -> None:
    """What one text took, in a line on stderr: in fewer words where that is narrow.

    Args:
        console: Whose terminal it is.
        result: The text.
        has_loaded: Whether the weights were loaded for it.
        is_drawn: Whether its seed matters.
    """
    found = result.stats
    start = ["stopped"] if result.finish_reason == "interrupted" else []
    end = [f"seed {result.seed}"] if is_drawn else []
    load = [("load", found.load_s)] if has_loaded else []
    compiled = [("compile", found.compile_s)] if found.compile_s else []
    first = [("first token", found.first_token_s)] if result.ids else []
    wide, narrow = _speeds(found.prefill_tokens_per_s, found.decode_tokens_per_s)
    reads = [f"{format_bytes(found.bytes_per_token)}/token"] if result.ids else []
    forms = [" · ".join([*start, *_times(load + compiled + first), *wide, *reads, *end])]
    for times in (load + compiled + first, compiled + first, first):
        short = ", ".join(_times(times)).replace("first token", "first")
        forms.append(" · ".join([*start, *filter(None, [short]), *narrow, *reads, *end]))
    console.note_fitting(forms)


def closing_many(console: Console, stats: BatchStats, prompts: int) -> None:
    """What many texts took together, in a line on stderr."""
    wide, narrow = _speeds(stats.prefill_tokens_per_s, stats.decode_tokens_per_s)
    many = format_number(prompts, "prompt")
    reads = [f"{format_bytes(stats.bytes_per_step)}/step"] if stats.steps else []
    took = f"{stats.tokens:,} tokens in {format_seconds(stats.seconds)}"
    load = ("load", stats.load_s)
    times = [load, ("compile", stats.compile_s)] if stats.compile_s else [load]
    console.note_fitting(
        [
            " · ".join([many, *_times(times), took, *wide, *reads]),
            " · ".join([many, ", ".join(_times(times)), took, *narrow, *reads]),
            " · ".join([many, took, *narrow, *reads]),
            " · ".join([many, took, *narrow]),
        ]
    )


def _times(times: Iterable[tuple[str, float]]) -> list[str]:
    return [f"{name} {format_seconds(seconds)}" for name, seconds in times]


def _speeds(prefill: float, decode: float) -> tuple[list[str], list[str]]:
    """Both rates, as far as there are any, in many words and in few."""
    rates = [("prefill", "in", prefill), ("decode", "out", decode)]
    wide = [f"{name} {_pace(rate)} tokens/s" for name, _, rate in rates if rate]
    narrow = ", ".join(f"{name} {_pace(rate)}/s" for _, name, rate in rates if rate)
    return wide, [narrow] if narrow else []


def _pace(rate: float) -> str:
    """A rate in about three digits."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"  # noqa: PLR2004


def stats(console: Console, result: Generation) -> None:
    """All that was measured of one text, on stderr."""
    found = result.stats
    rate = found.decode_tokens_per_s * found.bytes_per_token
    console.asides(
        [
            ("load", format_seconds(found.load_s)),
            ("compile", format_seconds(found.compile_s)),
            ("first token", format_seconds(found.first_token_s)),
            ("prefill", _counted(result.prompt_tokens, found.prefill_tokens_per_s)),
            ("decode", _counted(max(0, len(result.ids) - 1), found.decode_tokens_per_s)),
            ("a token reads", format_bytes(found.bytes_per_token)),
            *_bandwidth(console, rate, found.bandwidth_fraction),
            ("ended by", str(result.finish_reason)),
            ("seed", str(result.seed)),
        ]
    )


def stats_many(console: Console, found: BatchStats, prompts: int) -> None:
    """All that was measured of many texts together, on stderr."""
    rate = found.bytes_read / found.decode_s if found.decode_s else 0.0
    console.asides(
        [
            ("prompts", f"{prompts:,} in {format_seconds(found.seconds)}"),
            ("load", format_seconds(found.load_s)),
            ("compile", format_seconds(found.compile_s)),
            ("prefill", _counted(found.prompt_tokens, found.prefill_tokens_per_s)),
            ("decode", _counted(found.decoded, found.decode_tokens_per_s)),
            ("a step reads", format_bytes(found.bytes_per_step)),
            *_bandwidth(console, rate, found.bandwidth_fraction),
        ]
    )


def _counted(tokens: int, rate: float) -> str:
    many = format_number(tokens, "token")
    return f"{many} at {_pace(rate)} tokens/s" if rate else many


def _bandwidth(console: Console, rate: float, share: float | None) -> Facts:
    """What was read beside what the memory was measured to give, if it was."""
    if not share:
        return []
    reach = f"{share:.0%} of the {format_rate(rate / share)} measured now"
    return [("its memory", f"{console.gauge(share)} {reach}")]


def bench(console: Console, found: Bench, options: EngineOptions) -> None:
    """A table of speeds, each with a bar against what the memory gives."""
    if console.as_json:
        console.emit(
            {
                "devices": options.mesh.size,
                "mesh": str(options.mesh),
                "compute": options.compute,
                "kv": options.kv,
                "max_tokens": found.max_tokens,
                "load_s": found.load_s,
                "compile_s": found.compile_s,
                "bandwidth_bytes_per_s": found.bandwidth,
                "rows": [asdict(row) for row in found.rows],
            }
        )
        return
    limit = format_rate(found.bandwidth)
    console.table(
        f"{found.max_tokens} tokens after each prompt; the limit is this memory's {limit}",
        ("prompt", "batch", "prefill", "first token", "decode", "a step", "reads", "of the limit"),
        [
            (
                f"{row.prompt_tokens:,}",
                f"{row.batch:,}",
                f"{_pace(row.prefill_tokens_per_s)}/s",
                f"{_pace(1000 * row.first_token_s)} ms",
                f"{_pace(row.decode_tokens_per_s)}/s",
                f"{_pace(1000 * row.step_s)} ms",
                format_bytes(row.bytes_per_step),
                f"{console.gauge(row.bandwidth_fraction, 10)} {row.bandwidth_fraction:4.0%}",
            )
            for row in found.rows
        ],
        right=("prompt", "batch", "prefill", "first token", "decode", "a step", "reads"),
        optional=("reads", "first token", "prefill"),
    )
    console.note(
        f"load {format_seconds(found.load_s)} · compile {format_seconds(found.compile_s)} · "
        "rates count the tokens of a whole batch"
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
