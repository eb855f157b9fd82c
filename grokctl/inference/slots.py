"""The slots of the KV cache: which tokens each has kept, and the slot that a prompt starts from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from grokctl.inference.generation import PromptScores

_SHORTEST_PREFIX: Final = 16
"""A shorter prefix is worth it only if it is most of what the slot has kept."""


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

    @property
    def scored(self) -> int:
        """Kept tokens with scores, the first one included, which has none; 0 without scores."""
        return self.scores[-1].end if self.scores else 0

    def scores_of(self, tokens: int) -> list[PromptScores]:
        """The scores of the first `tokens` kept tokens."""
        return [part.between(0, tokens) for part in self.scores if part.start < tokens]


class Slots:
    """All slots: free ones keep the tokens of the sequence that had them last."""

    def __init__(self, count: int) -> None:
        self.free = [Slot(number) for number in range(count)]
        self._uses = 0

    def take(self, prompt: Sequence[int], *, reuse: bool) -> tuple[Slot, int]:
        """Take a free slot: with the longest common prefix, or else the least valuable.

        Args:
            prompt: Token ids.
            reuse: Whether to start from a kept prefix.

        Returns:
            The slot, and the tokens that it has of the prompt. There must be a free one.
        """
        wanted = np.asarray(prompt, np.int32)
        common = {slot.number: _common(slot.tokens, wanted) if reuse else 0 for slot in self.free}
        worth = [
            slot
            for slot in self.free
            if common[slot.number] >= _SHORTEST_PREFIX or 2 * common[slot.number] > len(slot.tokens)
        ]
        best = max(worth, key=lambda slot: common[slot.number], default=None)
        chosen = best or min(self.free, key=self._value)
        self.free.remove(chosen)
        return chosen, common[chosen.number]

    @staticmethod
    def _value(slot: Slot) -> tuple[bool, int, int]:
        """The empty ones have the least, then those used longest ago."""
        return bool(len(slot.tokens)), slot.used, slot.number

    def give_back(
        self, slot: Slot, tokens: Sequence[int], scores: Sequence[PromptScores] = ()
    ) -> None:
        """Free a slot.

        Args:
            slot: Taken before.
            tokens: Its tokens whose keys and values are in the cache; none to forget them.
            scores: Of these tokens.
        """
        self._uses += 1
        slot.tokens, slot.scores = np.asarray(tokens, np.int32), list(scores)
        slot.used = self._uses
        self.free.append(slot)


def _common(kept: NDArray[np.int32], wanted: NDArray[np.int32]) -> int:
    """Length of the common prefix."""
    length = min(len(kept), len(wanted))
    differ = np.flatnonzero(kept[:length] != wanted[:length])
    return int(differ[0]) if len(differ) else length
