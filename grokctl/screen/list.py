"""Print what is under home."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grokctl.checkpoint.hub_record import INFOHASH_PROOF
from grokctl.text import format_bytes

if TYPE_CHECKING:  # a screen imports no stage
    from collections.abc import Sequence

    from grokctl.list import Kept
    from grokctl.paths import Home
    from grokctl.screen.console import Console


def listing(console: Console, home: Home, kept: Sequence[Kept]) -> None:
    """Print a row for each thing, and the sum."""
    total = sum(each.nbytes for each in kept)
    if console.as_json:
        values = [kept_values(each) for each in kept]
        console.emit({"home": str(home.root), "bytes": total, "kept": values})
        return
    if console.quiet:
        console.write("".join(f"{each.name}\n" for each in kept))
        return
    if not kept:
        console.facts(f"{home.root}: nothing yet", [("next", "grokctl fetch")])
        return
    console.table(
        f"{home.root}: {format_bytes(total)}",
        ("name", "size", "mesh", "precision", "proven by", "last use"),
        [
            (
                each.name,
                format_bytes(each.nbytes),
                "" if each.mesh is None else f"{each.mesh.size} ({each.mesh})",
                each.precision or "",
                _proof(each),
                (each.last_use or "")[:10],
            )
            for each in kept
        ],
        right=("size",),
        optional=("last use", "precision", "mesh"),
    )


def kept_values(kept: Kept) -> dict[str, object]:
    """One thing under home as JSON values."""
    return {
        "name": kept.name,
        "kind": kept.kind,
        "path": str(kept.path),
        "link": None if kept.link is None else str(kept.link),
        "bytes": kept.nbytes,
        "state": kept.state,
        "devices": None if kept.mesh is None else kept.mesh.size,
        "mesh": None if kept.mesh is None else str(kept.mesh),
        "precision": kept.precision,
        "proven": kept.proven_by == INFOHASH_PROOF,
        "proven_by": kept.proven_by,
        "last_use": kept.last_use,
    }


def _proof(kept: Kept) -> str:
    if kept.state != "complete":
        return kept.state
    if kept.kind == "cache":
        return ""
    return kept.proven_by or "not proven"
