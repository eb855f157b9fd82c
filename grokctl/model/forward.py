"""Grok-1's forward pass as pure functions over what one device holds; collectives join them.

Every function here runs inside `jax.shard_map` over the axes `expert` and `model`. Products with
split inputs are scaled first and summed over devices after: the released integers carry one scale
row per old shard, so summing before scaling would be wrong.
"""

from collections.abc import Callable
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grokctl.model.config import GrokConfig
from grokctl.model.parameters import Attention, Experts, Layer, LayerCache, Matrix
from grokctl.model.products import einsum, project, project_back
from grokctl.model.step import StepShape

MODEL_AXIS: Final = "model"
EXPERT_AXIS: Final = "expert"


def embed(
    embedding: Float[Array, "vocab embed"], tokens: Int[Array, "batch time"], *, shape: StepShape
) -> Float[Array, "batch time embed"]:
    """Look tokens up in an embedding whose rows are split over devices."""
    rows = embedding.shape[0]
    local = tokens - jax.lax.axis_index(MODEL_AXIS) * rows
    is_here = (local >= 0) & (local < rows)
    found = jnp.take(embedding, jnp.clip(local, 0, rows - 1), axis=0)
    found = _sum(jnp.where(is_here[..., None], found, 0.0), MODEL_AXIS)
    return found * shape.config.embedding_multiplier_scale


def decoder_layer(
    layer: Layer,
    cache: LayerCache,
    hidden: Float[Array, "batch time embed"],
    start: Int[Array, " batch"],
    *,
    shape: StepShape,
) -> tuple[Float[Array, "batch time embed"], LayerCache]:
    """Attention, then experts, each between two norms and around a residual connection.

    Args:
        layer: This device's part.
        cache: This device's part; positions before `start` are filled.
        hidden: Padding may follow the real tokens: it is written to the cache behind them, where
            nobody looks before it is overwritten.
        start: Position of the first token, for each sequence. `start + time` must not exceed the
            cache.
        shape: Static facts.

    Returns:
        The next layer's input, and the extended cache.
    """
    eps = shape.config.rms_norm_eps
    positions = start[:, None] + jnp.arange(hidden.shape[1])[None]
    normed = rms_norm(hidden, layer.norms.pre_attention, eps=eps)
    mixed, cache = attention_block(layer.attention, cache, normed, positions, shape=shape)
    hidden = hidden + rms_norm(mixed, layer.norms.post_attention, eps=eps)
    normed = rms_norm(hidden, layer.norms.pre_moe, eps=eps)
    mixed = mixture_of_experts(layer, normed, shape=shape)
    return hidden + rms_norm(mixed, layer.norms.post_moe, eps=eps), cache


def head(
    embedding: Float[Array, "vocab embed"],
    final_norm: Float[Array, " embed"],
    hidden: Float[Array, "batch time embed"],
    select: Int[Array, " batch"] | None,
    *,
    shape: StepShape,
) -> Float[Array, "batch chosen vocab"]:
    """float32 logits over this device's part of the vocabulary.

    Args:
        embedding: This device's part.
        final_norm: The scale of the last norm.
        hidden: What the last layer made.
        select: Which token's logits are wanted, for each sequence; None for those of all.
        shape: Static facts.
    """
    if select is not None:
        hidden = jnp.take_along_axis(hidden, select[:, None, None], axis=1)
    hidden = rms_norm(hidden, final_norm, eps=shape.config.rms_norm_eps)
    logits = project_back(hidden, embedding, shape=shape)
    return logits * shape.config.output_multiplier_scale


def rms_norm(
    x: Float[Array, "*batch embed"], scale: Float[Array, " embed"], *, eps: float
) -> Float[Array, "*batch embed"]:
    """Divide by the root mean square, and scale."""
    mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + eps) * jnp.expand_dims(scale, range(x.ndim - 1))


def attention_block(
    weights: Attention,
    cache: LayerCache,
    x: Float[Array, "batch time embed"],
    positions: Int[Array, "batch time"],
    *,
    shape: StepShape,
) -> tuple[Float[Array, "batch time embed"], LayerCache]:
    """Project, rotate, remember, attend over this device's heads, and sum over devices."""
    config = shape.config
    batch, time, _ = x.shape

    def heads(matrix: Matrix) -> Float[Array, "batch time heads head_dim"]:
        return project(x, matrix, shape=shape).reshape(batch, time, -1, config.key_size)

    query = rotate(heads(weights.query), positions, base=config.rope_base)
    key = rotate(heads(weights.key), positions, base=config.rope_base)
    cache = LayerCache(
        key=_extend(cache.key, key, positions[:, 0]),
        value=_extend(cache.value, heads(weights.value), positions[:, 0]),
    )
    past = jnp.arange(cache.key.shape[2])
    mask = past[None, None, :] <= positions[:, :, None]
    context = attend(query, cache.key, cache.value, mask, shape=shape)
    out = project(context.reshape(batch, time, -1), weights.out, shape=shape)
    return _sum(out, MODEL_AXIS), cache


