"""Log-probabilities as the legacy interface for completions has them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from grokctl.inference.generation import PromptScores, Token
from grokctl.serving.vocabulary import Vocabulary, placeholder

_LOWEST: Final = -9999.0
"""JSON has no infinity."""
Top = Sequence[tuple[int, float]]
"""Ids and log-probabilities, the likeliest first."""


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a prompt or a completion, with the likeliest in its place."""

    id: int
    logprob: float | None
    """None for the first token of a prompt: nothing precedes it."""
    top: Top
    offset: int
    """Characters of the returned text before it."""


@dataclass(slots=True)
class Logprobs:
    """Columns of one length; those of a stream's events, joined, are those of the whole answer."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)
    content: list[dict[str, Any]] = field(default_factory=list)
    """The same with ids and bytes, if those are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenNames:
    """How a client wants tokens to be named.

    Args:
        vocabulary: None for a checkpoint without a tokenizer.
        as_ids: Whether each is `token_id:42`.
        with_ids: Whether the second form, with ids and bytes, is wanted.
    """

    vocabulary: Vocabulary | None
    as_ids: bool = False
    with_ids: bool = False

    def name(self, token: int) -> str:
        """A token as a string."""
        if self.as_ids or self.vocabulary is None:
            return placeholder(token)
        return self.vocabulary.name(token)

    def add(self, columns: Logprobs, scored: Iterable[ScoredToken]) -> Logprobs:
        """Add tokens to columns."""
        for each in scored:
            columns.tokens.append(self.name(each.id))
            columns.text_offset.append(each.offset)
            if each.logprob is None:
                columns.token_logprobs.append(None)
                columns.top_logprobs.append(None)
            else:
                top = _with_own(each.id, each.logprob, each.top)
                columns.token_logprobs.append(dict(top)[each.id])
                columns.top_logprobs.append(self._named(top))
            if self.with_ids:
                columns.content.append(self._entry(each))
        return columns

    def _named(self, top: Top) -> dict[str, float]:
        named: dict[str, float] = {}
        for token, logprob in top:
            name = self.name(token)
            named[placeholder(token) if name in named else name] = logprob
        return named

    def _entry(self, scored: ScoredToken) -> dict[str, Any]:
        if scored.logprob is None:
            return {**self._one(scored.id, None), "top_logprobs": []}
        top = _with_own(scored.id, scored.logprob, scored.top)
        listed = [self._one(token, logprob) for token, logprob in top]
        return {**self._one(scored.id, dict(top)[scored.id]), "top_logprobs": listed}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        nbytes = [] if self.vocabulary is None else self.vocabulary.bytes_of(token)
        return {"id": token, "token": self.name(token), "bytes": nbytes, "logprob": logprob}


def _with_own(token: int, logprob: float, top: Top) -> list[tuple[int, float]]:
    """The likeliest tokens, and the token itself: if it is one of them, with the same number."""
    found = [(each, max(value, _LOWEST)) for each, value in top]
    if all(each != token for each, _ in found):
        found.append((token, max(logprob, _LOWEST)))
    return found


def of_prompt(
    prompt: Sequence[int], scores: Iterable[PromptScores], offsets: Sequence[int], *, count: int
) -> list[ScoredToken]:
    """The tokens of a prompt.

    Args:
        prompt: Token ids.
        scores: Of all tokens after the first, in order.
        offsets: Of all tokens.
        count: Likeliest tokens to list.
    """
    scored = [ScoredToken(prompt[0], None, (), offsets[0])]
    for part in scores:
        tops = zip(
            part.top_ids[:, :count].tolist(), part.top_logprobs[:, :count].tolist(), strict=True
        )
        rows = zip(part.logprobs.tolist(), tops, strict=True)
        for place, (logprob, (ids, values)) in enumerate(rows, start=part.start):
            top = list(zip(ids, values, strict=True))
            scored.append(ScoredToken(prompt[place], logprob, top, offsets[place]))
    return scored


def of_token(token: Token, offset: int) -> ScoredToken:
    """A generated token, which has a log-probability."""
    assert token.id is not None
    assert token.logprob is not None
    return ScoredToken(token.id, token.logprob, token.top, offset)
