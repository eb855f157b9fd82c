"""The slots of the KV cache: which tokens each has kept, and the slot that a prompt starts from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from grokctl.inference.generation import PromptOutput, PromptScores, Request

SHORTEST_PREFIX: Final = 16
"""Tokens of a prefix that is worth a copy."""


@dataclass(slots=True, eq=False)
class Slot:
    """A place in the cache for one sequence."""

    number: int
    tokens: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """Kept tokens: their keys and values are in the cache, from position 0 on."""
    scores: list[PromptScores] = field(default_factory=list)
    """Of kept tokens, in order and without gaps, from token 1 on."""
    used: int = 0
    """When it was given back: a count, of all slots together."""

    def kept_for(self, request: Request, prompt: NDArray[np.int32]) -> int:
        """Tokens of a request's prompt that are kept; if it wants scores, with scores."""
        common = common_prefix(self.tokens, prompt)
        if request.of_prompt is PromptOutput.SCORES:
            return min(common, self.scores[-1].end if self.scores else 0)
        return common

    def scores_of(self, tokens: int) -> list[PromptScores]:
        """The scores of the first `tokens` kept tokens."""
        return [part.between(0, tokens) for part in self.scores if part.start < tokens]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a prompt starts."""

    slot: Slot
    """Its slot, which is free no more."""
    common: int
    """Tokens of the prompt that the slot has, or gets."""
    scores: list[PromptScores]
    """Of these tokens, as far as they were scored."""
    source: int | None = None
    """The slot whose keys and values have to be copied."""


class Slots:
    """All slots: free ones keep the tokens of the sequence that had them last."""

    def __init__(self, count: int) -> None:
        self.free = [Slot(number) for number in range(count)]
        self._uses = 0

    def take(self, request: Request, busy: Sequence[Slot] = ()) -> Place:
        """Take a free slot for the prompt of a request.

        The longest common prefix of all slots is used where it is, if its slot is free and loses
        less than it gives. Otherwise it is copied to the least valuable slot.

        Args:
            request: If it wants scores, only kept tokens with scores are of use.
            busy: The slots that are not free, with what they have now.
        """
        wanted = np.asarray(request.prompt, np.int32)
        least = min(self.free, key=self._value)
        best, common = least, 0
        for slot in (*self.free, *busy) if request.is_reused else ():
            length = slot.kept_for(request, wanted)
            if (length, -len(slot.tokens)) > (common, -len(best.tokens)):
                best, common = slot, length
        loses_less = best is least or 2 * common > len(best.tokens)
        if best in self.free and loses_less:
            self.free.remove(best)
            return Place(best, common, best.scores_of(common))
        self.free.remove(least)
        if common < SHORTEST_PREFIX:
            common = least.kept_for(request, wanted) if request.is_reused else 0
            return Place(least, common, least.scores_of(common))
        return Place(least, common, best.scores_of(common), best.number)

    @staticmethod
    def _value(slot: Slot) -> tuple[bool, int, int]:
        """The empty ones have the least, then those used longest ago."""
        return bool(len(slot.tokens)), slot.used, slot.number

    def give_back(
        self, slot: Slot, tokens: ArrayLike = (), scores: Sequence[PromptScores] = ()
    ) -> None:
        """Free a slot.

        Args:
            slot: Taken before.
            tokens: Its tokens whose keys and values are in the cache; none to forget them.
            scores: Of these tokens.
        """
        self._uses += 1
        slot.tokens, slot.scores = np.array(tokens, np.int32), list(scores)
        slot.used = self._uses
        self.free.append(slot)


def common_prefix(kept: NDArray[np.int32], wanted: NDArray[np.int32]) -> int:
    """Length of the common prefix."""
    length = min(len(kept), len(wanted))
    differ = np.flatnonzero(kept[:length] != wanted[:length])
    return int(differ[0]) if len(differ) else length
