"""What a run gives: tokens, texts, timings and scores, as values."""

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
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt, and how to continue it."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    sampling: Sampling
    max_tokens: int
    """Ends with `length` after this many."""
    stop: tuple[str, ...] = ()
    """Ends with `stop` where the text comes to one of these, which is left out."""
    ignore_eos: bool = False
    """Whether to go on after the end token."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, or the last text of a generation."""

    id: int | None
    """None for text that only the end made certain."""
    text: str
    """What became certain with it; may be empty, may hold several tokens' text."""


@dataclass(slots=True, kw_only=True)
class Stats:
    """What loading and one generation took."""

    load_s: float = 0.0
    compile_s: float = 0.0
    first_token_s: float = 0.0
    """From the prompt to the first token, compilation left out."""
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    bytes_per_token: int = 0
    """Weights read for one decoded token, on all devices together."""
    bandwidth_fraction: float | None = None
    """Share of the measured memory bandwidth that decoding reached; None if not measured."""


@dataclass(slots=True, kw_only=True)
class BatchStats:
    """What loading and the prompts of a batch took, all together."""

    load_s: float = 0.0
    compile_s: float = 0.0
    seconds: float = 0.0
    """From the first prompt to the last token, compilation left out."""
    prompt_tokens: int = 0
    tokens: int = 0
    """Tokens that were generated."""
    prefill_s: float = 0.0
    prefilled: int = 0
    """Tokens of prompts that were run: not of those after which none was wanted."""
    decode_s: float = 0.0
    steps: int = 0
    """Decode steps: each makes one token of every sequence that is under way."""
    decoded: int = 0
    """Tokens that decode steps made; the first of every sequence comes from its prompt."""
    bytes_read: int = 0
    """Weights that decode steps had to read, on all devices together."""
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
        """Weights that a decode step has to read, on all devices together."""
        return self.bytes_read // self.steps if self.steps else 0


@dataclass(slots=True, kw_only=True)
class Generation:
    """One prompt's continuation; iterate over it once, then read what it came to."""

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
        """Note what came."""
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
    def perplexity(self) -> float:
        """Exponential of the mean negative log-likelihood; 1 for a single token."""
        return math.exp(self.nll / max(1, self.tokens - 1))


class StopFilter:
    """Holds back text that may be the beginning of a stop string."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = tuple(filter(None, stop))
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add text; return what is certain to come before any stop string."""
        if self.found:
            return ""
        self._held += text
        # the one that is complete first, so that it does not matter in what pieces the text comes
        found = [
            (place + len(text), place)
            for text in self._stop
            if (place := self._held.find(text)) >= 0
        ]
        if found:
            self.found = True
            return self._held[: min(found)[1]]
        keep = max(
            (
                length
                for text in self._stop
                for length in range(min(len(text) - 1, len(self._held)), 0, -1)
                if self._held.endswith(text[:length])
            ),
            default=0,
        )
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return certain

    def finish(self) -> str:
        """What was held back in vain."""
        return "" if self.found else self._held


def negative_log_likelihood(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    """Sum over rows of `logsumexp(logits) - logits[target]`, in float64."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1, keepdims=True, initial=-np.inf)
    normaliser = np.log(np.exp(wide - top).sum(axis=1)) + top[:, 0]
    return float(np.sum(normaliser - wide[np.arange(len(targets)), targets]))
