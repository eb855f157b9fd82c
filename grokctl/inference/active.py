"""A request on its way through the scheduler: queued, then in a slot."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from grokctl.inference.chunks import Chunk
from grokctl.inference.compiled_steps import Head
from grokctl.inference.generation import (
    Generation,
    PromptOutput,
    PromptScores,
    Request,
    RequestEvent,
    Stats,
)
from grokctl.inference.sequence import Sequence
from grokctl.inference.slots import SHORTEST_PREFIX, Slot, common_prefix


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that was submitted."""

    request: Request
    deliver: Callable[[RequestEvent], object]
    is_cancelled: bool = False
    prompt: NDArray[np.int32] = field(init=False)
    """That of the request, to be compared with others."""

    def __post_init__(self) -> None:
        self.prompt = np.asarray(self.request.prompt, np.int32)

    @property
    def needs_slot(self) -> bool:
        """Whether there is something to compute."""
        request = self.request
        return request.max_tokens > 0 or request.of_prompt is not PromptOutput.NOTHING


@dataclass(slots=True, eq=False)
class Active:
    """A request in its slot."""

    ticket: Ticket
    sequence: Sequence
    slot: Slot
    compiled: float
    """Seconds of compilation before."""
    read: int = 0
    """Tokens of the prompt whose keys and values are in the slot."""
    cached: int = 0
    """Of these, tokens of a kept prefix."""
    ran: int = 0
    """Tokens of the prompt that ran."""
    scores: list[PromptScores] = field(default_factory=list)
    read_s: float = 0.0
    decode_s: float = 0.0

    @property
    def request(self) -> Request:
        """What was submitted."""
        return self.ticket.request

    @property
    def to_read(self) -> int:
        """Tokens of the prompt that run in chunks; the last one has no next one to be scored."""
        length = len(self.request.prompt)
        return length - 1 if self.request.of_prompt is PromptOutput.SCORES else length

    @property
    def decodes(self) -> bool:
        """Whether the next token is due: one is left of the prompt, or it was read."""
        if self.sequence.limit == 0:
            return False
        return bool(self.sequence.ids) or self.read == len(self.request.prompt) - 1

    @property
    def steps(self) -> int:
        """Most decode steps: the first token may come from a chunk of the prompt."""
        is_from_chunk = not self.decodes and self.to_read == len(self.request.prompt)
        return self.sequence.limit - int(is_from_chunk)

    @property
    def kept(self) -> NDArray[np.int32]:
        """Tokens whose keys and values are in the slot."""
        if not self.sequence.ids:
            return self.ticket.prompt[: self.read]
        ids = np.array(self.sequence.ids[:-1], np.int32)  # the last one has not run
        return np.concatenate([self.ticket.prompt, ids])

    def as_slot(self) -> Slot:
        """Its slot, with what is kept there until now."""
        return Slot(self.slot.number, self.kept, self.scores)

    def head_of(self, chunk: Chunk) -> Head:
        """What is computed after a chunk of the prompt."""
        match self.request.of_prompt:
            case PromptOutput.LOGITS:
                return Head.EVERY
            case PromptOutput.SCORES:
                return Head.SCORES
            case PromptOutput.NOTHING:
                return Head.LAST if chunk.end == len(self.request.prompt) else Head.NONE

    def result(self, stats: Stats) -> Generation:
        """The result, once the sequence is over.

        Args:
            stats: Of loading, and of compilation meanwhile.
        """
        sequence, made = self.sequence, len(self.sequence.ids) - 1
        assert sequence.finish_reason is not None
        return Generation(
            prompt_tokens=len(self.request.prompt),
            seed=self.request.sampling.seed,
            ids=tuple(sequence.ids),
            text=sequence.text,
            finish_reason=sequence.finish_reason,
            ended_by=sequence.ended_by,
            stats=replace(
                stats,
                first_token_s=self.read_s,
                prefill_tokens_per_s=self.ran / self.read_s if self.read_s else 0.0,
                decode_tokens_per_s=made / self.decode_s if made > 0 and self.decode_s else 0.0,
                cached_tokens=self.cached,
            ),
        )


def is_read_soon(
    ticket: Ticket, reading: Iterable[Active], slots: Callable[[], Iterable[Slot]]
) -> bool:
    """Whether a request under way is reading much more of a prompt than is kept.

    Args:
        ticket: Waits.
        reading: Requests that read their prompts.
        slots: Gives all slots, with what they have kept.
    """
    request = ticket.request
    if not request.is_reused:
        return False
    wants_scores = request.of_prompt is PromptOutput.SCORES
    soon = [
        common_prefix(active.ticket.prompt, ticket.prompt)
        for active in reading
        if active.request.cache_prompt
        and (active.request.of_prompt is PromptOutput.SCORES or not wants_scores)
    ]
    most = min(max(soon, default=0), len(ticket.prompt) - 1)
    if most < SHORTEST_PREFIX:
        return False
    kept = max(slot.kept_for(request, ticket.prompt) for slot in slots())
    return most - kept >= SHORTEST_PREFIX
