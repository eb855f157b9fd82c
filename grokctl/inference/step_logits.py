"""The logits of a step, on the devices until the host needs them, and the draws from them."""

from collections.abc import Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from grokctl.errors import GrokctlError, Reason, corrupt
from grokctl.inference.sequence import Sequence
from grokctl.model.candidates import merge
from grokctl.model.sampling import Candidates

_FEWEST_ADJUSTED: Final = 16
"""Adjusted logits of a row, where there are some: a program is compiled for each power of four."""
_HOTTEST: Final = 1e30
"""A temperature that float32 has; devices take less than this."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A token, and its log-probabilities if the request wants them."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class AdjustedRows:
    """How the logits of every row of a step are changed on the devices."""

    temperatures: NDArray[np.float32]
    """`(rows,)`; 1 where the likeliest is taken."""
    ids: NDArray[np.int32]
    """Tokens whose logits change, `(rows, adjusted)`; one behind the vocabulary changes nothing."""
    values: NDArray[np.float32]
    """What is added, `(rows, adjusted)`."""

    @classmethod
    def of(cls, sequences: Several[Sequence], *, padded: int, vocab_size: int) -> Self:
        """Those of sequences, and of rows behind them that change nothing."""
        changes = [sequence.adjustments() for sequence in sequences]
        largest = max((len(change.ids) for change in changes if change), default=0)
        width = next(width for width in adjusted_widths() if width >= largest)
        rows = cls.unchanged(padded, width=width, vocab_size=vocab_size)
        for row, (sequence, change) in enumerate(zip(sequences, changes, strict=True)):
            rows.temperatures[row] = min(sequence.request.sampling.temperature or 1.0, _HOTTEST)
            if change is not None:
                rows.ids[row, : len(change.ids)] = change.ids
                rows.values[row, : len(change.ids)] = change.values
        return rows

    @classmethod
    def unchanged(cls, rows: int, *, width: int, vocab_size: int) -> Self:
        """So many rows, with room for so many adjustments, of which there are none."""
        return cls(
            temperatures=np.ones(rows, np.float32),
            ids=np.full((rows, width), vocab_size, np.int32),
            values=np.zeros((rows, width), np.float32),
        )

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """In the order of the program's arguments."""
        return self.temperatures, self.ids, self.values

    def packed(self) -> tuple[NDArray[np.int32], ...]:
        """For an order to the other processes of a cluster."""
        return self.temperatures.view(np.int32), self.ids, self.values.view(np.int32)

    @classmethod
    def unpacked(cls, facts: NDArray[np.int32], *, rows: int) -> Self:
        """From such an order."""
        temperatures, (ids, values) = facts[:rows], facts[rows:].reshape(2, rows, -1)
        return cls(temperatures.view(np.float32), ids, values.view(np.float32))


def adjusted_widths() -> Iterator[int]:
    """Numbers of adjusted logits of a row that programs are compiled for: 0, 16, 64, …."""
    yield 0
    width = _FEWEST_ADJUSTED
    while True:
        yield width
        width *= 4


class Source(Protocol):
    """The runner of the step."""

    def logits_on_host(self, batch: int) -> NDArray[np.float32]:
        """All rows."""

    @property
    def candidates(self) -> int:
        """Largest logits of a row that each device lists."""

    def largest_logits(self, rows: AdjustedRows) -> NDArray[np.int32]:
        """What `model/candidates.largest` has found, `(devices, rows, columns)`."""


