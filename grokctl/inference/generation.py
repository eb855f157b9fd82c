"""A request, the events on its way, and its result, as values."""

import math
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grokctl.errors import GrokctlError, invalid
from grokctl.model.bucketing import TOP_LOGPROBS
from grokctl.model.sampling import Sampling


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"
    """As many tokens as asked for."""
    CONTEXT = "context"
    """No position is left, though more tokens were asked for."""
    INTERRUPTED = "interrupted"


class PromptOutput(StrEnum):
    """What a request wants of its prompt, beside its continuation."""

    NOTHING = "nothing"
    SCORES = "scores"
    """The log-probability of every token after the first: `PromptScores`."""
    LOGITS = "logits"
    """The logits after every token: `PromptLogits`, and no continuation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt, and the settings of its continuation."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    sampling: Sampling
    max_tokens: int
    """Ends with `length` after this many, or with `context` before; with 0, the prompt is read only
    if something of it is wanted."""
    min_tokens: int = 0
    """Before this many tokens, neither the end token nor a stop token is sampled."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these, with `stop`."""
    stop_token_ids: tuple[int, ...] = ()
    """Each of these ends the text as the end token does."""
    ignore_eos: bool = False
    """Whether to go on after the end token."""
    cache_prompt: bool = True
    """Whether to start from a kept prefix of the prompt, and to keep this one for later."""
    logprobs: int | None = None
    """Whether tokens come with log-probabilities, and with those of so many of the likeliest."""
    of_prompt: PromptOutput = PromptOutput.NOTHING
    """What is wanted of the prompt itself."""

    @property
    def is_reused(self) -> bool:
        """Whether a kept prefix is of use: all logits of a prompt come from running all of it."""
        return self.cache_prompt and self.of_prompt is not PromptOutput.LOGITS

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise invalid("max_tokens", self.max_tokens, "expected at least 0")
        if self.min_tokens < 0:
            raise invalid("min_tokens", self.min_tokens, "expected at least 0")
        if self.logprobs is not None and not 0 <= self.logprobs <= TOP_LOGPROBS:
            raise invalid("logprobs", self.logprobs, f"expected 0 to {TOP_LOGPROBS}")
        if self.of_prompt is PromptOutput.LOGITS and self.max_tokens:
            raise invalid("max_tokens", self.max_tokens, "expected 0 beside the prompt's logits")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse settings that name a token id outside the vocabulary.

        Raises:
            InvalidValueError: There is one.
        """
        biased = tuple(token for token, _ in self.sampling.logit_bias)
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", biased)):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise invalid(name, token, f"expected a token id from 0 to {vocab_size - 1}")


# --- what happens to a request, in this order


@dataclass(frozen=True, slots=True)
class PromptRead:
    """The prompt has a slot, or a part of it has run."""

    done: int
    """Tokens of the prompt in the KV cache, those of a kept prefix included."""
    cached: int
    """Tokens of the kept prefix."""


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of consecutive tokens of the prompt."""

    start: int
    """Place of the first of these tokens in the prompt; at least 1: nothing precedes token 0."""
    logprobs: NDArray[np.float32]
    """Natural logarithm of each token's probability after the tokens before it, `(tokens,)`."""
    top_ids: NDArray[np.int32]
    """The likeliest tokens in each place, the likeliest first, `(tokens, 20)`."""
    top_logprobs: NDArray[np.float32]
    """Their log-probabilities, `(tokens, 20)`."""

    @property
    def end(self) -> int:
        """Place behind the last of these tokens."""
        return self.start + len(self.logprobs)

    def between(self, low: int, high: int) -> "PromptScores":
        """Those of the tokens from place `low` to before `high`."""
        low = max(low, self.start)
        part = slice(low - self.start, max(0, high - self.start))
        return PromptScores(
            start=low,
            logprobs=self.logprobs[part],
            top_ids=self.top_ids[part],
            top_logprobs=self.top_logprobs[part],
        )


