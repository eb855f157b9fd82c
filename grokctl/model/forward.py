"""Grok-1's forward pass as pure functions over what one device holds; collectives join them.

Every function here runs inside `jax.shard_map` over the axes `expert` and `model`. Products with
split inputs are scaled first and summed over devices after: the released integers carry one scale
row per old shard, so summing before scaling would be wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from grokctl.model.config import GrokConfig
from grokctl.model.parameters import Attention, Cache, Expert, Layer, LayerCache, Matrix, Parameters
from grokctl.model.placement import MeshShape

MODEL_AXIS: Final = "model"
EXPERT_AXIS: Final = "expert"

_FEW_ROWS: Final = 4
"""Up to this many tokens a product is bound by reading the weight once per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What a compiled step depends on, beside the shapes of its arguments."""

    config: GrokConfig
    mesh: MeshShape
    platform: str
    """`cpu`, `gpu` or `tpu`: which form of the product is fastest."""
    compute: jnp.dtype
    """Type of the key-value cache, and of operands where the platform multiplies matrices fast in
    it: bfloat16 or float32. Everything else is float32, which costs nothing beside the weights."""

    @property
    def operand(self) -> jnp.dtype:
        """Type of operands of matrix products; XLA on the CPU is slow in bfloat16."""
        return jnp.dtype(jnp.float32) if self.platform == "cpu" else self.compute


def forward(
    parameters: Parameters,
    cache: Cache,
    tokens: Int[Array, "batch time"],
    start: Int[Array, " batch"],
    select: Int[Array, " batch"] | None,
    *,
    shape: StepShape,
) -> tuple[Float[Array, "batch chosen vocab"], Cache]:
    """Run tokens through the model and extend the cache.

    Args:
        parameters: This device's part.
        cache: This device's part; positions before `start` are filled.
        tokens: Padding may follow the real ones: it is written to the cache behind them, where
            nobody looks before it is overwritten.
        start: Position of the first token, for each sequence. `start + time` must not exceed the
            cache.
        select: Which token's logits are wanted, for each sequence; None for those of all.
        shape: Static facts.

    Returns:
        float32 logits over this device's part of the vocabulary, and the extended cache.
    """
    config = shape.config
    hidden = embed(parameters.embedding, tokens, shape=shape)
    positions = start[:, None] + jnp.arange(tokens.shape[1])[None]
    layers = []
    for layer, layer_cache in zip(parameters.layers, cache, strict=True):
        hidden, extended = decoder_layer(layer, layer_cache, hidden, positions, shape=shape)
        layers.append(extended)
    if select is not None:
        hidden = jnp.take_along_axis(hidden, select[:, None, None], axis=1)
    hidden = rms_norm(hidden, parameters.final_norm, eps=config.rms_norm_eps)
    logits = project(hidden, parameters.embedding, shape=shape)
    return logits * config.output_multiplier_scale, tuple(layers)


def embed(
    embedding: Matrix, tokens: Int[Array, "batch time"], *, shape: StepShape
) -> Float[Array, "batch time embed"]:
    """Look tokens up in an embedding whose rows are split over devices."""
    rows = embedding.weight.shape[0]
    local = tokens - jax.lax.axis_index(MODEL_AXIS) * rows
    is_here = (local >= 0) & (local < rows)
    found = jnp.take(embedding.weight, jnp.clip(local, 0, rows - 1), axis=0)
    found = _sum(jnp.where(is_here[..., None], found, 0.0), MODEL_AXIS)
    return found * shape.config.embedding_multiplier_scale


def decoder_layer(
    layer: Layer,
    cache: LayerCache,
    hidden: Float[Array, "batch time embed"],
    positions: Int[Array, "batch time"],
    *,
    shape: StepShape,
) -> tuple[Float[Array, "batch time embed"], LayerCache]:
    """Attention, then experts, each between two norms and around a residual connection."""
    eps = shape.config.rms_norm_eps
    normed = rms_norm(hidden, layer.norms.pre_attention, eps=eps)
    mixed, cache = attention_block(layer.attention, cache, normed, positions, shape=shape)
    hidden = hidden + rms_norm(mixed, layer.norms.post_attention, eps=eps)
    normed = rms_norm(hidden, layer.norms.pre_moe, eps=eps)
    mixed = mixture_of_experts(layer, normed, shape=shape)
    return hidden + rms_norm(mixed, layer.norms.post_moe, eps=eps), cache


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
    logits = _einsum("btkgd,bkpd->bkgtp", grouped, key, kind=kind)
    logits = logits * config.attn_output_multiplier
    logits = config.attn_logit_cap * jnp.tanh(logits / config.attn_logit_cap)
    logits = jnp.where(mask[:, None, None], logits, -1e30)
    context = _einsum("bkgtp,bkpd->btkgd", jax.nn.softmax(logits, axis=-1), value, kind=kind)
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
    first = jax.lax.axis_index(EXPERT_AXIS) * len(layer.experts)
    partial = mix(layer.experts, rows, gates, chosen - first, shape=shape)
    return _sum(partial, EXPERT_AXIS, MODEL_AXIS).reshape(x.shape)


def route(
    router: Matrix, rows: Float[Array, "tokens embed"], *, config: GrokConfig
) -> tuple[Float[Array, "tokens selected"], Int[Array, "tokens selected"]]:
    """Choose experts for each token: softmax over all, then the best, *not* renormalised.

    Returns:
        The chosen experts' probabilities in float32, and their numbers.
    """
    kind = jnp.dtype(jnp.float32)
    logits = _einsum("te,xe->tx", rows, router.weight, kind=kind)
    return jax.lax.top_k(jax.nn.softmax(logits, axis=-1), config.num_selected_experts)


def _one_token(
    experts: tuple[Expert, ...],
    rows: Float[Array, "one embed"],
    gates: Float[Array, "one selected"],
    local: Int[Array, "one selected"],
    *,
    shape: StepShape,
) -> Float[Array, "one embed"]:
    """Decode: branch to the chosen experts, so that no other is read and none is copied."""

    def run(expert: Expert) -> Callable[[Array], Array]:
        return lambda x: expert_block(expert, x, shape=shape)

    elsewhere: Callable[[Array], Array] = lambda x: jnp.zeros(x.shape, jnp.float32)
    branches = [*map(run, experts), elsewhere]
    total = jnp.zeros(rows.shape, jnp.float32)
    for slot in range(gates.shape[1]):
        index = local[0, slot]
        is_here = (index >= 0) & (index < len(experts))
        branch = jnp.where(is_here, index, len(experts))
        total = total + gates[0, slot] * jax.lax.switch(branch, branches, rows)
    return total


def _many_tokens(
    experts: tuple[Expert, ...],
    rows: Float[Array, "tokens embed"],
    gates: Float[Array, "tokens selected"],
    local: Int[Array, "tokens selected"],
    *,
    shape: StepShape,
) -> Float[Array, "tokens embed"]:
    """Prefill: every expert that some token chose sees all tokens, weighted by its gates."""
    total = jnp.zeros(rows.shape, jnp.float32)
    for index, expert in enumerate(experts):
        gate = jnp.sum(jnp.where(local == index, gates, 0.0), axis=1)
        total = (
            total
            + jax.lax.cond(
                jnp.any(gate > 0),
                lambda x, expert=expert: expert_block(expert, x, shape=shape),
                lambda x: jnp.zeros(x.shape, jnp.float32),
                rows,
            )
            * gate[:, None]
        )
    return total


def expert_block(
    expert: Expert, x: Float[Array, "tokens embed"], *, shape: StepShape
) -> Float[Array, "tokens embed"]:
    """One expert on this device's part of its columns; a partial sum in float32."""
    gate = project(x, expert.gate, shape=shape)
    up = project(x, expert.up, shape=shape)
    return project(jax.nn.gelu(gate, approximate=True) * up, expert.down, shape=shape)


