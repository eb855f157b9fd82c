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

from grokctl.model.parameters import Experts

_PARTS: Final = {jnp.dtype(jnp.bfloat16): np.int64(2), jnp.dtype(jnp.float32): np.int64(3)}
"""Bytes of an activation: 15 or 23 bits below the largest of its token."""
_FEW_TOKENS: Final = 32
"""Up to this many, sums along the rows of the embedding are faster than XLA's matrix product."""


def suits(weight: Shaped[Array, "*stack rows outputs"]) -> bool:
    """Whether `project` takes a weight: then it is the fastest form on a CPU."""
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
    outputs = jax.ShapeDtypeStruct((x.shape[0], weight.shape[-1]), jnp.float32)
    number = jnp.int32(0) if expert is None else expert.astype(jnp.int32)
    call = jax.ffi.ffi_call("grokctl_project", outputs)
    product: Array = call(
        x.astype(jnp.float32), weight, _or_none(scales), number, parts=_PARTS[compute]
    )
    return product


def expert_block(
    x: Float[Array, "tokens embed"],
    experts: Experts,
    expert: Int[Array, ""],
    count: Int[Array, ""] | int,
    *,
    compute: jnp.dtype,
) -> Float[Array, "tokens embed"]:
    """One expert: `(gelu(x @ gate) * (x @ up)) @ down`.

    Args:
        x: Tokens.
        experts: A device's.
        expert: Which of them.
        count: How many of the tokens come first that matter; the outputs of others are 0.
        compute: As in `project`.
    """
    tokens, columns = x.shape[0], experts.gate.weight.shape[-1]
    outputs = (
        jax.ShapeDtypeStruct((tokens, experts.down.weight.shape[-1]), jnp.float32),
        jax.ShapeDtypeStruct((2, tokens, columns), jnp.float32),  # between the products
    )
    matrices = [
        array
        for matrix in (experts.gate, experts.up, experts.down)
        for array in (matrix.weight, _or_none(matrix.scales))
    ]
    numbers = expert.astype(jnp.int32), jnp.asarray(count, jnp.int32)
    call = jax.ffi.ffi_call("grokctl_expert", outputs)
    output, _ = call(x.astype(jnp.float32), *matrices, *numbers, parts=_PARTS[compute])
    return jnp.asarray(output)


def suits_back(tokens: int) -> bool:
    """Whether `project_back` is the fastest form on a CPU."""
    return tokens <= _FEW_TOKENS


def project_back(
    x: Float[Array, "tokens embed"], embedding: Shaped[Array, "vocab embed"]
) -> Float[Array, "tokens vocab"]:
    """Multiply by the transpose of an embedding in float32, or in the bits of bfloat16."""
    outputs = jax.ShapeDtypeStruct((x.shape[0], embedding.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call("grokctl_project_back", outputs)
    product: Array = call(x.astype(jnp.float32), embedding)
    return product


def _or_none(scales: Array | None) -> Array:
    """Scales for the library, to which none are an empty array."""
    return jnp.zeros(0, jnp.uint16) if scales is None else scales
