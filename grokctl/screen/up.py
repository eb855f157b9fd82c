"""Print a release that is ready to run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grokctl.paths import quoted
from grokctl.screen.console import show
from grokctl.text import format_bytes, format_seconds

if TYPE_CHECKING:  # a screen imports no stage
    from grokctl.screen.console import Console
    from grokctl.up import GotReady


def got_ready(console: Console, result: GotReady) -> None:
    """Print where the release and the ready checkpoint are, and what proves them."""
    fetched, ready = result.fetched, result.ready
    root, trust = quoted(ready.root), ready.source.root_of_trust
    show(
        console,
        {
            "release": str(fetched.root),
            "ready": str(ready.root),
            "infohash": fetched.infohash,
            "proven_by": result.proven_by,
            "root_of_trust": trust if result.proven_by else None,
            "devices": ready.mesh.size,
            "mesh": str(ready.mesh),
            "precision": ready.precision,
            "bytes": ready.nbytes,
            "downloaded_bytes": fetched.downloaded,
            "resharded": result.is_new,
            "seconds": result.seconds,
        },
        f"{fetched.root.name}: ready for {ready.mesh.size} devices",
        [
            ("release", str(fetched.root)),
            ("ready", str(ready.root)),
            ("mesh", f"{ready.mesh.size} ({ready.mesh}), {ready.precision}"),
            ("downloaded", format_bytes(fetched.downloaded)),
            ("proven by", (trust if result.proven_by else None) or "nothing"),
            ("time", format_seconds(result.seconds)),
            *([] if result.is_new else [("resharded", "before")]),
            ("next", f"grokctl run {root}"),
            ("or", f"grokctl serve {root}"),
        ],
        brief=f"{fetched.root.name}: {ready.root}",
    )
