"""Token choice from logits: greedy, or drawn with temperature, top-k, top-p and min-p."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grokctl.errors import invalid


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Parameters of the choice of the next token; the filters apply in the order of the fields.

    Raises:
        InvalidValueError: A number lies outside its range.
    """

    temperature: float = 0.0
    """Divides logits; 0 takes the likeliest token and ignores all other fields."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Keep tokens at least this likely, relative to the likeliest."""
    seed: int = 0
    """Same seed, same draws: token n depends on the seed, n and its logits alone."""

    def __post_init__(self) -> None:
        for name, is_valid, rule in (
            ("temperature", 0 <= self.temperature < float("inf"), "expected at least 0"),
            ("top_k", self.top_k >= 0, "expected at least 0"),
            ("top_p", 0 < self.top_p <= 1, "expected more than 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "expected 0 to 1"),
            ("seed", 0 <= self.seed < 2**64, "expected 0 to 2^64 - 1"),
        ):
            if not is_valid:
                raise invalid(name, getattr(self, name), rule)

    def choose(self, logits: NDArray[np.float32], step: int) -> int:
        """Choose a token.

        Args:
            logits: `(vocab,)`, finite.
            step: How many tokens were chosen before.

        Returns:
            A token id.
        """
        if self.temperature == 0:
            return int(np.argmax(logits))
        order, probabilities = self.distribution(logits)
        draw = np.random.default_rng([self.seed, step]).random()
        place = int(np.searchsorted(np.cumsum(probabilities), draw, side="right"))
        return int(order[min(place, len(order) - 1)])

    def distribution(
        self, logits: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Candidates, likeliest first, and their probabilities, which sum to 1.

        Ties are ordered by token id, so the result is the same everywhere.
        """
        kept: NDArray[Any] = np.arange(len(logits))
        if 0 < self.top_k < len(logits):
            border = np.partition(logits, -self.top_k)[-self.top_k]
            kept = np.flatnonzero(logits >= border)
        order = kept[np.argsort(-logits[kept], kind="stable")][: self.top_k or None]
        wide = logits[order].astype(np.float64)
        with np.errstate(over="ignore"):  # a temperature next to 0 leaves only the likeliest
            probabilities = np.exp((wide - wide[0]) / self.temperature)
        probabilities /= probabilities.sum()
        before = np.cumsum(probabilities) - probabilities
        in_nucleus = (before < self.top_p) | (self.top_p == 1)  # rounding may reach 1 early
        keep = in_nucleus & (probabilities >= self.min_p * probabilities[0])
        keep[0] = True
        probabilities = probabilities[keep]
        return order[keep], probabilities / probabilities.sum()
