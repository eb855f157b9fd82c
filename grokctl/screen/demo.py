"""Print what the demo did."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from grokctl.text import format_bytes, format_seconds

if TYPE_CHECKING:  # a screen imports no stage
    from grokctl.demo import Demonstration
    from grokctl.screen.console import Console


def demonstration(console: Console, result: Demonstration, keep: Path | None) -> None:
    """Print the stages and their times, the texts, and the commands for Grok-1."""
    if console.as_json:
        console.emit(
            {
                "ok": result.agrees,
                "steps": [asdict(step) for step in result.steps],
                "prompt": result.prompt,
                "texts": {str(devices): text for devices, text in result.texts.items()},
                "precisions": [asdict(precision) for precision in result.precisions],
            }
        )
        return
    console.table(
        "the pipeline on a miniature",
        ("step", "result", "time"),
        [(step.name, step.result, format_seconds(step.seconds)) for step in result.steps],
        right=("time",),
    )
    agreement = "the same text" if result.agrees else "DIFFERENT TEXTS"
    console.facts(
        f"{agreement} on {', '.join(map(str, result.texts))} devices",
        [
            ("prompt", result.prompt),
            *((f"{devices} devices", text) for devices, text in result.texts.items()),
            *([("kept", str(keep))] if keep else []),
        ],
    )
    console.table(
        "int8 keeps the release as it is, int4 is smaller: a text that training did not see",
        ("precision", "size", "perplexity"),
        [
            (each.precision, format_bytes(each.nbytes), f"{each.perplexity:.2f}")
            for each in result.precisions
        ],
        right=("size", "perplexity"),
    )
    console.note(
        "shown: a magnet fetched and proven, one release cut for three meshes, and text on each"
    )
    console.note(
        "the model: Grok-1's architecture, 30,000 times smaller, trained on text of Python"
    )
    console.facts(
        "now with Grok-1: a download of 318 GB, and as much again to reshard",
        [
            ("1", "grokctl fetch && grokctl verify"),
            ("2", "grokctl reshard --devices 8"),
            ("3", "grokctl run -p 'The answer to life is'"),
        ],
    )
