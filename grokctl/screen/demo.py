"""What the demo did."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from grokctl.text import format_seconds

if TYPE_CHECKING:  # a verb pays for its own stage only
    from grokctl.demo import Demonstration
    from grokctl.screen.console import Console


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
