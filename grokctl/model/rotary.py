"""Rotary position embedding, the two halves of a head being the pairs (GPT-NeoX order)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "batch time heads head_dim"],
    positions: Int[Array, "batch time"],
    *,
    base: float,
) -> Float[Array, "batch time heads head_dim"]:
    """Rotate the heads of tokens by their positions."""
    half = x.shape[-1] // 2
    cos, sin = (part[:, :, None] for part in rotation(positions, half, base=base))
    low, high = x[..., :half], x[..., half:]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def rotation(
    positions: Int[Array, "*tokens"], half: int, *, base: float
) -> tuple[Float[Array, "*tokens half"], Float[Array, "*tokens half"]]:
    """Cosine and sine of the angles by which pairs turn: `position / base^(pair / half)`."""
    frequencies = 1.0 / base ** (jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.expand_dims(positions, -1).astype(jnp.float32) * jnp.expand_dims(
        frequencies, range(positions.ndim)
    )
    return jnp.cos(angles), jnp.sin(angles)
