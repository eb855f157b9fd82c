"""An interpolated Kneser-Ney model of pairs of tokens: what a trained model has to beat."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Bigrams:
    """`P(w|v) = max(c(vw) - D, 0) / c(v) + D * types(v) / c(v) * P(w)` (Kneser and Ney, 1995).

    The lower order counts in how many contexts a token follows, discounted likewise, and the rest
    is shared out evenly.
    """

    pairs: NDArray[np.float64]
    """`(vocab, vocab)`: counts less the discount."""
    totals: NDArray[np.float64]
    """Tokens after each token."""
    rest: NDArray[np.float64]
    """Of the probability after each token, the share of the lower order."""
    lower: NDArray[np.float64]
    """Probability of each token by the number of its contexts."""

    @classmethod
    def of(cls, tokens: NDArray[np.uint16], vocabulary: int) -> "Bigrams":
        """Count pairs of neighbours."""
        numbers = tokens[:-1].astype(np.int64) * vocabulary + tokens[1:]
        counts = np.bincount(numbers, minlength=vocabulary**2).reshape(vocabulary, vocabulary)
        totals = counts.sum(axis=1).astype(np.float64)
        pairs, discount = _discounted(counts)
        rest = discount * (counts > 0).sum(axis=1) / np.maximum(totals, 1)
        contexts = (counts > 0).sum(axis=0)
        kept, less = _discounted(contexts)
        kinds = contexts.sum()
        lower = (kept + less * (contexts > 0).sum() / vocabulary) / kinds
        return cls(pairs, totals, np.where(totals > 0, rest, 1.0), lower)

    def bits(self, tokens: NDArray[np.uint16]) -> float:
        """Bits of all tokens after the first."""
        before, after = tokens[:-1], tokens[1:]
        high = self.pairs[before, after] / np.maximum(self.totals[before], 1)
        return float(-np.log2(high + self.rest[before] * self.lower[after]).sum())


def _discounted(counts: NDArray[np.int64]) -> tuple[NDArray[np.float64], float]:
    """Counts less Ney's estimate of the discount, `n1 / (n1 + 2 n2)`, and the discount.

    At least one count of 1 is assumed: without a discount, nothing would be left for the unseen.
    """
    once, twice = max(np.count_nonzero(counts == 1), 1), np.count_nonzero(counts == 2)
    discount = once / (once + 2 * twice)
    return np.maximum(counts - discount, 0.0), discount
