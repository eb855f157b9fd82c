"""Grok-1's forward pass as pure functions over what one device holds; collectives join them.

Every function here runs inside `jax.shard_map` over the axes `expert` and `model`. Products with
split inputs are scaled first and summed over devices after: the released integers carry one scale
row per old shard, so summing before scaling would be wrong.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grokctl.model.attention import attend
from grokctl.model.axes import MODEL_AXIS, sum_over
from grokctl.model.bucketing import MOST_IN_KERNEL
from grokctl.model.cache import Cache, LayerCache, Positions, extended
from grokctl.model.experts import mixture_of_experts, route
from grokctl.model.matmul import project, project_back, project_together, sums_together
from grokctl.model.parameters import Attention, Layer, Norms, Parameters
from grokctl.model.rotary import rotate
from grokctl.model.step_spec import StepShape


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
    hidden = sum_over(jnp.where(is_here[..., None], hidden, 0.0), MODEL_AXIS)
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
    if shape.has_kernel and hidden.shape[0] * hidden.shape[1] <= MOST_IN_KERNEL:
        return _layers_in_kernels(layers, cache, hidden, positions, shape=shape)
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
    hidden, normed, cache = before_experts(layer, cache, hidden, positions, shape=shape)
    mixed, read = mixture_of_experts(layer, normed, positions.count, shape=shape)
    return after_experts(layer.norms, hidden, mixed, shape=shape), cache, read


def chosen_experts(
    layer: Layer,
    cache: LayerCache,
    hidden: Float[Array, "batch time embed"],
    positions: Positions,
    *,
    shape: StepShape,
) -> Int[Array, "tokens selected"]:
    """The experts that each token chooses in `decoder_layer`, of whose arguments none changes."""
    _, normed, _ = before_experts(layer, cache, hidden, positions, shape=shape)
    _, chosen = route(layer.router, normed.reshape(-1, normed.shape[-1]), config=shape.config)
    return chosen


def before_experts(
    layer: Layer,
    cache: LayerCache,
    hidden: Float[Array, "batch time embed"],
    positions: Positions,
    *,
    shape: StepShape,
) -> tuple[Float[Array, "batch time embed"], Float[Array, "batch time embed"], LayerCache]:
    """The first part of `decoder_layer`: the stream, what goes into experts, and the cache."""
    eps = shape.config.rms_norm_eps
    normed = rms_norm(hidden, layer.norms.pre_attention, eps=eps)
    mixed, cache = attention_block(layer.attention, cache, normed, positions, shape=shape)
    hidden = hidden + rms_norm(mixed, layer.norms.post_attention, eps=eps)
    return hidden, rms_norm(hidden, layer.norms.pre_moe, eps=eps), cache


def after_experts(
    norms: Norms,
    hidden: Float[Array, "batch time embed"],
    mixed: Float[Array, "batch time embed"],
    *,
    shape: StepShape,
) -> Float[Array, "batch time embed"]:
    """The last part of `decoder_layer`: the stream, with what came out of experts."""
    return hidden + rms_norm(mixed, norms.post_moe, eps=shape.config.rms_norm_eps)


def _layers_in_kernels(
    layers: tuple[Layer, ...],
    cache: Cache,
    hidden: Float[Array, "batch time embed"],
    positions: Positions,
    *,
    shape: StepShape,
) -> tuple[Float[Array, "batch time embed"], Cache, Int[Array, ""]]:
    """`decoder_layers` with kernels for what stands between blocks."""
    from grokctl.model import norm_kernel  # noqa: PLC0415 (as in the engine)

    run = jax.jit(_layer_in_kernels, static_argnames="shape")  # traced once, as most are alike
    normed = norm_kernel.normed(hidden, layers[0].norms.pre_attention, shape=shape)
    following = [*[layer.norms.pre_attention for layer in layers[1:]], None]
    extended_cache, experts_read = [], []
    for layer, before, scale in zip(layers, cache, following, strict=True):
        (hidden, normed), after, read = run(
            layer, before, (hidden, normed), positions, scale, shape=shape
        )
        extended_cache.append(after)
        experts_read.append(read)
    return hidden, tuple(extended_cache), sum(experts_read[1:], experts_read[0])


_Stream = tuple[Float[Array, "batch time embed"], Float[Array, "batch time embed"]]
"""What goes from layer to layer, and its norm."""


@jax.named_scope("decoder_layer")
def _layer_in_kernels(
    layer: Layer,
    cache: LayerCache,
    stream: _Stream,
    positions: Positions,
    following: Float[Array, " embed"] | None,
    *,
    shape: StepShape,
) -> tuple[_Stream, LayerCache, Int[Array, ""]]:
    """`decoder_layer`, and the first norm of the layer that follows, if there is one."""
    from grokctl.model import norm_kernel  # noqa: PLC0415 (as in the engine)

    norms, (hidden, normed) = layer.norms, stream
    mixed, cache = attention_block(layer.attention, cache, normed, positions, shape=shape)
    hidden, normed, routed = norm_kernel.added_and_routed(
        hidden, mixed, (norms.post_attention, norms.pre_moe), layer.router, shape=shape
    )
    mixed, read = mixture_of_experts(layer, normed, positions.count, routed=routed, shape=shape)
    if following is None:
        hidden = norm_kernel.added(hidden, mixed, norms.post_moe, shape=shape)
        return (hidden, hidden), cache, read
    stream = norm_kernel.added_and_normed(hidden, mixed, (norms.post_moe, following), shape=shape)
    return stream, cache, read


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
    query, cache = _query_and_cache(weights, cache, x, positions, shape=shape)
    context = attend(query, cache, positions, shape=shape)
    out = project(context.reshape(*x.shape[:-1], -1), weights.out, shape=shape)
    return sum_over(out, MODEL_AXIS), cache


def _query_and_cache(
    weights: Attention,
    cache: LayerCache,
    x: Float[Array, "batch time embed"],
    positions: Positions,
    *,
    shape: StepShape,
) -> tuple[Float[Array, "batch time q_heads head_dim"], LayerCache]:
    """Rotated queries, and the cache with these tokens' keys and values."""
    config, (batch, time, _) = shape.config, x.shape
    matrices = (weights.query, weights.key, weights.value)
    if shape.has_kernel and time == 1:
        from grokctl.model import cache_kernel  # noqa: PLC0415 (as in the engine)

        if cache_kernel.suits(cache):
            return cache_kernel.rotated_and_kept(
                sums_together(x[:, 0], matrices, shape=shape),
                cache,
                positions,
                config=config,
                form=shape.kernel_form,
            )
    token_positions = positions.of_tokens(time)
    query, key, value = (
        product.reshape(batch, time, -1, config.key_size)
        for product in project_together(x, matrices, shape=shape)
    )
    query = rotate(query, token_positions, base=config.rope_base)
    key = rotate(key, token_positions, base=config.rope_base)
    return query, extended(cache, key, value, positions)
