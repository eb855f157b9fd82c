"""Token choice from logits: greedy, or drawn with temperature, top-k, top-p and min-p.

One definition, `Sampling.distribution`, and two fast forms of it: `Sampling.choose` reads a whole
row of logits, `Sampling.choose_from` the largest of a row, which a step returns in its place
(`model/candidates`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from grokctl.errors import invalid

_MOST_PENALTY: Final = 2.0
_MOST_BIAS: Final = 100.0
_BLOCK: Final = 256
"""Weights added up together, until the sums inside a block are asked for."""
_LEAST_WEIGHT: Final = float(np.finfo(np.float64).smallest_subnormal)
_SMALLEST: Final = float(np.finfo(np.float32).smallest_normal)
"""Smaller numbers are 0 to devices."""
_LOWEST: Final = float(np.finfo(np.float32).min)


@dataclass(frozen=True, slots=True, eq=False)
class Adjustments:
    """What is added to logits of a row before a token is chosen."""

    ids: NDArray[np.int32]
    """Tokens, ascending, each once."""
    values: NDArray[np.float32]
    """As many; -inf forbids a token."""

    def applied(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """A copy of logits, `(vocab,)`, with the values added."""
        adjusted = logits.astype(np.float32)
        adjusted[self.ids] += self.values
        return adjusted


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidates:
    """The largest adjusted logits of a row, and sums over all tokens.

    The weight of a token is `exp((adjusted logit - largest) / temperature)`.
    """

    ids: NDArray[np.int32]
    """The likeliest tokens, likeliest first, ties by id: no missing token precedes a listed one."""
    values: NDArray[np.float32]
    """Their adjusted logits."""
    raw: NDArray[np.float32]
    """Their logits before adjustment."""
    bound: float
    """No missing token has a larger adjusted logit; one with just this logit has a larger id than
    those listed with it. -inf if no missing token can be drawn."""
    total: float
    """The sum of all tokens' weights, about."""
    error: float
    """The largest error of the total, in shares of it."""
    log_normaliser: float
    """`log(sum(exp(logit)))` over all tokens, before adjustment: a log-probability is a token's
    logit before adjustment, less this."""
    top_ids: NDArray[np.int32]
    """The tokens of the 20 largest logits before adjustment, largest first, ties by id."""
    top_values: NDArray[np.float32]
    """These logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Parameters of the choice of the next token; the filters apply in the order of the fields.

    Where no token can be drawn (each logit is -inf), the lowest id is taken.

    Raises:
        InvalidValueError: A number lies outside its range.
    """

    temperature: float = 0.0
    """Divides logits; 0 takes the likeliest token and ignores the filters and the seed."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Keep tokens at least this likely, relative to the likeliest."""
    seed: int = 0
    """Same seed, same draws: token n depends on the seed, n and its logits alone."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit, before all filters, for each time it was generated."""
    presence_penalty: float = 0.0
    """Subtracted from a token's logit, before all filters, if it was generated."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, each once, and what is added to their logits before all filters."""

    def __post_init__(self) -> None:
        for name, is_valid, rule in (
            ("temperature", 0 <= self.temperature < inf, "expected at least 0"),
            ("top_k", self.top_k >= 0, "expected at least 0"),
            ("top_p", 0 < self.top_p <= 1, "expected more than 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "expected 0 to 1"),
            ("seed", 0 <= self.seed < 2**64, "expected 0 to 2^64 - 1"),
            ("frequency_penalty", abs(self.frequency_penalty) <= _MOST_PENALTY, "expected -2 to 2"),
            ("presence_penalty", abs(self.presence_penalty) <= _MOST_PENALTY, "expected -2 to 2"),
        ):
            if not is_valid:
                raise invalid(name, getattr(self, name), rule)
        known: set[int] = set()
        for token, bias in self.logit_bias:
            if token < 0 or not abs(bias) <= _MOST_BIAS:
                rule = "expected an id of at least 0 and a bias of -100 to 100"
                raise invalid("logit_bias", f"{token}={bias:g}", rule)
            if token in known:
                raise invalid("logit_bias", f"{token}={bias:g}", "expected each id once")
            known.add(token)

    def adjustments(
        self, counts: Mapping[int, int], banned: Collection[int] = ()
    ) -> Adjustments | None:
        """What is added to the logits of the next token.

        Args:
            counts: How often each token was generated.
            banned: Tokens that must not be chosen. If these are all of the vocabulary, the lowest
                id is chosen.

        Returns:
            The bias less the penalties, and -inf for banned tokens; None if nothing changes.
        """
        if not (self.frequency_penalty or self.presence_penalty):
            counts = {}
        if not (counts or self.logit_bias or banned):
            return None
        times = np.fromiter(counts.values(), np.float64, len(counts))
        penalties = times * self.frequency_penalty + (times > 0) * self.presence_penalty
        bias = np.array([value for _, value in self.logit_bias], np.float64)
        named = [*counts, *(token for token, _ in self.logit_bias), *banned]
        added = np.concatenate([-penalties, bias, np.full(len(banned), -inf)])
        ids, places = np.unique(np.array(named, np.int32), return_inverse=True)
        sums = np.zeros(len(ids))
        np.add.at(sums, places, added)
        values = sums.astype(np.float32)
        changed = np.abs(values) >= _SMALLEST
        return Adjustments(ids[changed], values[changed]) if changed.any() else None

    def choose(self, logits: NDArray[np.float32], step: int) -> int:
        """Choose a token from a whole row.

        Sorts values, which processors do several times faster than their places, and finds the
        token by its value afterwards.

        Args:
            logits: `(vocab,)`, adjusted; finite or -inf.
            step: How many tokens were chosen before.

        Returns:
            A token id.
        """
        if self.temperature == 0:
            return int(np.argmax(logits))
        kept = logits
        if 0 < self.top_k < len(logits):
            kept = np.partition(logits, -self.top_k)[-self.top_k :]
        ascending = np.sort(kept)
        sums = _Sums.of(self._weights(ascending[::-1]))
        place = self._place(sums, self._draw(step))
        value = ascending[-1 - place]
        larger = len(ascending) - int(np.searchsorted(ascending, value, side="right"))
        return int(np.flatnonzero(logits == value)[place - larger])

    def choose_from(self, candidates: Candidates, step: int) -> int | None:
        """Choose the token that `choose` would choose from the whole row.

        The choice moves in one direction as the total grows. Where the least total that is possible
        and the largest choose the same token, the true total does.

        Args:
            candidates: Of the row.
            step: How many tokens were chosen before.

        Returns:
            A token id; None if the candidates do not decide.
        """
        if self.temperature == 0:
            return int(candidates.ids[0])
        values = candidates.values[: self.top_k or None]
        sums = _Sums.of(self._weights(values))
        least = most = 0.0
        if candidates.bound > -inf and not 0 < self.top_k <= len(candidates.values):
            most = max(candidates.total * (1 + candidates.error) - sums.total, 0.0)
            if not self.top_k:
                least = max(candidates.total * (1 - candidates.error) - sums.total, 0.0)
        draw = self._draw(step)
        place = self._place(sums, draw, missing=least, is_least=True)
        if place == len(values) or place != self._place(sums, draw, missing=most):
            return None
        return int(candidates.ids[place])

    def distribution(
        self, logits: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The definition: tokens that can be drawn, likeliest first, and their probabilities.

        Ties are ordered by token id, so the result is the same everywhere. A draw in [0, 1) takes
        the first token up to which the probabilities sum to more.
        """
        order: NDArray[Any] = np.argsort(-logits, kind="stable")[: self.top_k or None]
        weights = self._weights(logits[order])
        sums = np.cumsum(weights)
        in_nucleus = (sums - weights < self.top_p * sums[-1]) | (self.top_p == 1)
        keep = in_nucleus & (weights >= max(self.min_p, _LEAST_WEIGHT))
        keep[0] = True
        return order[keep], weights[keep] / weights[keep].sum()

    def _weights(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """`exp((value - largest) / temperature)` of descending values."""
        weights = values.astype(np.float64)
        weights -= max(weights[0], _LOWEST)
        with np.errstate(over="ignore"):  # a temperature next to 0 leaves only the likeliest
            weights /= self.temperature
        np.exp(weights, out=weights)
        weights[0] = 1.0  # also where all values are -inf
        return weights

    def _draw(self, step: int) -> float:
        return float(np.random.default_rng([self.seed, step]).random())

    def _place(
        self, sums: "_Sums", draw: float, *, missing: float = 0.0, is_least: bool = False
    ) -> int:
        """The place that a draw takes among weights; their number if it is behind them.

        Args:
            sums: Of the weights of the likeliest tokens.
            draw: In [0, 1).
            missing: Sum of the weights of all less likely tokens that top-k keeps.
            is_least: Where tokens behind the list are kept, but how many is unknown, count as few
                as possible; by default as many as possible.
        """
        total, listed = sums.total + missing, len(sums.weights)
        kept = sums.at_least(max(self.min_p, _LEAST_WEIGHT))
        if kept == listed and missing:
            kept += 1
        if self.top_p < 1:
            kept = min(kept, sums.reaching(self.top_p * total) + 1)
        if kept <= listed:
            mass = sums.first(kept)
        elif is_least:
            mass = sums.total if self.min_p else max(sums.total, self.top_p * total)
        else:
            mass = min(total, self.top_p * total + float(sums.weights[-1]))
        return min(sums.exceeding(draw * mass), kept - 1)


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """Sums of the first weights of a descending list, computed where they are asked for."""

    weights: NDArray[np.float64]
    ends: NDArray[np.float64]
    """Sum of all weights up to the end of each block."""

    @classmethod
    def of(cls, weights: NDArray[np.float64]) -> Self:
        """Add up each block."""
        return cls(weights, np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK))))

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self.ends[-1])

    def first(self, count: int) -> float:
        """Sum of the first weights, of at least one."""
        block, last = divmod(count - 1, _BLOCK)
        return float(self._inside(block)[last])

    def at_least(self, weight: float) -> int:
        """How many weights are at least this large."""
        return len(self.weights) - int(np.searchsorted(self.weights[::-1], weight))

    def reaching(self, target: float) -> int:
        """The first place up to which the sum is the target or more; the list's length if none."""
        return self._find(target, "left")

    def exceeding(self, target: float) -> int:
        """The first place up to which the sum is more than the target; the length if none."""
        return self._find(target, "right")

    def _find(self, target: float, side: Literal["left", "right"]) -> int:
        block = int(np.searchsorted(self.ends, target, side=side))
        if block == len(self.ends):
            return len(self.weights)
        return block * _BLOCK + int(np.searchsorted(self._inside(block), target, side=side))

    def _inside(self, block: int) -> NDArray[np.float64]:
        before = float(self.ends[block - 1]) if block else 0.0
        return before + np.cumsum(self.weights[block * _BLOCK : (block + 1) * _BLOCK])
