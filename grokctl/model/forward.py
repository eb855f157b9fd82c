"""Grok-1's forward pass as pure functions over what one device holds; collectives join them.

Every function here runs inside `jax.shard_map` over the axes `expert` and `model`. Products with
split inputs are scaled first and summed over devices after: the released integers carry one scale
row per old shard, so summing before scaling would be wrong.
"""

from collections.abc import Callable
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grokctl.model.attention import attend
from grokctl.model.bucketing import rows_of_a_run
from grokctl.model.cache import LayerCache, Place, extended
from grokctl.model.config import GrokConfig
from grokctl.model.matmul import einsum, project, project_back
from grokctl.model.parameters import Attention, Experts, Layer, Matrix
from grokctl.model.step_spec import StepShape

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
    where: Place,
    *,
    shape: StepShape,
) -> tuple[Float[Array, "batch time embed"], LayerCache, Int[Array, ""]]:
    """Attention, then experts, each between two norms and around a residual connection.

    Args:
        layer: This device's part.
        cache: This device's part; in each sequence's slot, positions before `start` are filled.
        hidden: Padding may follow the real tokens. Behind those of a sequence it is written to the
            cache, where nobody looks before it is overwritten; a sequence that is padding repeats
            the first one.
        where: Which tokens these are. `start + time` must not exceed the cache.
        shape: Static facts.

    Returns:
        The next layer's input, the extended cache, and how many of this device's experts were read.
    """
    eps = shape.config.rms_norm_eps
    normed = rms_norm(hidden, layer.norms.pre_attention, eps=eps)
    mixed, cache = attention_block(layer.attention, cache, normed, where, shape=shape)
    hidden = hidden + rms_norm(mixed, layer.norms.post_attention, eps=eps)
    normed = rms_norm(hidden, layer.norms.pre_moe, eps=eps)
    mixed, read = mixture_of_experts(layer, normed, where.count, shape=shape)
    return hidden + rms_norm(mixed, layer.norms.post_moe, eps=eps), cache, read


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
    where: Place,
    *,
    shape: StepShape,
) -> tuple[Float[Array, "batch time embed"], LayerCache]:
    """Project, rotate, remember, attend over this device's heads, and sum over devices."""
    config = shape.config
    batch, time, _ = x.shape
    positions = where.start[:, None] + jnp.arange(time)[None]

    def heads(matrix: Matrix) -> Float[Array, "batch time heads head_dim"]:
        return project(x, matrix, shape=shape).reshape(batch, time, -1, config.key_size)

    query = rotate(heads(weights.query), positions, base=config.rope_base)
    key = rotate(heads(weights.key), positions, base=config.rope_base)
    cache = extended(cache, key, heads(weights.value), where)
    context = attend(query, cache, where, shape=shape)
    out = project(context.reshape(batch, time, -1), weights.out, shape=shape)
    return _sum(out, MODEL_AXIS), cache


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
    layer: Layer,
    x: Float[Array, "batch time embed"],
    count: Int[Array, ""],
    *,
    shape: StepShape,
) -> tuple[Float[Array, "batch time embed"], Int[Array, ""]]:
    """Send every token through its chosen experts and sum what all devices computed of them.

    An expert that no token chose is not read, and padding costs nothing.

    Args:
        layer: This device's part.
        x: Tokens.
        count: How many of them are no padding, in front of it.
        shape: Static facts.

    Returns:
        Of every token the sum over its experts, and how many of this device's experts were read.
    """
    experts, rows = layer.experts, x.reshape(-1, x.shape[-1])
    gates, chosen = route(layer.router, rows, config=shape.config)
    local = chosen - jax.lax.axis_index(EXPERT_AXIS) * experts.count
    is_here = (local >= 0) & (local < experts.count)
    is_here = is_here & (jnp.arange(rows.shape[0]) < count)[:, None]
    local = jnp.where(is_here, local, experts.count)
    run = rows_of_a_run(rows.shape[0], config=shape.config, platform=shape.platform)
    if run == 1:
        partial = _one_by_one(experts, rows, gates, local, shape=shape)
    else:
        partial = _in_runs(experts, rows, gates, local, run=run, shape=shape)
    numbers = jnp.arange(experts.count)
    read = jnp.count_nonzero(jnp.any(local.reshape(-1, 1) == numbers[None], axis=0))
    return _sum(partial, EXPERT_AXIS, MODEL_AXIS).reshape(x.shape), read


