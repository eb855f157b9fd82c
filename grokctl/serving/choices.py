"""One choice of an answer: the engine's events become pieces of it, which are sent or joined."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from grokctl.inference.generation import (
    Ended,
    FinishReason,
    Generation,
    PromptScores,
    RequestEvent,
    Token,
)
from grokctl.serving.completion_request import CompletionRequest
from grokctl.serving.logprobs import Logprobs, TokenNames, of_prompt, of_token
from grokctl.serving.served_model import EncodedPrompt

_REASONS: Final = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT: "length",
}
_MANY: Final = 64
"""Scores of tokens that take longer to write down than others should wait."""


@dataclass(slots=True)
class Piece:
    """Consecutive tokens of a choice, and the text that they made certain."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_ids: tuple[int, ...] | None = None
    """Where the choice begins, if ids are wanted."""
    made: int = 0
    """Sampled tokens of the choice, these included."""


class Choice:
    """A choice on its way.

    Args:
        index: In the answer.
        request: What the client asks for.
        prompt: Of this choice.
        names: How tokens are called.
    """

    def __init__(
        self, index: int, request: CompletionRequest, prompt: EncodedPrompt, names: TokenNames
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.made = 0
        """Sampled tokens until now."""
        self.cached = 0
        """Tokens of the prompt that did not run, once it has ended."""
        self.seed = 0
        self.generation: Generation | None = None
        self._request = request
        self._names = names
        self._has_begun = False
        self._scores: list[PromptScores] = []
        self._offset = len(prompt.text)
        """Where the next token's text begins, if nothing is cut off."""
        words = names.vocabulary if request.settings.logprobs is not None else None
        self._stream = None if words is None else words.tokenizer.stream(prompt.ids)

    def is_long(self, events: Iterable[RequestEvent]) -> bool:
        """Whether the pieces of events take long to make."""
        kept = sum(len(part.logprobs) for part in self._scores)
        new = sum(len(event.logprobs) for event in events if isinstance(event, PromptScores))
        return kept + new > _MANY

    def take(self, events: Iterable[RequestEvent]) -> list[Piece]:
        """The pieces of the events of a turn: one for each sampled token, and the end on the last.

        An end by itself is a piece of its own.
        """
        pieces: list[Piece] = []
        for event in events:
            match event:
                case PromptScores():
                    self._scores.append(event)
                case Token(id=None, text=text):
                    self._last(pieces).text += text
                case Token():
                    pieces.append(self._piece(event))
                case Ended(generation):
                    self._end(self._last(pieces), generation)
                case _:
                    pass
        return pieces

    def _last(self, pieces: list[Piece]) -> Piece:
        if not pieces:
            pieces.append(self._new_piece())
        return pieces[-1]

    def _new_piece(self) -> Piece:
        """An empty piece; the first one has what belongs to the prompt."""
        piece = Piece(made=self.made)
        if self._request.settings.logprobs is not None:
            piece.logprobs = Logprobs()
        if self._has_begun:
            return piece
        self._has_begun = True
        piece.text = self.prompt.text
        if self._request.return_ids:
            piece.prompt_ids = self.prompt.ids
        if piece.logprobs is not None and self._request.echo:
            count = self._request.settings.logprobs or 0
            scored = of_prompt(self.prompt.ids, self._scores, self.prompt.offsets, count=count)
            self._names.add(piece.logprobs, scored)
        self._scores = []
        return piece

    def _piece(self, token: Token) -> Piece:
        piece = self._new_piece()
        assert token.id is not None
        piece.text += token.text
        piece.ids.append(token.id)
        self.made += 1
        piece.made = self.made
        if piece.logprobs is not None:
            self._names.add(piece.logprobs, [of_token(token, self._offset)])
            if self._stream is not None:
                self._offset += len(self._stream.push(token.id))
        return piece

    def _end(self, piece: Piece, generation: Generation) -> None:
        self.generation, self.seed = generation, generation.seed
        self.cached = generation.stats.cached_tokens
        piece.finish_reason = _REASONS.get(generation.finish_reason)
        piece.stop_reason = generation.ended_by

    # --- on the wire

    def shown(self, piece: Piece) -> dict[str, Any]:
        """A piece as an element of `choices`."""
        shown: dict[str, Any] = {
            "index": self.index,
            "text": piece.text,
            "logprobs": self._shown_logprobs(piece.logprobs),
            "finish_reason": piece.finish_reason,
        }
        if piece.finish_reason is not None:
            shown |= {"stop_reason": piece.stop_reason, "seed": self.seed}
        if self._request.return_ids:
            shown["token_ids"] = piece.ids
            if piece.prompt_ids is not None:
                shown["prompt_token_ids"] = list(piece.prompt_ids)
        return shown

    def _shown_logprobs(self, columns: Logprobs | None) -> dict[str, Any] | None:
        if columns is None:
            return None
        shown: dict[str, Any] = {
            "tokens": columns.tokens,
            "token_logprobs": columns.token_logprobs,
            "top_logprobs": columns.top_logprobs,
            "text_offset": columns.text_offset,
        }
        if self._request.return_ids:
            shown["content"] = columns.content
        return shown


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of a choice as one; no token begins behind the end of the text."""
    whole = Piece(text="".join(piece.text for piece in pieces))
    for piece in pieces:
        whole.ids += piece.ids
        whole.finish_reason = piece.finish_reason or whole.finish_reason
        whole.stop_reason = piece.stop_reason if piece.finish_reason else whole.stop_reason
        whole.prompt_ids = piece.prompt_ids or whole.prompt_ids
        if piece.logprobs is None:
            continue
        whole.logprobs = columns = whole.logprobs or Logprobs()
        columns.tokens += piece.logprobs.tokens
        columns.token_logprobs += piece.logprobs.token_logprobs
        columns.top_logprobs += piece.logprobs.top_logprobs
        columns.content += piece.logprobs.content
        end = len(whole.text)
        columns.text_offset += [min(offset, end) for offset in piece.logprobs.text_offset]
    return whole
