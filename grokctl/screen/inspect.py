"""Print the tensors of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

from grokctl.text import format_bytes

if TYPE_CHECKING:  # a screen imports no stage
    from grokctl.checkpoint.value_stats import ValueStats
    from grokctl.inspect import Inspection, TensorRow
    from grokctl.screen.console import Console


def inspection(console: Console, result: Inspection, *, one_by_one: bool) -> None:
    """Print a table of tensors, those of identical layers in one row, and their totals."""
    console.note(result.provenance)
    if console.as_json:
        console.emit(
            {
                "checkpoint": str(result.root),
                "kind": result.kind,
                "config": result.config.to_dict(),
                "bytes": result.total_nbytes,
                "proven": result.is_proven,
                "proven_by": result.proven_by,
                "parameters": sum(total.parameters for total in result.totals),
                "totals": [asdict(total) for total in result.totals],
                "tensors": [_row_values(row) for row in result.rows],
            }
        )
        return
    groups = [[row] for row in result.rows] if one_by_one else _alike(result.rows)
    named = [(_name_of(rows, result.config.num_layers), rows) for rows in groups]
    title = f"{result.root.name}: {result.kind} checkpoint, {format_bytes(result.total_nbytes)}"
    if all(row.stats is None for row in result.rows):
        _tensors(console, title, named)
    else:
        _spreads(console, title, named)
    whole = sum(total.nbytes for total in result.totals)
    console.table(
        f"{sum(total.parameters for total in result.totals):,} parameters",
        ("part", "tensors", "parameters", "size", "share"),
        [
            (
                total.kind,
                f"{total.tensors:,}",
                f"{total.parameters:,}",
                format_bytes(total.nbytes),
                f"{total.nbytes / whole:.1%}",
            )
            for total in result.totals
        ],
        right=("tensors", "parameters", "size", "share"),
        optional=("share", "tensors"),
    )


def _row_values(row: TensorRow) -> dict[str, Any]:
    values = asdict(row)
    spread = row.stats
    if spread is None:
        return values
    is_finite = spread.count > spread.nonfinite
    shares = [count / max(1, spread.integers) for count in spread.cells]
    stats = {
        "min": spread.minimum if is_finite else None,
        "max": spread.maximum if is_finite else None,
        "rms": spread.rms if is_finite else None,
        "nonfinite": spread.nonfinite,
        "zero_share": spread.zeros / spread.integers if spread.integers else None,
        "lowest": spread.lowest if spread.integers else None,
        "zero_scales": spread.zero_scales if row.scale_groups else None,
        "negative_scales": spread.negative_scales if row.scale_groups else None,
        "zero_values": None if row.scale_groups else spread.zero_values,
        "saturated_share": spread.saturated / spread.integers if spread.integers else None,
        "use": shares if spread.integers else None,
    }
    return {**values, "stats": stats}


def _alike(rows: Sequence[TensorRow]) -> list[list[TensorRow]]:
    """Group the same parameter of layers that store it alike."""
    groups: dict[tuple[object, ...], list[TensorRow]] = {}
    for row in rows:
        name = re.sub(r"^layers\.[0-9]+\.", "", row.name)
        key = (name, row.shape, row.dtype, row.scale_groups, row.nbytes)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _name_of(rows: Sequence[TensorRow], num_layers: int) -> str:
    """`layers.*.moe.gate` for the gates of all layers, `layers.0-3,5.moe.gate` for some."""
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


def _tensors(
    console: Console, title: str, groups: Sequence[tuple[str, Sequence[TensorRow]]]
) -> None:
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


def _spreads(
    console: Console, title: str, groups: Sequence[tuple[str, Sequence[TensorRow]]]
) -> None:
    spreads = [_sum(rows) for _, rows in groups]
    cells = []
    for (name, rows), spread in zip(groups, spreads, strict=True):
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
    for (name, rows), spread in zip(groups, spreads, strict=True):
        for fact in _facts(spread, is_norm=rows[0].kind == "norms"):
            console.note(f"{name}: {fact}")


def _facts(spread: ValueStats, *, is_norm: bool) -> Iterator[str]:
    """Unusual values, in words."""
    of = f"of {spread.count:,} values"
    if spread.nonfinite:
        yield f"{spread.nonfinite:,} {of} are not finite"
    if spread.zero_scales:
        yield f"{spread.zero_scales:,} scales are 0"
    if spread.negative_scales:
        yield f"{spread.negative_scales:,} scales are below 0"
    if spread.lowest:
        yield f"{spread.lowest:,} {of} are stored as -128"
    if is_norm and spread.zero_values:
        yield f"{spread.zero_values:,} {of} are 0"


def _index(rows: Sequence[TensorRow]) -> str:
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
    """Print a table without the named columns, and without empty ones."""
    columns = [name for name in cells[0] if name not in without and any(row[name] for row in cells)]
    console.table(
        title,
        columns,
        [[row[name] for name in columns] for row in cells],
        right=right,
        optional=[name for name in optional if name in columns],
    )


def _sum(rows: Sequence[TensorRow]) -> ValueStats:
    return reduce(add, [row.stats for row in rows if row.stats is not None])


def _strip(cells: Sequence[int], bars: str) -> str:
    """A histogram in one line: the largest count is full, and every count above 0 is visible."""
    tallest = max(cells)
    steps = len(bars) - 1
    return "".join(bars[-(-count * steps // tallest)] for count in cells)