def _one_by_one(
    experts: Experts,
    rows: Float[Array, "tokens embed"],
    gates: Float[Array, "tokens selected"],
    local: Int[Array, "tokens selected"],
    *,
    shape: StepShape,
) -> Float[Array, "tokens embed"]:
    """Every token alone through each of its experts that is here.

    Where only padding has none here, an accelerator does not ask: it would wait for the host.
    """
    selected = gates.shape[1]
    is_asked = shape.platform == "cpu" or shape.mesh.expert > 1

    def add(index: Array, total: Array) -> Array:
        token, expert = index // selected, local.reshape(-1)[index]

        def multiply() -> Array:
            row, number = jax.lax.dynamic_slice_in_dim(rows, token, 1), expert % experts.count
            return gates.reshape(-1)[index] * expert_block(experts, number, row, shape=shape)

        found = _if(expert < experts.count, multiply, like=rows[:1]) if is_asked else multiply()
        return jax.lax.dynamic_update_slice_in_dim(
            total, jax.lax.dynamic_slice_in_dim(total, token, 1) + found, token, 0
        )

    zeros = jnp.zeros(rows.shape, jnp.float32)
    total: Array = jax.lax.fori_loop(0, local.size, add, zeros)
    return total


def _in_runs(
    experts: Experts,
    rows: Float[Array, "tokens embed"],
    gates: Float[Array, "tokens selected"],
    local: Int[Array, "tokens selected"],
    *,
    run: int,
    shape: StepShape,
) -> Float[Array, "tokens embed"]:
    """The tokens of each expert through it in runs of equally many, as many runs as that takes."""
    chosen = local.reshape(-1)
    order = jnp.argsort(chosen)  # stable: the tokens of an expert, then those of the next
    numbers = jnp.arange(experts.count)
    sizes = jnp.sum(chosen[:, None] == numbers[None], axis=0)
    ends, runs = jnp.cumsum(sizes), -(-sizes // run)
    last_runs = jnp.cumsum(runs)

    def add(index: Array, total: Array) -> Array:
        expert = jnp.sum(last_runs <= index)
        number = index - (last_runs[expert] - runs[expert])
        end = ends[expert]
        places = end - sizes[expert] + number * run + jnp.arange(run)
        picked = order[jnp.minimum(places, end - 1)]
        tokens = picked // gates.shape[1]
        gate = jnp.where(places < end, gates.reshape(-1)[picked], 0.0)
        found = expert_block(experts, expert, rows[tokens], shape=shape)
        return total.at[tokens].add(gate[:, None] * found)

    zeros = jnp.zeros(rows.shape, jnp.float32)
    total: Array = jax.lax.fori_loop(0, last_runs[-1], add, zeros)
    return total


def route(
    router: Float[Array, "embed experts"], rows: Float[Array, "tokens embed"], *, config: GrokConfig
) -> tuple[Float[Array, "tokens selected"], Int[Array, "tokens selected"]]:
    """Choose experts for each token: softmax over all, then the best, *not* renormalised.

    Returns:
        The chosen experts' probabilities in float32, and their numbers.
    """
    logits = einsum("te,ex->tx", rows, router, kind=jnp.dtype(jnp.float32))
    return jax.lax.top_k(jax.nn.softmax(logits, axis=-1), config.num_selected_experts)


def expert_block(
    experts: Experts, expert: Int[Array, ""], x: Float[Array, "tokens embed"], *, shape: StepShape
) -> Float[Array, "tokens embed"]:
    """One expert on this device's part of its columns; a partial sum in float32."""
    gate = project(x, experts.gate, shape=shape, expert=expert)
    up = project(x, experts.up, shape=shape, expert=expert)
    hidden = jax.nn.gelu(gate, approximate=True) * up
    return project(hidden, experts.down, shape=shape, expert=expert)


def _if(condition: Array, then: Callable[[], Array], *, like: Array) -> Array:
    """Zeros, without computing anything, where a condition does not hold."""
    found: Array = jax.lax.cond(condition, then, lambda: jnp.zeros(like.shape, jnp.float32))
    return found


def _sum(x: Array, *axes: str) -> Array:
    """Sum over the devices along some axes of the mesh."""
    total: Array = jax.lax.psum(x, axes)
    return total