def attend(
    query: Float[Array, "batch time q_heads head_dim"],
    key: Float[Array, "batch kv_heads past head_dim"],
    value: Float[Array, "batch kv_heads past head_dim"],
    mask: Bool[Array, "batch time past"],
    *,
    shape: StepShape,
) -> Float[Array, "batch time q_heads head_dim"]:
    """Grouped-query attention with Grok's soft cap on the logits.

    Every group of `q_heads // kv_heads` query heads reads one key head. Logits, cap, softmax and
    sums are float32.

    Args:
        query: Already rotated.
        key: Already rotated; `past` is the cache length, unwritten positions included.
        value: Same layout as `key`.
        mask: True where `time` may look at `past`.
        shape: The type of operands, and of the config the multiplier and the cap.

    Returns:
        One float32 context vector per query head.
    """
    config, kind = shape.config, shape.operand
    batch, time, q_heads, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, time, kv_heads, q_heads // kv_heads, head_dim)
    logits = einsum("btkgd,bkpd->bkgtp", grouped, key, kind=kind)
    logits = logits * config.attn_output_multiplier
    logits = config.attn_logit_cap * jnp.tanh(logits / config.attn_logit_cap)
    logits = jnp.where(mask[:, None, None], logits, -1e30)
    context = einsum("bkgtp,bkpd->btkgd", jax.nn.softmax(logits, axis=-1), value, kind=kind)
    return context.reshape(query.shape)


def rotate(
    x: Float[Array, "batch time heads head_dim"],
    positions: Int[Array, "batch time"],
    *,
    base: float,
) -> Float[Array, "batch time heads head_dim"]:
    """Rotary position embedding, the two halves of a head being the pairs (GPT-NeoX order)."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / base ** (jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    low, high = x[..., :half], x[..., half:]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def mixture_of_experts(
    layer: Layer, x: Float[Array, "batch time embed"], *, shape: StepShape
) -> Float[Array, "batch time embed"]:
    """Send every token through its chosen experts and sum what all devices computed of them."""
    rows = x.reshape(-1, x.shape[-1])
    gates, chosen = route(layer.router, rows, config=shape.config)
    mix = _one_token if rows.shape[0] == 1 else _many_tokens
    first = jax.lax.axis_index(EXPERT_AXIS) * layer.experts.count
    partial = mix(layer.experts, rows, gates, chosen - first, shape=shape)
    return _sum(partial, EXPERT_AXIS, MODEL_AXIS).reshape(x.shape)


def route(
    router: Float[Array, "embed experts"], rows: Float[Array, "tokens embed"], *, config: GrokConfig
) -> tuple[Float[Array, "tokens selected"], Int[Array, "tokens selected"]]:
    """Choose experts for each token: softmax over all, then the best, *not* renormalised.

    Returns:
        The chosen experts' probabilities in float32, and their numbers.
    """
    logits = einsum("te,ex->tx", rows, router, kind=jnp.dtype(jnp.float32))
    return jax.lax.top_k(jax.nn.softmax(logits, axis=-1), config.num_selected_experts)


def _one_token(
    experts: Experts,
    rows: Float[Array, "one embed"],
    gates: Float[Array, "one selected"],
    local: Int[Array, "one selected"],
    *,
    shape: StepShape,
) -> Float[Array, "one embed"]:
    """Decode: only the chosen experts that are here are read."""

    def add(slot: Array, total: Array) -> Array:
        expert = local[0, slot]
        is_here = (expert >= 0) & (expert < experts.count)
        return total + gates[0, slot] * _if(
            is_here, lambda: expert_block(experts, expert, rows, shape=shape), like=rows
        )

    return _loop(gates.shape[1], add, like=rows)


def _many_tokens(
    experts: Experts,
    rows: Float[Array, "tokens embed"],
    gates: Float[Array, "tokens selected"],
    local: Int[Array, "tokens selected"],
    *,
    shape: StepShape,
) -> Float[Array, "tokens embed"]:
    """Prefill: every expert that some token chose sees all tokens, weighted by its gates."""

    def add(expert: Array, total: Array) -> Array:
        gate = jnp.sum(jnp.where(local == expert, gates, 0.0), axis=1)
        return total + gate[:, None] * _if(
            jnp.any(gate > 0), lambda: expert_block(experts, expert, rows, shape=shape), like=rows
        )

    return _loop(experts.count, add, like=rows)


def expert_block(
    experts: Experts, expert: Int[Array, ""], x: Float[Array, "tokens embed"], *, shape: StepShape
) -> Float[Array, "tokens embed"]:
    """One expert on this device's part of its columns; a partial sum in float32."""
    gate = project(x, experts.gate, shape=shape, expert=expert)
    up = project(x, experts.up, shape=shape, expert=expert)
    hidden = jax.nn.gelu(gate, approximate=True) * up
    return project(hidden, experts.down, shape=shape, expert=expert)


def _loop(count: int, add: Callable[[Array, Array], Array], *, like: Array) -> Array:
    """Add up in a loop that is compiled once, however often it runs."""
    total: Array = jax.lax.fori_loop(0, count, add, jnp.zeros(like.shape, jnp.float32))
    return total


def _if(condition: Array, then: Callable[[], Array], *, like: Array) -> Array:
    """Zeros, without computing anything, where a condition does not hold."""
    found: Array = jax.lax.cond(condition, then, lambda: jnp.zeros(like.shape, jnp.float32))
    return found


def _sum(x: Array, *axes: str) -> Array:
    """Sum over the devices along some axes of the mesh."""
    total: Array = jax.lax.psum(x, axes)
    return total


def _extend(
    cache: Float[Array, "batch kv_heads past head_dim"],
    new: Float[Array, "batch time kv_heads head_dim"],
    start: Int[Array, " batch"],
) -> Float[Array, "batch kv_heads past head_dim"]:
    """Write new entries behind the old ones, each sequence at its own position."""
    entries = jnp.swapaxes(new, 1, 2).astype(cache.dtype)
    for index in range(cache.shape[0]):
        cache = jax.lax.dynamic_update_slice(
            cache, entries[index : index + 1], (index, 0, start[index], 0)
        )
    return cache
