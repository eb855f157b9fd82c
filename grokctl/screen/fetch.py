"""Print a plan for a fetch, or a finished download."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from grokctl.checkpoint.hub_record import HUB_PROOF
from grokctl.paths import quoted
from grokctl.screen.console import show
from grokctl.text import format_bytes, format_number, format_seconds, shown_url

if TYPE_CHECKING:  # a screen imports no stage
    from grokctl.screen.console import Console
    from grokctl.transfer.fetched import Fetched
    from grokctl.transfer.preflight import FetchPlan


def fetch_plan(console: Console, plan: FetchPlan, root: Path) -> None:
    """Print what a fetch would do, and its problems."""
    count = sum(file.is_wanted for file in plan.files)
    if console.as_json:
        console.emit(
            {
                "release": str(root),
                "infohash": plan.infohash,
                "bytes": plan.wanted_nbytes,
                "present_bytes": plan.present_nbytes,
                "fitting_pieces": plan.fitting[0] if plan.fitting else None,
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
            ("files", f"{count} of {len(plan.files)}"),
            ("bytes", format_bytes(plan.wanted_nbytes)),
            ("already here", format_bytes(plan.present_nbytes) + _fitting(plan)),
            ("free on disk", format_bytes(plan.free_nbytes)),
        ],
    )
    console.table(
        "ready to fetch" if plan.fits else "cannot be fetched",
        ("check", "status", "detail"),
        [(check.name, check.status, check.detail) for check in plan.checks],
    )


def _fitting(plan: FetchPlan) -> str:
    if plan.fitting is None:
        return ""
    good, count = plan.fitting
    rest = "" if good == count else "; the rest is kept aside"
    fit = "fits" if good == 1 else "fit"
    return f", {good:,} of {format_number(count, 'piece')} {fit}{rest}"


def fetched(console: Console, result: Fetched) -> None:
    """Print a finished download: its sources, their problems, and what remains to be done."""
    root = quoted(result.root)
    remaining = []
    has_only_seeded = result.uploaded is not None and not result.downloaded
    if result.is_complete and result.root_of_trust:
        remaining.append(("with a torrent", f"grokctl verify {root} --torrent-file FILE"))
    elif not result.is_proven and not has_only_seeded:
        remaining.append(("next", f"grokctl verify {root}"))
    if not result.has_tokenizer and not has_only_seeded:
        source = quoted(shown_url(result.source))
        remaining.append(("for text", f"grokctl fetch {source} --to {root} --tokenizer FILE"))
    downloaded, uploaded = format_bytes(result.downloaded), format_bytes(result.uploaded or 0)
    took, seeded = format_seconds(result.seconds), format_seconds(result.seed_seconds or 0)
    title = f"{'seeded' if has_only_seeded else 'fetched'} {result.root.name}"
    title += "" if result.is_complete else " in part"
    show(
        console,
        {
            "release": str(result.root),
            "infohash": result.infohash,
            "bytes": result.nbytes,
            "downloaded_bytes": result.downloaded,
            "uploaded_bytes": result.uploaded,
            "seconds": result.seconds,
            "seed_seconds": result.seed_seconds,
            "complete": result.is_complete,
            "extras": list(result.extras),
            "verified": result.is_proven,
            "proven_by": result.proven_by,
            "root_of_trust": result.root_of_trust,
            "git_blobs": list(result.blobs),
            "tokenizer": result.has_tokenizer,
            "sources": [asdict(each) for each in result.contributions],
            "troubles": [asdict(trouble) for trouble in result.troubles],
        },
        title,
        [
            ("release", str(result.root)),
            ("infohash", result.infohash),
            ("bytes", format_bytes(result.nbytes)),
            *([] if has_only_seeded else [("downloaded", f"{downloaded} in {took}")]),
            *([] if result.uploaded is None else [("uploaded", f"{uploaded} in {seeded}")]),
            *(
                (f"  {each.source}", format_bytes(each.nbytes))
                for each in result.contributions
                if len(result.contributions) > 1
            ),
            *((trouble.source, trouble.reason) for trouble in result.troubles),
            *([("other files", ", ".join(result.extras))] if result.extras else []),
            *([("verified", "every byte, unchanged since")] if result.is_proven else []),
            *(
                [("proven by", result.root_of_trust)]
                if result.root_of_trust and result.proven_by == HUB_PROOF
                else []
            ),
            *([("by git blobs", ", ".join(result.blobs))] if result.blobs else []),
            *remaining,
        ],
        brief=f"{title}: {result.root}",
    )
