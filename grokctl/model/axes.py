"""The axes of the mesh of devices, by name, and sums along them."""

from typing import Final

import jax
from jaxtyping import Array

MODEL_AXIS: Final = "model"
EXPERT_AXIS: Final = "expert"


def sum_over(x: Array, *axes: str) -> Array:
    """Sum over the devices along some axes of the mesh."""
    total: Array = jax.lax.psum(x, axes)
    return total
