"""The results of a run as values: tokens, texts, timings and scores."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from grokctl.model.sampling import Sampling


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"
    """As many tokens as asked for."""
    CONTEXT = "context"
    """No position is left, though more tokens were asked for."""
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt, and the settings of its continuation."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    sampling: Sampling
    max_tokens: int
    """Ends with `length` after this many, or with `context` before."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these, with `stop`."""
    ignore_eos: bool = False
    """Whether to go on after the end token."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, or the last text of a generation."""

    id: int | None
    """None for text that only the end of the generation made certain."""
    text: str
    """Text that the token made certain: maybe none, maybe that of several tokens."""


@dataclass(slots=True, kw_only=True)
class Stats:
    """Timings of loading and of one generation."""

    load_s: float = 0.0
    compile_s: float = 0.0
    first_token_s: float = 0.0
    """From the prompt to the first token, without compilation."""
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    bytes_per_token: int = 0
    """Weights read for one decoded token, on all devices together."""
    bandwidth_fraction: float | None = None
    """Share of the measured memory bandwidth that decoding reached; None if not measured."""


@dataclass(slots=True, kw_only=True)
class BatchStats:
    """Timings of loading and of all prompts of a batch together."""

    load_s: float = 0.0
    compile_s: float = 0.0
    seconds: float = 0.0
    """From the first prompt to the last token, without compilation."""
    prompt_tokens: int = 0
    tokens: int = 0
    """Generated tokens."""
    prefill_s: float = 0.0
    prefilled: int = 0
    """Tokens of prompts that ran: none of a prompt without tokens to generate."""
    decode_s: float = 0.0
    steps: int = 0
    """Decode steps: each makes one token of every running sequence."""
    decoded: int = 0
    """Tokens made by decode steps; the first of every sequence comes from its prompt."""
    bytes_read: int = 0
    """Weights read by decode steps, on all devices together."""
    bandwidth_fraction: float | None = None
    """Share of the measured memory bandwidth that decoding reached; None if not measured."""

    @property
    def prefill_tokens_per_s(self) -> float:
        """Of all prompts together."""
        return self.prefilled / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Of all sequences together."""
        return self.decoded / self.decode_s if self.decode_s else 0.0

    @property
    def bytes_per_step(self) -> int:
        """Weights read by a decode step, on all devices together."""
        return self.bytes_read // self.steps if self.steps else 0


@dataclass(slots=True, kw_only=True)
class Generation:
    """One prompt's continuation; iterate over it once, then read its fields."""

    tokens: Iterator[Token]
    prompt_tokens: int
    seed: int
    stats: Stats
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None

    def __iter__(self) -> Iterator[Token]:
        return self.tokens

    def add(self, token: Token) -> None:
        """Append a token."""
        if token.id is not None:
            self.ids.append(token.id)
        self.text += token.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Teacher-forced likelihood of given tokens."""

    tokens: int
    nll: float
    """Negative log-likelihood of all tokens after the first, in nats."""

    @property
    def mean_nll(self) -> float:
        """Nats for each token after the first; 0 for a single token."""
        return self.nll / max(1, self.tokens - 1)

    @property
    def perplexity(self) -> float | None:
        """Exponential of the mean; 1 for a single token, None above 1.8e308."""
        try:
            return math.exp(self.mean_nll)
        except OverflowError:
            return None


class StopFilter:
    """Holds back text that may be the beginning of a stop string."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = tuple(filter(None, stop))
        self._pending = ""
        self.has_stopped = False

    def push(self, text: str) -> str:
        """Add text; return what is certain to come before any stop string."""
        if self.has_stopped:
            return ""
        self._pending += text
        # the stop string that is complete first, whatever the pieces of text
        matches = [
            (place + len(text), place)
            for text in self._stop
            if (place := self._pending.find(text)) >= 0
        ]
        if matches:
            self.has_stopped = True
            return self._pending[: min(matches)[1]]
        keep = max(
            (
                length
                for text in self._stop
                for length in range(min(len(text) - 1, len(self._pending)), 0, -1)
                if self._pending.endswith(text[:length])
            ),
            default=0,
        )
        certain = self._pending[: len(self._pending) - keep]
        self._pending = self._pending[len(certain) :]
        return certain

    def finish(self) -> str:
        """The text held back: no stop string follows."""
        return "" if self.has_stopped else self._pending


def negative_log_likelihood(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    """Sum over rows of `logsumexp(logits) - logits[target]`, in float64."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1, keepdims=True, initial=-np.inf)
    normaliser = np.log(np.exp(wide - top).sum(axis=1)) + top[:, 0]
    return float(np.sum(normaliser - wide[np.arange(len(targets)), targets]))
