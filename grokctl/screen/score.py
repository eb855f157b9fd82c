"""A score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from grokctl.screen.console import show

if TYPE_CHECKING:  # a verb pays for its own stage only
    from grokctl.inference.generation import Score
    from grokctl.screen.console import Console


def score(console: Console, found: Score, logits: Path | None) -> None:
    """A likelihood."""
    show(
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
