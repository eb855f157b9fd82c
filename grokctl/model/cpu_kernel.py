"""The product of activations with a stored weight on a CPU: a call of the native library.

Nothing is copied: the library gets every array in place, and the number of the expert. It splits
activations into signed bytes, whose products with the stored integers are summed exactly within a
scale group; weights that are floats are multiplied as floats.
"""

from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

_PARTS: Final = {jnp.dtype(jnp.bfloat16): 2, jnp.dtype(jnp.float32): 3}
"""Bytes of an activation: 15 or 23 bits below the largest of its token."""


def suits(tokens: int, weight: Shaped[Array, "*stack rows outputs"]) -> bool:
    """Whether `project` is the fastest form on a CPU."""
    del tokens
    return weight.dtype in (jnp.int8, jnp.uint8, jnp.uint16, jnp.float32)


def project(
    x: Float[Array, "tokens inputs"],
    weight: Shaped[Array, "*stack rows outputs"],
    scales: Shaped[Array, "*stack groups outputs"] | None,
    expert: Int[Array, ""] | None,
    *,
    compute: jnp.dtype,
) -> Float[Array, "tokens outputs"]:
    """Multiply by a stored weight.

    Args:
        x: Activations. One that is not finite spoils its own token only.
        weight: As in `Matrix`.
        scales: As in `Matrix`.
        expert: Number of the weight in the stack.
        compute: float32 or bfloat16: how exact activations must be. Both are more exact than
            operands of that type.
    """
    tokens, outputs = x.shape[0], weight.shape[-1]
    number = jnp.int32(0) if expert is None else expert.astype(jnp.int32)
    call = jax.ffi.ffi_call("grokctl_project", jax.ShapeDtypeStruct((tokens, outputs), jnp.float32))
    product: Array = call(
        x.astype(jnp.float32),
        weight,
        jnp.zeros(0, jnp.uint16) if scales is None else scales,
        number,
        parts=np.int64(_PARTS[compute]),
    )
    return product
