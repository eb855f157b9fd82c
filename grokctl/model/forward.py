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

from grokctl.model import cpu_kernel
from grokctl.model.attention import attend
from grokctl.model.bucketing import rows_of_a_run
from grokctl.model.cache import Cache, LayerCache, Positions, extended
from grokctl.model.config import GrokConfig
from grokctl.model.matmul import einsum, project, project_back
from grokctl.model.parameters import Attention, Experts, Layer, Matrix, Parameters
from grokctl.model.step_spec import StepShape

MODEL_AXIS: Final = "model"
EXPERT_AXIS: Final = "expert"


def forward(
    parameters: Parameters,
    cache: Cache,
    tokens: Int[Array, "batch time"],
    positions: Positions,
    select: Int[Array, " batch"] | None = None,
    *,
    shape: StepShape,
) -> tuple[Float[Array, "batch chosen vocab"], Cache, Int[Array, ""]]:
    """The whole model: `head(decoder_layer_n(… decoder_layer_1(embed(tokens))))`.

    `inference/compiled_steps` compiles the same three parts apart: all in one takes a compiler many
    times as long (docs/adr/0009).

    Args:
        parameters: This device's part.
        cache: This device's part; it is not changed.
        tokens: Token ids, padding included.
        positions: Of these tokens, in the cache.
        select: Which token's logits are wanted, for each sequence; None for those of all.
        shape: Static facts.

    Returns:
        Logits over this device's part of the vocabulary, the extended cache, and how many of this
        device's experts were read.
    """
    hidden = embed(parameters.embedding, tokens, shape=shape)
    hidden, cache, read = decoder_layers(parameters.layers, cache, hidden, positions, shape=shape)
    logits = head(parameters.embedding, parameters.final_norm, hidden, select, shape=shape)
    return logits, cache, read


@jax.named_scope("embed")
def embed(
    embedding: Float[Array, "vocab embed"], tokens: Int[Array, "batch time"], *, shape: StepShape
) -> Float[Array, "batch time embed"]:
    """Look tokens up in an embedding whose rows are split over devices."""
    rows = embedding.shape[0]
    local = tokens - jax.lax.axis_index(MODEL_AXIS) * rows
    is_here = (local >= 0) & (local < rows)
    hidden = jnp.take(embedding, jnp.clip(local, 0, rows - 1), axis=0)
    hidden = _sum(jnp.where(is_here[..., None], hidden, 0.0), MODEL_AXIS)
    return hidden * shape.config.embedding_multiplier_scale


def decoder_layers(
    layers: tuple[Layer, ...],
    cache: Cache,
    hidden: Float[Array, "batch time embed"],
    positions: Positions,
    *,
    shape: StepShape,
) -> tuple[Float[Array, "batch time embed"], Cache, Int[Array, ""]]:
    """Consecutive layers, each on what the one before made; see `decoder_layer`."""
    extended_cache, experts_read = [], []
    for layer, before in zip(layers, cache, strict=True):
        hidden, after, read = decoder_layer(layer, before, hidden, positions, shape=shape)
        extended_cache.append(after)
        experts_read.append(read)
    return hidden, tuple(extended_cache), sum(experts_read[1:], experts_read[0])


@jax.named_scope("decoder_layer")
def decoder_layer(
    layer: Layer,
    cache: LayerCache,
    hidden: Float[Array, "batch time embed"],
    positions: Positions,
    *,
    shape: StepShape,
) -> tuple[Float[Array, "batch time embed"], LayerCache, Int[Array, ""]]:
    """Attention, then experts, each between two norms and around a residual connection.

    Args:
        layer: This device's part.
        cache: This device's part; in each sequence's slot, positions before `start` are filled.
        hidden: Padding may follow the real tokens. Padding behind the tokens of a sequence is
            written to the cache, and overwritten before any token attends to it; a sequence that
            is padding repeats the first one.
        positions: Of these tokens. `start + time` must not exceed the cache.
        shape: Static facts.

    Returns:
        The next layer's input, the extended cache, and how many of this device's experts were read.
    """
    eps = shape.config.rms_norm_eps
    normed = rms_norm(hidden, layer.norms.pre_attention, eps=eps)
    mixed, cache = attention_block(layer.attention, cache, normed, positions, shape=shape)
    hidden = hidden + rms_norm(mixed, layer.norms.post_attention, eps=eps)
    normed = rms_norm(hidden, layer.norms.pre_moe, eps=eps)
    mixed, read = mixture_of_experts(layer, normed, positions.count, shape=shape)
    return hidden + rms_norm(mixed, layer.norms.post_moe, eps=eps), cache, read


