"""Grouped-query attention over the key-value cache, a block of positions at a time."""

from math import gcd
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grokctl.model.bucketing import position_block
from grokctl.model.cache import LayerCache, Positions, recall
from grokctl.model.config import GrokConfig
from grokctl.model.matmul import einsum
from grokctl.model.step_spec import StepShape

_NEVER: Final = -1e30
"""Logit of a hidden position, finite: the difference of two infinities is not a number."""


def attend(
    query: Float[Array, "batch time q_heads head_dim"],
    cache: LayerCache,
    positions: Positions,
    *,
    shape: StepShape,
) -> Float[Array, "batch time q_heads head_dim"]:
    """Attention of new tokens to every token up to themselves, with Grok's soft cap on the logits.

    `softmax(cap * tanh(multiplier * query @ keyᵀ / cap)) @ value`, where every group of
    `q_heads // kv_heads` query heads reads one key head.

    The softmax is taken a block of positions at a time, as far as positions are written, and the
    sums so far are scaled down whenever a larger logit comes (Milakov and Gimelshein, "Online
    normalizer calculation for softmax", 2018): neither time nor memory depend on the length of the
    cache. Logits, cap, softmax and sums are float32.

    Args:
        query: Already rotated.
        cache: Already extended by these tokens.
        positions: Of these tokens.
        shape: The type of operands on accelerators, and of the config the multiplier and the cap.

    Returns:
        One float32 context vector per query head.
    """
    batch, time, q_heads, head_dim = query.shape
    _, _, kv_heads, past, _ = cache.key.values.shape
    if shape.has_kernel and time == 1:
        from grokctl.model import attention_kernel  # noqa: PLC0415 (as in the engine)

        if attention_kernel.suits(cache):
            return attention_kernel.attend_with_one(
                query, cache, positions, config=shape.config, form=shape.kernel_form
            )
    dtype = jnp.dtype(jnp.float32) if shape.platform == "cpu" else shape.operand
    length = gcd(position_block(batch * time * q_heads, platform=shape.platform), past)
    query_positions = positions.of_tokens(time)
    grouped = query.reshape(batch, time, kv_heads, q_heads // kv_heads, head_dim)
    # shape: batch time kv_heads group head_dim

    def add_block(index: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        running_max, denominator, accumulator = state
        first = index * length
        key = recall(cache.key, positions, first, length)
        value = recall(cache.value, positions, first, length)
        mask = first + jnp.arange(length)[None, None] <= query_positions[:, :, None]
        logits = einsum("btkgd,bkpd->bkgtp", grouped, key, dtype=dtype)
        logits = _capped(logits, mask, config=shape.config)
        new_max = jnp.maximum(running_max, jnp.max(logits, axis=-1))
        weights = jnp.exp(logits - new_max[..., None])
        correction = jnp.exp(running_max - new_max)
        weighted = einsum("bkgtp,bkpd->bkgtd", weights, value, dtype=dtype)
        denominator = denominator * correction + jnp.sum(weights, axis=-1)
        return new_max, denominator, accumulator * correction[..., None] + weighted

    heads = (batch, kv_heads, q_heads // kv_heads, time)
    before = (
        jnp.full(heads, _NEVER, jnp.float32),
        jnp.zeros(heads, jnp.float32),
        jnp.zeros((*heads, head_dim), jnp.float32),
    )
    blocks = jnp.max(query_positions) // length + 1
    _, denominator, accumulator = jax.lax.fori_loop(0, blocks, add_block, before)
    context = jnp.transpose(accumulator / denominator[..., None], (0, 3, 1, 2, 4))
    # shape: batch time kv_heads group head_dim
    return context.reshape(query.shape)


def attend_at_once(
    query: Float[Array, "batch time q_heads head_dim"],
    key: Float[Array, "batch kv_heads past head_dim"],
    value: Float[Array, "batch kv_heads past head_dim"],
    mask: Bool[Array, "batch time past"],
    *,
    config: GrokConfig,
) -> Float[Array, "batch time q_heads head_dim"]:
    """`attend` in one softmax over all positions: the form that tests compare it with.

    Args:
        query: Already rotated.
        key: Already rotated; `past` is the cache length, unwritten positions included.
        value: Same layout as `key`.
        mask: True where `time` may look at `past`.
        config: The multiplier and the cap.

    Returns:
        One float32 context vector per query head.
    """
    batch, time, q_heads, head_dim = query.shape
    kv_heads, dtype = key.shape[1], jnp.dtype(jnp.float32)
    grouped = query.reshape(batch, time, kv_heads, q_heads // kv_heads, head_dim)
    # shape: batch time kv_heads group head_dim
    logits = einsum("btkgd,bkpd->bkgtp", grouped, key, dtype=dtype)
    weights = jax.nn.softmax(_capped(logits, mask, config=config), axis=-1)
    return einsum("bkgtp,bkpd->btkgd", weights, value, dtype=dtype).reshape(query.shape)


def _capped(
    logits: Float[Array, "batch kv_heads group time past"],
    mask: Bool[Array, "batch time past"],
    *,
    config: GrokConfig,
) -> Float[Array, "batch kv_heads group time past"]:
    logits = logits * config.attn_output_multiplier
    logits = config.attn_logit_cap * jnp.tanh(logits / config.attn_logit_cap)
    return jnp.where(mask[:, None, None], logits, _NEVER)