@dataclass(frozen=True, slots=True)
class PromptLogits:
    """Logits after consecutive tokens of the prompt."""

    start: int
    """Place of the first of these tokens in the prompt."""
    logits: NDArray[np.float32]
    """`(tokens, vocab)`."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, or the last text of a generation."""

    id: int | None
    """None for text that only the end of the generation made certain."""
    text: str
    """Text that the token made certain: maybe none, maybe that of several tokens."""
    logprob: float | None = None
    """Natural logarithm of its probability by the model alone: before temperature, filters, bias
    and penalties. None if not wanted."""
    top: tuple[tuple[int, float], ...] = ()
    """Ids and log-probabilities of the likeliest tokens, as many as wanted."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The last event of a request that was fulfilled or cancelled."""

    generation: "Generation"


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that could not be fulfilled."""

    error: GrokctlError


RequestEvent = PromptRead | PromptScores | PromptLogits | Token | Ended | Failed


# --- results


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Timings of loading and of one generation."""

    load_s: float = 0.0
    compile_s: float = 0.0
    first_token_s: float = 0.0
    """Of the prompt, up to the first token: without compilation, and without other requests."""
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were kept from an earlier request."""
    bytes_per_token: int = 0
    """Weights read for one decoded token, on all devices together."""
    bandwidth_fraction: float | None = None
    """Share of the measured memory bandwidth that decoding reached; None if not measured."""
    kernel: str = ""
    """What multiplies on a CPU, or why it is not the native kernel; empty on accelerators."""
    pages: str = ""
    """How weights lie in a CPU's memory; empty on accelerators, and if not looked at."""
    hit_rate: float | None = None
    """Share of the experts that decoding chose that were in memory; None if none are streamed."""
    disk_bytes_per_token: int | None = None
    """Of experts, on average; None likewise."""
    disk_fraction: float | None = None
    """Share of the disk's rate that reading them reached; None likewise."""
    waited_s: float = 0.0
    """Seconds of decoding in which nothing was computed because an expert was not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStats:
    """Timings of loading and of many requests together."""

    load_s: float = 0.0
    compile_s: float = 0.0
    seconds: float = 0.0
    """From the first prompt to the last token, without compilation."""
    prompt_tokens: int = 0
    """Tokens of all prompts that came to an end."""
    cached_tokens: int = 0
    """Of these, tokens whose keys and values were kept from earlier requests."""
    tokens: int = 0
    """Generated tokens of these."""
    prefill_s: float = 0.0
    prefilled: int = 0
    """Tokens of prompts that ran, other than those of decode steps."""
    decode_s: float = 0.0
    steps: int = 0
    """Decode steps: each makes one token of every running sequence."""
    decoded: int = 0
    """Tokens made by decode steps; most sequences get their first one from their prompt."""
    bytes_read: int = 0
    """Weights read by decode steps, on all devices together."""
    bandwidth_fraction: float | None = None
    """Share of the measured memory bandwidth that decoding reached; None if not measured."""
    kernel: str = ""
    """As in `Stats`."""
    pages: str = ""
    """As in `Stats`."""
    experts_chosen: int = 0
    """By decode steps, in each layer; 0 if no experts are streamed."""
    experts_missed: int = 0
    """Of these, experts that came from the disk."""
    disk_bytes: int = 0
    """Bytes of these."""
    disk_fraction: float | None = None
    """As in `Stats`."""
    waited_s: float = 0.0
    """As in `Stats`."""

    def plus(self, **more: float) -> "BatchStats":
        """The same with more added to some of its sums."""
        sums: dict[str, Any] = {name: getattr(self, name) + more[name] for name in more}
        return replace(self, **sums)

    def since(self, before: "BatchStats") -> "BatchStats":
        """What came after an earlier state of the same statistics; loading is of both."""
        sums = {field.name: getattr(self, field.name) for field in fields(self)}
        past = {name: getattr(before, name) for name in sums}
        kept = ("load_s", "bandwidth_fraction", "kernel", "pages", "disk_fraction")
        return BatchStats(
            **{name: sums[name] if name in kept else sums[name] - past[name] for name in sums}
        )

    @property
    def prefill_tokens_per_s(self) -> float:
        """Of all prompts together."""
        return self.prefilled / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Of all sequences together."""
        return self.decoded / self.decode_s if self.decode_s else 0.0

    @property
    def hit_rate(self) -> float | None:
        """Share of the chosen experts that were in memory; None if none are streamed."""
        return 1 - self.experts_missed / self.experts_chosen if self.experts_chosen else None

    @property
    def disk_bytes_per_token(self) -> int | None:
        """Bytes of experts from the disk, for each decoded token; None if none are streamed."""
        return self.disk_bytes // self.decoded if self.experts_chosen else None

    @property
    def bytes_per_step(self) -> int:
        """Weights read by a decode step, on all devices together."""
        return self.bytes_read // self.steps if self.steps else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One prompt's continuation."""

    prompt_tokens: int
    seed: int
    ids: tuple[int, ...]
    """Every sampled token, the end token included."""
    text: str
    """Without the end token, and without a stop string and what follows it."""
    finish_reason: FinishReason
    ended_by: int | str | None = None
    """The stop string, or the stop token, that ended it; None for the end token and other ends."""
    stats: Stats


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
