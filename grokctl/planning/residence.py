"""Which experts stay in memory where memory does not hold all, and what the others cost."""

from dataclasses import dataclass
from typing import Final

from grokctl.model.config import GrokConfig
from grokctl.model.sizing import Needs
from grokctl.text import format_bytes

_FEWEST: Final = 2
_MOST: Final = 4
"""Experts that are being read or computed, beside those that stay: one computes while others are
read. More gain nothing (docs/adr/0019)."""
_LEFT_SHARE: Final = 0.03
_LEFT_LESS: Final = 0.08
_LEFT_MOST: Final = 3 * 10**9
"""Left to the program itself and to the system: what is pinned cannot be reclaimed."""
_HIDDEN: Final = 0.9
"""Share of the shorter of reading and computing that runs beside the longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Residence:
    """The places of experts: some are pinned in memory for the whole run, others are streamed.

    The same experts stay whatever is chosen. Where texts choose all alike, no policy that does not
    know the future hits more often; and what evicts by age hits nothing in a sweep over all of
    them, such as a prompt.
    """

    config: GrokConfig
    expert_nbytes: int
    """Bytes of one expert of one layer, scales included."""
    dense: int
    """Bytes of weights that every token reads; they stay."""
    cache: int
    workspace: int
    """Bytes of both; they stay, too."""
    memory: int
    """Bytes that a run may take."""
    pinned: int
    """Experts that stay, of all layers together."""
    transient: int
    """Experts that there is room for beside, one after the other."""

    @property
    def experts(self) -> int:
        """Experts of all layers together."""
        return self.config.num_layers * self.config.num_experts

    @property
    def total(self) -> int:
        """Bytes that the run takes."""
        staying = self.dense + self.cache + self.workspace
        return staying + (self.pinned + self.transient) * self.expert_nbytes

    @property
    def missing(self) -> int:
        """Bytes that even this lacks; 0 if it fits."""
        return max(0, self.total - room_in(self.memory))

    @property
    def shortage(self) -> str:
        """What is needed and what is there, in a sentence; if something is missing."""
        parts = {
            "of weights that every token reads": self.dense,
            "of cache": self.cache,
            "to compute in": self.workspace,
            f"for {self.transient} experts": self.transient * self.expert_nbytes,
        }
        sizes = [f"{format_bytes(nbytes)} {name}" for name, nbytes in parts.items()]
        return (
            f"{format_bytes(self.total)} with all other experts on the disk ({', '.join(sizes)}), "
            f"{format_bytes(room_in(self.memory))} of {format_bytes(self.memory)} are free for it"
        )

    @property
    def hit_rate(self) -> float:
        """Share of the chosen experts that are in memory, where all are chosen alike."""
        return self.pinned / self.experts

    @property
    def chosen_nbytes(self) -> int:
        """Bytes of the experts that a token chooses."""
        config = self.config
        return config.num_layers * config.num_selected_experts * self.expert_nbytes

    @property
    def missed(self) -> float:
        """Bytes that a token of one sequence waits for."""
        return self.chosen_nbytes * (1 - self.hit_rate)

    @property
    def swept(self) -> int:
        """Bytes that a prompt waits for whose tokens choose every expert."""
        return (self.experts - self.pinned) * self.expert_nbytes

    def with_memory(self, memory: int) -> "Residence | None":
        """The same run with other memory; None if everything fits then."""
        experts = self.experts * self.expert_nbytes
        needed = Needs(weights=self.dense + experts, cache=self.cache, workspace=self.workspace)
        return place(self.config, needed, experts=experts, memory=memory)

    def pinned_in(self, layer: int) -> range:
        """The experts of a layer that stay: as many in each layer, or one more in some.

        A layer with fewer would wait the longest.
        """
        layers = self.config.num_layers
        return range((layer + 1) * self.pinned // layers - layer * self.pinned // layers)

    def seconds(self, *, read_rate: float, decode_rate: float | None) -> float:
        """Seconds of a token of one sequence; an estimate.

        Args:
            read_rate: Bytes a second of the disk.
            decode_rate: Bytes a second of weights in memory; None if unknown, which counts as fast.
        """
        reading = self.missed / read_rate
        if decode_rate is None:
            return reading
        computing = self.chosen_nbytes / decode_rate
        beside = (1 - _HIDDEN) * min(reading, computing)
        return self.dense / decode_rate + max(reading, computing) + beside


def room_in(memory: int) -> int:
    """Bytes for weights, cache and workspace in so many bytes of memory."""
    return memory - int(max(_LEFT_SHARE * memory, min(_LEFT_MOST, _LEFT_LESS * memory)))


def place(config: GrokConfig, needed: Needs, *, experts: int, memory: int) -> Residence | None:
    """Pin as many experts as fit.

    Weights that every token reads come first, then cache and workspace, then room for experts to
    pass through.

    Args:
        config: The model.
        needed: Bytes that the run needs on its only device.
        experts: Bytes of experts among the weights.
        memory: Bytes that the run may take.

    Returns:
        The places of all experts; None if everything fits. If not even the fewest fit, none is
        pinned, and `missing` says what lacks.
    """
    if needed.total <= memory:
        return None
    count = config.num_layers * config.num_experts
    expert_nbytes, dense = experts // count, needed.weights - experts
    room = room_in(memory) - dense - needed.cache - needed.workspace
    fitting = max(0, room) // expert_nbytes
    transient = min(max(fitting // config.num_experts, _FEWEST), _MOST)
    return Residence(
        config=config,
        expert_nbytes=expert_nbytes,
        dense=dense,
        cache=needed.cache,
        workspace=needed.workspace,
        memory=memory,
        pinned=min(max(0, fitting - transient), count),
        transient=transient,
    )
