"""How many bytes a run takes on each device: arithmetic, no arrays, and no JAX."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes that one device of a mesh needs."""

    weights: int
    """Of the device that holds most."""
    cache: int
    """Keys and values of all streams at the whole context."""
    workspace: int
    """Activations, logits and temporaries of the largest step."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.workspace
