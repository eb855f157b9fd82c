"""What a verification found, and what is known about the content of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grokctl.text import format_bytes, format_seconds

if TYPE_CHECKING:  # a verb pays for its own stage only
    from grokctl.errors import Damage
    from grokctl.fetch import Fetched
    from grokctl.screen.console import Console
    from grokctl.verify import Verdict


_LISTED = 2
"""Ranges that a row of a table names."""


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