def project(
    x: Float[Array, "*batch inputs"], matrix: Matrix, *, shape: StepShape
) -> Float[Array, "*batch outputs"]:
    """Multiply by a weight that may be quantised in groups along its inputs.

    The one place where weights meet activations, and the seam for a native kernel. Sums are
    float32; scales are applied to the sums of each group, so no dequantised weight exists.

    Args:
        x: Activations.
        matrix: Quantised in groups, or plain float32.
        shape: Says which form this platform runs fastest.

    Returns:
        float32, partial if the inputs are split over devices.
    """
    rows = x.reshape(-1, len(matrix.groups), matrix.groups[0].shape[1])
    form = _reduce_rows if rows.shape[0] <= _FEW_ROWS else _matrix_product
    total = jnp.zeros((), jnp.float32)
    for index, weight in enumerate(matrix.groups):
        product = form(rows[:, index], weight, shape=shape)
        if matrix.scales is not None:
            product = product * matrix.scales[index].astype(jnp.float32)[None]
        total = product if index == 0 else total + product
    return total.reshape(*x.shape[:-1], -1)


def _reduce_rows(
    rows: Float[Array, "tokens inputs"],
    weight: Shaped[Array, "outputs inputs"],
    *,
    shape: StepShape,
) -> Float[Array, "tokens outputs"]:
    """Multiply and sum along each output's inputs: one fused pass over the stored weight.

    Measured on 2 cores with JAX 0.10: 8 G weights/s without temporaries, where a dot product with
    a converted weight runs at 0.8 and holds the whole converted weight.
    """
    del shape
    wide = weight.astype(jnp.float32)
    return jnp.stack([jnp.sum(wide * row[None], axis=1) for row in rows])


def _matrix_product(
    rows: Float[Array, "tokens inputs"],
    weight: Shaped[Array, "outputs inputs"],
    *,
    shape: StepShape,
) -> Float[Array, "tokens outputs"]:
    """A matrix product, for prefill."""
    return _einsum("ti,oi->to", rows, weight, kind=shape.operand)


def _einsum(equation: str, left: Array, right: Array, *, kind: jnp.dtype) -> Array:
    """A product of two arrays cast to one type, summed in float32."""
    return jnp.einsum(
        equation,
        left.astype(kind),
        right.astype(kind),
        precision=jax.lax.Precision.HIGHEST if kind == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


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