@jax.named_scope("head")
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
        hidden: The last layer's output.
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
    """Divide by the root mean square, and scale: `x / sqrt(mean(x²) + eps) * scale`."""
    mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + eps) * jnp.expand_dims(scale, range(x.ndim - 1))


@jax.named_scope("attention_block")
def attention_block(
    weights: Attention,
    cache: LayerCache,
    x: Float[Array, "batch time embed"],
    positions: Positions,
    *,
    shape: StepShape,
) -> tuple[Float[Array, "batch time embed"], LayerCache]:
    """Project, rotate, extend the cache, attend over this device's heads, and sum over devices."""
    config = shape.config
    batch, time, _ = x.shape
    token_positions = positions.of_tokens(time)

    def heads(matrix: Matrix) -> Float[Array, "batch time heads head_dim"]:
        return project(x, matrix, shape=shape).reshape(batch, time, -1, config.key_size)

    query = rotate(heads(weights.query), token_positions, base=config.rope_base)
    key = rotate(heads(weights.key), token_positions, base=config.rope_base)
    cache = extended(cache, key, heads(weights.value), positions)
    context = attend(query, cache, positions, shape=shape)
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


@jax.named_scope("mixture_of_experts")
def mixture_of_experts(
    layer: Layer,
    x: Float[Array, "batch time embed"],
    count: Int[Array, ""],
    *,
    shape: StepShape,
) -> tuple[Float[Array, "batch time embed"], Int[Array, ""]]:
    """Each token's sum over the experts that it chose: `y = sum_e gate_e(x) * expert_e(x)`.

    An expert that no token chose is not read, and padding goes through no expert.

    Args:
        layer: This device's part.
        x: Tokens.
        count: How many of them are no padding; padding comes last.
        shape: Static facts.

    Returns:
        `y`, and how many of this device's experts were read.
    """
    experts, rows = layer.experts, x.reshape(-1, x.shape[-1])
    gates, chosen = route(layer.router, rows, config=shape.config)
    local = _on_this_device(chosen, count, num_experts=experts.count)
    run = rows_of_a_run(
        len(rows),
        config=shape.config,
        platform=shape.platform,
        operand=shape.operand.itemsize,
        skips_padding=shape.has_native_kernel,
    )
    if run == 1:
        partial = _token_by_token(experts, rows, gates, local, shape=shape)
    else:
        partial = _expert_by_expert(experts, rows, gates, local, run=run, shape=shape)
    read = jnp.count_nonzero(jnp.any(_is_expert(local, experts.count), axis=0))
    return _sum(partial, EXPERT_AXIS, MODEL_AXIS).reshape(x.shape), read


def route(
    router: Float[Array, "embed experts"], rows: Float[Array, "tokens embed"], *, config: GrokConfig
) -> tuple[Float[Array, "tokens selected"], Int[Array, "tokens selected"]]:
    """Choose experts for each token: `top_k(softmax(x @ router))`, *not* renormalised.

    Returns:
        The chosen experts' probabilities in float32, and their numbers.
    """
    logits = einsum("te,ex->tx", rows, router, dtype=jnp.dtype(jnp.float32))
    return jax.lax.top_k(jax.nn.softmax(logits, axis=-1), config.num_selected_experts)


def expert_block(
    experts: Experts,
    expert: Int[Array, ""],
    x: Float[Array, "tokens embed"],
    count: Int[Array, ""] | int = 1,
    *,
    shape: StepShape,
) -> Float[Array, "tokens embed"]:
    """One expert: `(gelu(x @ gate) * (x @ up)) @ down`.

    Of its columns, this device computes its own: a partial sum in float32. Of tokens after the
    first `count`, the output does not matter.
    """
    if shape.has_native_kernel:
        return cpu_kernel.expert_block(x, experts, expert, count, compute=shape.compute)
    gate = project(x, experts.gate, shape=shape, expert=expert)
    up = project(x, experts.up, shape=shape, expert=expert)
    hidden = jax.nn.gelu(gate, approximate=True) * up
    return project(hidden, experts.down, shape=shape, expert=expert)


