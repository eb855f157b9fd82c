"""Print the verdict on a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grokctl.checkpoint.hub_record import HUB_PROOF
from grokctl.errors import count_of
from grokctl.text import format_bytes, format_number, format_seconds

if TYPE_CHECKING:  # a screen imports no stage
    from grokctl.errors import Damage
    from grokctl.integrity.verdict import Verdict
    from grokctl.repair import RepairPlan
    from grokctl.screen.console import Console
    from grokctl.transfer.fetched import Fetched


_LISTED = 2
"""Ranges named in a cell; more are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """What was done about damage, or planned."""

    fetched: Fetched | None = None
    plan: RepairPlan | None = None


def verdict(
    console: Console,
    root: Path,
    result: Verdict,
    remedy: Remedy,
    *,
    quick: bool,
    seconds: float,
) -> None:
    """Print all damage and the download that repairs it, or what is proven."""
    fetched, plan = remedy.fetched, remedy.plan
    infohash = result.verified.receipt.infohash if result.verified else None
    unfinished = result.unfinished
    if console.as_json:
        console.emit(
            {
                "checkpoint": str(root),
                "ok": not result.damage and unfinished is None,
                "incomplete": None
                if unfinished is None
                else {"have_bytes": unfinished.have, "bytes": unfinished.nbytes},
                "files": result.files,
                "bytes": result.nbytes,
                "hashed_bytes": result.hashed,
                "spared_files": result.spared,
                "spared_since": result.since,
                "proven": result.is_proven,
                "doubt": result.doubt,
                "proven_by": result.proven_by,
                "root_of_trust": result.root_of_trust,
                "infohash": infohash,
                "damage": [_damage_values(damage) for damage in result.damage],
                "mend_bytes": result.mend_nbytes,
                "downloaded_bytes": fetched.downloaded if fetched else None,
                "repair": plan and {**asdict(plan), "fits": plan.fits},
                "seconds": seconds,
            }
        )
        return
    if unfinished is None and result.damage and not console.quiet:
        _damages(console, result)
    if plan is not None:
        _plan(console, plan)
    if unfinished is not None or result.damage:
        return  # the error says it in one sentence
    summary = "every byte is proven"
    if quick:
        summary = "the structure is sound; no content is proven"
    elif result.is_exposed:
        summary = f"every byte is as promised now; other users can change it ({result.doubt})"
    elif result.proven_by == HUB_PROOF and result.remedy is None:
        summary = f"every byte has {result.root_of_trust}; the infohash proves none of it"
    elif not result.is_proven:
        other = "the manifest" if result.remedy is not None else "its torrent"
        summary = f"every byte matches {other}; not proven: {result.doubt}"
    if console.quiet:
        console.write(f"{result.name}: {summary}\n")
        return
    first = f"the first on {result.since}" if result.spared > 1 else f"{result.since}"
    spared = f"{format_number(result.spared, 'file')}, unchanged since, {first}"
    console.facts(
        f"{result.name}: {summary}",
        [
            ("files", f"{result.files:,}"),
            ("bytes", format_bytes(result.nbytes)),
            ("hashed now", f"{format_bytes(result.hashed)} in {format_seconds(seconds)}"),
            *([("proven before", spared)] if result.spared else []),
            *([("downloaded", format_bytes(fetched.downloaded))] if fetched else []),
            *([("infohash", infohash)] if infohash else []),
            *(
                [("root of trust", result.root_of_trust)]
                if result.root_of_trust and result.is_proven
                else []
            ),
        ],
    )


def _damage_values(damage: Damage) -> dict[str, Any]:
    values = asdict(damage)
    values["mend_bytes"] = values.pop("mend_nbytes")
    del values["advice"]
    return values


def _plan(console: Console, plan: RepairPlan) -> None:
    console.facts(
        "would repair it" if plan.fits else "no room to repair it",
        [
            ("download", format_bytes(plan.download_bytes)),
            ("pieces", f"{plan.pieces:,}"),
            ("kept until proven", format_bytes(plan.kept_bytes)),
            *([("copied for links", format_bytes(plan.copied_bytes))] if plan.copied_bytes else []),
            ("room needed", format_bytes(plan.required_bytes)),
            ("free on disk", format_bytes(plan.free_bytes)),
        ],
    )


def _damages(console: Console, result: Verdict) -> None:
    console.table(
        count_of(result.damage, result.files),
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
            for damage in result.damage
        ],
        right=("to fetch",),
    )
    if result.bad_pieces:
        count = len(result.bad_pieces)
        pieces = "1 bad piece" if count == 1 else f"{count:,} bad pieces"
        console.write(f"{pieces}: {format_bytes(result.mend_nbytes)} to download\n")


def _described(damage: Damage) -> str:
    text = ", ".join(filter(None, (damage.reason, damage.detail)))
    ranges = _listed(f"{low:,} to {high:,}" for low, high in damage.ranges)
    return f"{text}; bytes {ranges}" if ranges else text


def _listed(parts: Iterable[str]) -> str:
    """The first parts, and the number of the others."""
    texts = list(parts)
    more = len(texts) - _LISTED
    return ", ".join(texts[:_LISTED]) + (f" +{more:,}" if more > 0 else "")
