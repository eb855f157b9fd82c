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
_COUNTED: Final = 0.5
"""Weight of counts against equal chances: they are of other texts."""
_ROOMS: Final = tuple(gigabytes * 10**9 for gigabytes in (32, 48, 64, 96, 128, 192, 256, 384))
"""Bytes of memory that machines have."""

Counts = tuple[tuple[int, ...], ...]
"""For each layer, for each expert: tokens that chose it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Residence:
    """The places of experts: some are pinned in memory for the whole run, others are streamed.

    The same experts stay whatever is chosen. Where texts choose all alike, no policy that does not
    know the future hits more often; and what evicts by age hits nothing in a sweep over all of
    them, such as a prompt. Where counts show that they do not, the most chosen stay.
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
    counts: Counts | None = None
    """Of earlier texts; None leaves all experts alike."""

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
        """Share of the chosen experts that are in memory, by the counts as far as there are any."""
        chances = _chances(self.config, self.counts)
        kept = sum(chances[layer][number] for layer, number in self.kept)
        return kept / sum(map(sum, chances))

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

    def read(self, tokens: int) -> int:
        """Bytes that a step of so many tokens waits for, on average.

        Of tokens that choose independently, `n` choose an expert of chance `p` with
        `1 - (1 - p)^n`.
        """
        chances, kept = _chances(self.config, self.counts), set(self.kept)
        missing = (
            1 - max(0.0, 1 - chance) ** tokens
            for layer, row in enumerate(chances)
            for number, chance in enumerate(row)
            if (layer, number) not in kept
        )
        return int(sum(missing) * self.expert_nbytes)

    def with_memory(self, memory: int) -> "Residence | None":
        """The same run with other memory; None if everything fits then."""
        experts = self.experts * self.expert_nbytes
        needed = Needs(weights=self.dense + experts, cache=self.cache, workspace=self.workspace)
        return place(self.config, needed, experts=experts, memory=memory, counts=self.counts)

    def larger(self) -> "list[tuple[int, Residence | None]]":
        """The same run with more memory, up to the first that machines have for all of it."""
        found = []
        for memory in _ROOMS:
            if memory > self.memory:
                residence = self.with_memory(memory)
                found.append((memory, residence))
                if residence is None:
                    break
        return found

    @property
    def kept(self) -> list[tuple[int, int]]:
        """Layer and number of each expert that stays, in this order.

        Without counts, as many in each layer, or one more in some: a layer with fewer would wait
        the longest. With counts, those of all layers that are chosen most: their misses add up.
        """
        layers = range(self.config.num_layers)
        if self.counts is None:
            ends = [self.pinned * layer // len(layers) for layer in range(len(layers) + 1)]
            numbers = [range(ends[layer + 1] - ends[layer]) for layer in layers]
            return [(layer, number) for layer in layers for number in numbers[layer]]
        chances = _chances(self.config, self.counts)
        every = [(layer, number) for layer in layers for number in range(self.config.num_experts)]
        every.sort(key=lambda key: -chances[key[0]][key[1]])  # stable: of equals, the first
        return sorted(every[: self.pinned])

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


def _chances(config: GrokConfig, counts: Counts | None) -> list[list[float]]:
    """How likely a token chooses each expert: half as if all were alike, half as counted."""
    experts, selected = config.num_experts, config.num_selected_experts
    alike = selected / experts
    if counts is None:
        return [[alike] * experts] * config.num_layers
    totals = [max(1, sum(row)) for row in counts]
    return [
        [(1 - _COUNTED) * alike + _COUNTED * selected * count / total for count in row]
        for row, total in zip(counts, totals, strict=True)
    ]


def place(
    config: GrokConfig, needed: Needs, *, experts: int, memory: int, counts: Counts | None = None
) -> Residence | None:
    """Pin as many experts as fit.

    Weights that every token reads come first, then cache and workspace, then room for experts to
    pass through.

    Args:
        config: The model.
        needed: Bytes that the run needs on its only device.
        experts: Bytes of experts among the weights.
        memory: Bytes that the run may take.
        counts: Of earlier texts, for the choice of those that stay.

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
        counts=counts,
    )
