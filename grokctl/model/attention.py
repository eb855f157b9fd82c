"""Grouped-query attention over the key-value cache, a block of positions at a time."""

from math import gcd
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grokctl.model.bucketing import POSITIONS
from grokctl.model.cache import LayerCache, Place, recall
from grokctl.model.config import GrokConfig
from grokctl.model.matmul import einsum
from grokctl.model.step_spec import StepShape

_NEVER: Final = -1e30
"""A logit of what is not to be seen; differences of infinities would be no numbers."""


def attend(
    query: Float[Array, "batch time q_heads head_dim"],
    cache: LayerCache,
    where: Place,
    *,
    shape: StepShape,
) -> Float[Array, "batch time q_heads head_dim"]:
    """Attention of new tokens to everything before them, with Grok's soft cap on the logits.

    Every group of `q_heads // kv_heads` query heads reads one key head. Blocks are read as far as
    positions are written, and their sums corrected whenever a larger logit comes (Milakov and
    Gimelshein, "Online normalizer calculation for softmax", 2018), so that neither time nor memory
    depend on how long the cache might get. Logits, cap, softmax and sums are float32.

    Args:
        query: Already rotated.
        cache: Already extended by these tokens.
        where: Which tokens they are.
        shape: The type of operands on accelerators, and of the config the multiplier and the cap.

    Returns:
        One float32 context vector per query head.
    """
    batch, time, q_heads, head_dim = query.shape
    _, _, kv_heads, past, _ = cache.key.values.shape
    kind = jnp.dtype(jnp.float32) if shape.platform == "cpu" else shape.operand
    length = gcd(POSITIONS, past)
    positions = where.start[:, None] + jnp.arange(time)[None]
    grouped = query.reshape(batch, time, kv_heads, q_heads // kv_heads, head_dim)

    def add(index: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, context = state
        first = index * length
        key = recall(cache.key, where, first, length)
        value = recall(cache.value, where, first, length)
        mask = first + jnp.arange(length)[None, None] <= positions[:, :, None]
        logits = einsum("btkgd,bkpd->bkgtp", grouped, key, kind=kind)
        logits = _capped(logits, mask, config=shape.config)
        higher = jnp.maximum(top, jnp.max(logits, axis=-1))
        weights = jnp.exp(logits - higher[..., None])
        kept = jnp.exp(top - higher)
        seen = einsum("bkgtp,bkpd->bkgtd", weights, value, kind=kind)
        total = total * kept + jnp.sum(weights, axis=-1)
        return higher, total, context * kept[..., None] + seen

    heads = (batch, kv_heads, q_heads // kv_heads, time)
    nothing = (
        jnp.full(heads, _NEVER, jnp.float32),
        jnp.zeros(heads, jnp.float32),
        jnp.zeros((*heads, head_dim), jnp.float32),
    )
    blocks = jnp.max(positions) // length + 1
    _, total, context = jax.lax.fori_loop(0, blocks, add, nothing)
    return jnp.transpose(context / total[..., None], (0, 3, 1, 2, 4)).reshape(query.shape)


def attend_at_once(
    query: Float[Array, "batch time q_heads head_dim"],
    key: Float[Array, "batch kv_heads past head_dim"],
    value: Float[Array, "batch kv_heads past head_dim"],
    mask: Bool[Array, "batch time past"],
    *,
    config: GrokConfig,
) -> Float[Array, "batch time q_heads head_dim"]:
    """The same in one softmax over all positions: the twin that `attend` is tested against.

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
    kv_heads, kind = key.shape[1], jnp.dtype(jnp.float32)
    grouped = query.reshape(batch, time, kv_heads, q_heads // kv_heads, head_dim)
    logits = einsum("btkgd,bkpd->bkgtp", grouped, key, kind=kind)
    weights = jax.nn.softmax(_capped(logits, mask, config=config), axis=-1)
    return einsum("bkgtp,bkpd->btkgd", weights, value, kind=kind).reshape(query.shape)


def _capped(
    logits: Float[Array, "batch kv_heads group time past"],
    mask: Bool[Array, "batch time past"],
    *,
    config: GrokConfig,
) -> Float[Array, "batch kv_heads group time past"]:
    logits = logits * config.attn_output_multiplier
    logits = config.attn_logit_cap * jnp.tanh(logits / config.attn_logit_cap)
    return jnp.where(mask[:, None, None], logits, _NEVER)