class StepLogits:
    """Logits `(rows, vocab)` of the last step of a runner; the next step replaces them.

    Args:
        source: The runner.
        rows: Sequences of the step.
        padded: The same with padding.
        vocab_size: Of the model.
        is_on_device: Whether tokens are drawn from what the devices find, and whole rows stay there
            unless a draw needs them.
    """

    def __init__(
        self, source: Source, *, rows: int, padded: int, vocab_size: int, is_on_device: bool
    ) -> None:
        self._source = source
        self._rows = rows
        self._padded = padded
        self._vocab_size = vocab_size
        self._is_on_device = is_on_device
        self._host: NDArray[np.float32] | None = None

    def on_host(self) -> NDArray[np.float32]:
        """All rows, `(rows, vocab)`."""
        if self._host is None:
            self._host = self._source.logits_on_host(self._padded)[: self._rows]
        return self._host

    def draw(self, sequences: Several[Sequence]) -> list[Draw | GrokctlError]:
        """Choose the next token of each sequence.

        Args:
            sequences: One for each row.

        Returns:
            A token, or the error of a row that is not finite, for each.
        """
        if not self._is_on_device:
            rows = self.on_host()
            return [_draw(sequence, row) for sequence, row in zip(sequences, rows, strict=True)]
        adjusted = AdjustedRows.of(sequences, padded=self._padded, vocab_size=self._vocab_size)
        parts = self._source.largest_logits(adjusted)
        drawn: list[Draw | GrokctlError] = []
        for row, sequence in enumerate(sequences):
            candidates = merge(
                parts[:, row],
                vocab=self._vocab_size,
                count=self._source.candidates,
                temperature=sequence.request.sampling.temperature,
            )
            if not np.isfinite(candidates.log_normaliser):
                drawn.append(not_finite())
                continue
            token = sequence.request.sampling.choose_from(candidates, len(sequence.ids))
            if token is None:
                drawn.append(_draw(sequence, self.on_host()[row]))
            else:
                drawn.append(_with_logprobs(Draw(token), sequence, candidates))
        return drawn


def _draw(sequence: Sequence, logits: NDArray[np.float32]) -> Draw | GrokctlError:
    """Choose the next token on the host."""
    if not np.isfinite(logits).all():
        return not_finite()
    request, changes = sequence.request, sequence.adjustments()
    adjusted = logits if changes is None else changes.applied(logits)
    token = request.sampling.choose(adjusted, len(sequence.ids))
    if request.logprobs is None:
        return Draw(token)
    top = largest(logits, request.logprobs)
    normaliser = log_normaliser(logits)
    return Draw(
        token,
        float(logits[token] - normaliser),
        tuple((int(each), float(logits[each] - normaliser)) for each in top),
    )


def _with_logprobs(draw: Draw, sequence: Sequence, candidates: Candidates) -> Draw:
    count = sequence.request.logprobs
    if count is None:
        return draw
    (place,) = np.flatnonzero(candidates.ids == draw.token)
    normaliser = candidates.log_normaliser
    top = zip(candidates.top_ids[:count], candidates.top_values[:count], strict=True)
    return replace(
        draw,
        logprob=float(candidates.raw[place] - normaliser),
        top=tuple((int(token), float(value - normaliser)) for token, value in top),
    )


def largest(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Ids of the `count` largest logits of a row, the largest first, ties by id."""
    if count == 0:
        return np.empty(0, np.int64)
    count = min(count, len(logits))
    border = np.partition(logits, -count)[-count]
    kept = np.flatnonzero(logits >= border)
    return kept[np.argsort(-logits[kept], kind="stable")][:count]


def log_normaliser(logits: NDArray[np.float32]) -> np.float64:
    """`log(sum(exp(logits)))` of each row, in float64, `(…, vocab)` to `(…)`."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1)
    normaliser: np.float64 = np.log(np.exp(wide - top[..., None]).sum(axis=-1)) + top
    return normaliser


def log_probabilities(
    logits: NDArray[np.float32], targets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """`logits[target] - log(sum(exp(logits)))` of each row, in float64, `(rows, vocab)`."""
    chosen = logits[np.arange(len(targets)), targets].astype(np.float64)
    return chosen - log_normaliser(logits)


def not_finite() -> GrokctlError:
    """The error of a request whose logits are no numbers."""
    return corrupt(
        "logits",
        Reason.MALFORMED,
        "the model computed values that are not finite: a weight or a scale is not",
        "grokctl verify  # proves the files; grokctl inspect --stats shows values",
    )
