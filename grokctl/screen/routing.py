"""Print which experts a text uses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a screen imports no stage
    from collections.abc import Sequence

    from grokctl.inference.routing import Routing
    from grokctl.screen.console import Console


def routing(console: Console, name: str, result: Routing, kept: Routing, path: Path) -> None:
    """Print a strip for each layer: how often each expert was chosen.

    Args:
        console: Where to print.
        name: Of the checkpoint.
        result: The choices of this text.
        kept: Of all texts so far.
        path: Where those are kept.
    """
    if console.as_json:
        console.emit(
            {
                "checkpoint": name,
                "tokens": result.tokens,
                "counts": result.counts,
                "kept": str(path),
                "kept_tokens": kept.tokens,
                "kept_counts": kept.counts,
            }
        )
        return
    most = max(max(row) for row in result.counts)
    console.table(
        f"{name}: experts chosen for {result.tokens:,} tokens, expert 0 to"
        f" {len(result.counts[0]) - 1} from left to right",
        ("layer", "experts", "most chosen", "least chosen"),
        [
            (
                str(layer),
                _strip(row, most, console.bars),
                _share(row, max(row)),
                _share(row, min(row)),
            )
            for layer, row in enumerate(result.counts)
        ],
        right=("layer",),
    )
    console.note(f"the counts of {kept.tokens:,} tokens so far are kept in {path}")


def _strip(row: Sequence[int], most: int, bars: str) -> str:
    """Two characters an expert; every count above 0 is visible."""
    steps = len(bars) - 1
    return "".join(bars[-(-count * steps // max(most, 1))] * 2 for count in row)


def _share(row: Sequence[int], count: int) -> str:
    return f"{row.index(count)}: {count / max(sum(row), 1):.0%}"
