"""One prompt on its way: its next token, its text, and the reason of its end."""

import numpy as np
from numpy.typing import NDArray

from grokctl.inference.generation import FinishReason, Generation, Request, Stats, StopFilter, Token
from grokctl.model.config import GrokConfig
from grokctl.model.tokenizer import Tokenizer


class Sequence:
    """The state of a generation between two steps of the model.

    Args:
        request: The prompt, and its settings.
        config: The model.
        tokenizer: Turns tokens into text; without a tokenizer, texts are empty.
        context: Positions of a slot.
        stats: Filled in by the engine.
    """

    def __init__(
        self,
        request: Request,
        *,
        config: GrokConfig,
        tokenizer: Tokenizer | None,
        context: int,
        stats: Stats,
    ) -> None:
        self.request = request
        self.generation = Generation(
            tokens=iter(()),
            prompt_tokens=len(request.prompt),
            seed=request.sampling.seed,
            stats=stats,
        )
        self.limit = min(request.max_tokens, context - len(request.prompt) + 1)
        """Most tokens to sample."""
        self.sampled = 0
        self.last = 0
        """The token sampled last."""
        self._end = None if request.ignore_eos else config.eos_token
        self._stream = tokenizer.stream(request.prompt) if tokenizer else None
        self._filter = StopFilter(request.stop)

    @property
    def position(self) -> int:
        """Position of the token sampled last."""
        return len(self.request.prompt) + self.sampled - 1

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.generation.finish_reason is not None

    def take(self, logits: NDArray[np.float32]) -> list[Token]:
        """Choose the next token, and add it to the generation.

        Args:
            logits: After the token before, `(vocab,)`.

        Returns:
            The tokens added: none for the end token, two if the end makes text certain.
        """
        self.last = self.request.sampling.choose(logits, self.sampled)
        self.sampled += 1
        if self.last == self._end:
            return self.finish(FinishReason.STOP)
        token = Token(self.last, self._filter.push(self._text_of(self.last)))
        self.generation.add(token)
        if self._filter.has_stopped:
            self.generation.finish_reason = FinishReason.STOP
        elif self.sampled == self.limit:
            return [token, *self.finish()]
        return [token]

    def finish(self, reason: FinishReason | None = None) -> list[Token]:
        """End the sequence, and add the text that this makes certain.

        Args:
            reason: By default, what allowed no more tokens: the request or the context.
        """
        is_cut = self.limit < self.request.max_tokens
        allowed = FinishReason.CONTEXT if is_cut else FinishReason.LENGTH
        self.generation.finish_reason = reason or allowed
        rest = self._filter.push(self._stream.finish() if self._stream else "")
        rest += self._filter.finish()
        added = [Token(None, rest)] if rest else []
        for token in added:
            self.generation.add(token)
        return added

    def _text_of(self, token: int) -> str:
        return self._stream.push(token) if self._stream else ""
