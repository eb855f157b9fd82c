"""Bytes of a checkpoint's weights on the devices of a mesh: stored, read, and waited for."""

from dataclasses import dataclass
from typing import Self

from grokctl.checkpoint.layout import bytes_per_token, device_weights, weight_bytes
from grokctl.checkpoint.tensor_source import Storage
from grokctl.model.placement import MeshShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The weights of a checkpoint, spread over the devices of a mesh."""

    storage: Storage
    mesh: MeshShape
    stored: tuple[int, ...]
    """Bytes on each device."""
    read: tuple[int, ...]
    """Bytes that each device reads for a token of one sequence."""
    experts: tuple[int, ...]
    """Bytes of experts on each device."""

    @classmethod
    def of(cls, storage: Storage, mesh: MeshShape) -> Self:
        """Count the bytes on each device.

        Raises:
            PlacementError: The model does not divide over the mesh.
        """
        return cls(
            storage=storage,
            mesh=mesh,
            stored=weight_bytes(storage, mesh),
            read=bytes_per_token(storage, mesh),
            experts=tuple(each.experts for each in device_weights(storage, mesh)),
        )


def read_bytes(weights: Spread, sequences: int) -> list[int]:
    """Bytes of weights that each device reads in a step for so many sequences.

    An expert is read once, however many tokens choose it. Of `E` experts, `n` tokens that choose
    `k` each, independently and all alike, need `E (1 - (1 - k / E)^n)` on average.
    """
    config = weights.storage.config
    left = 1 - config.num_selected_experts / config.num_experts
    if not left:
        return list(weights.read)
    more = (left - left**sequences) / left
    each = zip(weights.read, weights.stored, strict=True)
    return [read + round(more * (stored - read)) for read, stored in each]


def missed_bytes(weights: Spread, room: int) -> float:
    """Bytes of weights that a token waits for, on a device whose memory does not hold all of them.

    Those of several devices of a CPU are mapped, not streamed.

    The kernel keeps the pages read last. If memory holds less than one token reads, every page is
    gone before the next token needs it, so all bytes come from the disk. If it holds more, the
    weights that every token reads stay, and as many experts as fit: those of the last tokens, which
    the next token chooses as likely as all others. Assumes that no other program reads files, and
    that texts use all experts alike.

    Args:
        weights: The weights, spread over a mesh.
        room: Bytes of memory that a device has for them.
    """
    whole, read = max(weights.stored), max(weights.read)
    if room >= whole:
        return 0.0
    if room < read:
        return float(read)
    config = weights.storage.config
    return (whole - room) * config.num_selected_experts / config.num_experts
