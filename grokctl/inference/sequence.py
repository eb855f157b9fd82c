"""One prompt on its way: changes of its next logits, its text, and the reason of its end."""

from collections import Counter

from grokctl.inference.generation import FinishReason, Request, Token
from grokctl.inference.stop_filter import StopFilter
from grokctl.model.sampling import Adjustments
from grokctl.model.tokenizer import Tokenizer


class Sequence:
    """The state of a generation between two steps of the model.

    Args:
        request: The prompt, and its settings.
        eos_token: The model's end token.
        tokenizer: Turns tokens into text; without a tokenizer, texts are empty.
        context: Positions of a slot.
    """

    def __init__(
        self, request: Request, *, eos_token: int, tokenizer: Tokenizer | None, context: int
    ) -> None:
        self.request = request
        self.limit = min(request.max_tokens, context - len(request.prompt) + 1)
        """Most tokens to sample."""
        self.ids: list[int] = []
        """Every sampled token."""
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.ended_by: int | str | None = None
        self._eos = None if request.ignore_eos else eos_token
        ends = set(request.stop_token_ids)
        self._ends = frozenset(ends if self._eos is None else ends | {self._eos})
        self._counts: Counter[int] = Counter()
        self._stream = tokenizer.stream(request.prompt) if tokenizer else None
        self._filter = StopFilter(request.stop)

    @property
    def last(self) -> int:
        """The newest token, of the prompt before any is sampled."""
        return self.ids[-1] if self.ids else self.request.prompt[-1]

    @property
    def position(self) -> int:
        """Position of the newest token."""
        return len(self.request.prompt) + len(self.ids) - 1

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None

    def adjustments(self) -> Adjustments | None:
        """What bias, penalties and the fewest tokens change of the logits of the next token."""
        banned = self._ends if len(self.ids) < self.request.min_tokens else ()
        return self.request.sampling.adjustments(self._counts, banned)

    def take(
        self, token: int, *, logprob: float | None = None, top: tuple[tuple[int, float], ...] = ()
    ) -> list[Token]:
        """Add the next token.

        Args:
            token: The chosen one.
            logprob: Of the token, if wanted.
            top: Of the likeliest tokens, if wanted.

        Returns:
            The token, and behind it the text that the end makes certain, if there is some.
        """
        self.ids.append(token)
        self._counts[token] += 1
        if token in self._ends:
            self.ended_by = None if token == self._eos else token
            return [Token(token, "", logprob, top), *self.finish(FinishReason.STOP)]
        text = self._filter.push(self._stream.push(token) if self._stream else "")
        self.text += text
        added = [Token(token, text, logprob, top)]
        if self._filter.has_stopped:
            self.finish_reason, self.ended_by = FinishReason.STOP, self._filter.found
        elif len(self.ids) == self.limit:
            added += self.finish()
        return added

    def finish(self, reason: FinishReason | None = None) -> list[Token]:
        """End the sequence.

        Args:
            reason: By default, what allowed no more tokens: the request or the context.

        Returns:
            The text that this makes certain, if there is some.
        """
        is_cut = self.limit < self.request.max_tokens
        allowed = FinishReason.CONTEXT if is_cut else FinishReason.LENGTH
        self.finish_reason = reason or allowed
        if self.finish_reason is FinishReason.INTERRUPTED or not self.ids:
            return []  # what a prompt leaves open is no text of ours
        rest = self._filter.push(self._stream.finish() if self._stream else "")
        rest += self._filter.finish()
        if self._filter.has_stopped:
            self.finish_reason, self.ended_by = FinishReason.STOP, self._filter.found
        self.text += rest
        return [Token(None, rest)] if rest else []
