"""Print a score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from grokctl.screen.console import show

if TYPE_CHECKING:  # a screen imports no stage
    from grokctl.inference.generation import Score
    from grokctl.screen.console import Console


def score(console: Console, result: Score, logits: Path | None) -> None:
    """Print the likelihood of a text, and where its logits are."""
    perplexity = f"e^{result.mean_nll:.1f}, which is more than 1.8e308"
    if result.perplexity is not None:
        perplexity = f"{result.perplexity:.4f}"
    show(
        console,
        {"tokens": result.tokens, "nll": result.nll, "perplexity": result.perplexity},
        "score",
        [
            ("tokens", f"{result.tokens:,}"),
            ("nll", f"{result.nll:.4f} nats"),
            ("perplexity", perplexity),
            *([("logits", str(logits))] if logits else []),
        ],
    )