def _on_this_device(
    chosen: Int[Array, "tokens selected"], count: Int[Array, ""], *, num_experts: int
) -> Int[Array, "tokens selected"]:
    """Numbers of chosen experts among this device's; `num_experts` for others and for padding."""
    local = chosen - jax.lax.axis_index(EXPERT_AXIS) * num_experts
    is_here = (local >= 0) & (local < num_experts)
    is_here = is_here & (jnp.arange(chosen.shape[0]) < count)[:, None]
    return jnp.where(is_here, local, num_experts)


def _token_by_token(
    experts: Experts,
    rows: Float[Array, "tokens embed"],
    gates: Float[Array, "tokens selected"],
    local: Int[Array, "tokens selected"],
    *,
    shape: StepShape,
) -> Float[Array, "tokens embed"]:
    """Run each token alone through each of its experts on this device.

    On an accelerator with all experts, only padding could be skipped, and is not: the condition
    would wait for the host.
    """
    selected = gates.shape[1]
    may_skip = shape.platform == "cpu" or shape.mesh.expert > 1

    def add_product(index: Array, total: Array) -> Array:
        token, expert = index // selected, local.reshape(-1)[index]

        def product() -> Array:
            row, number = jax.lax.dynamic_slice_in_dim(rows, token, 1), expert % experts.count
            return gates.reshape(-1)[index] * expert_block(experts, number, row, shape=shape)

        output = _if(expert < experts.count, product, like=rows[:1]) if may_skip else product()
        return jax.lax.dynamic_update_slice_in_dim(
            total, jax.lax.dynamic_slice_in_dim(total, token, 1) + output, token, 0
        )

    zeros = jnp.zeros(rows.shape, jnp.float32)
    total: Array = jax.lax.fori_loop(0, local.size, add_product, zeros)
    return total


def _expert_by_expert(
    experts: Experts,
    rows: Float[Array, "tokens embed"],
    gates: Float[Array, "tokens selected"],
    local: Int[Array, "tokens selected"],
    *,
    run: int,
    shape: StepShape,
) -> Float[Array, "tokens embed"]:
    """Run the tokens of each expert through it, `run` tokens at a time.

    A choice is a token with one of its experts. Choices are sorted by expert, and the last run of
    an expert is filled up with choices whose gate is 0.
    """
    expert_of = local.reshape(-1)
    choices = jnp.argsort(expert_of)  # stable: of an expert in the order of tokens
    counts = jnp.sum(_is_expert(local, experts.count), axis=0)
    ends, runs = jnp.cumsum(counts), -(-counts // run)
    run_ends = jnp.cumsum(runs)

    def add_run(index: Array, total: Array) -> Array:
        expert = jnp.sum(run_ends <= index)
        run_of_expert = index - (run_ends[expert] - runs[expert])
        end = ends[expert]
        places = end - counts[expert] + run_of_expert * run + jnp.arange(run)
        picked = choices[jnp.minimum(places, end - 1)]
        tokens = picked // gates.shape[1]
        gate = jnp.where(places < end, gates.reshape(-1)[picked], 0.0)
        count = jnp.minimum(run, end - places[0])
        output = expert_block(experts, expert, rows[tokens], count, shape=shape)
        return total.at[tokens].add(gate[:, None] * output)

    zeros = jnp.zeros(rows.shape, jnp.float32)
    total: Array = jax.lax.fori_loop(0, run_ends[-1], add_run, zeros)
    return total


def _is_expert(
    local: Int[Array, "tokens selected"], num_experts: int
) -> Bool[Array, "choices experts"]:
    """Whether each choice, a token with one of its experts, is of each expert."""
    expert_ids = jnp.arange(num_experts)
    return local.reshape(-1, 1) == expert_ids[None]


def _if(condition: Array, then: Callable[[], Array], *, like: Array) -> Array:
    """`then()`; without computing anything, zeros if the condition is false."""
    result: Array = jax.lax.cond(condition, then, lambda: jnp.zeros(like.shape, jnp.float32))
    return result


def _sum(x: Array, *axes: str) -> Array:
    """Sum over the devices along some axes of the mesh."""
    total: Array = jax.lax.psum(x, axes)
    return total
