"""The forward pass in a form that can be differentiated: whole sequences, and no cache.

Norms, rotation, attention and routing are those of `grokctl.model`. What differs is how experts
are run: loops whose length depends on the data have no derivative. A test compares the logits with
those of `grokctl.model.forward`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from grokctl.model.attention import attend_at_once
from grokctl.model.config import GrokConfig
from grokctl.model.experts import route
from grokctl.model.forward import rms_norm, rotate
from grokctl.model.matmul import einsum
from grokctl.model.parameters import Attention, Experts, Layer, Matrix, Parameters, build_parameters
from grokctl.model.tensors import tensor_specs

RUN: Final = 256
"""Tokens that go through an expert together."""


def initial_parameters(config: GrokConfig, seed: int) -> Parameters:
    """Random float32 weights: unit inputs give unit outputs."""
    rng = np.random.default_rng(seed)
    specs = {spec.name: spec for spec in tensor_specs(config)}

    def matrix(name: str) -> Matrix:
        shape = specs[name].shape
        if len(shape) == 1:
            return Matrix(jnp.ones(shape, jnp.float32), None)
        deviation = shape[-2] ** -0.5
        if name == "embedding":
            deviation = 1 / config.embedding_multiplier_scale
        elif name.endswith("router"):
            deviation = 0.02
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(deviation)
        return Matrix(jnp.asarray(values), None)

    return build_parameters(config, matrix)


def logits_of(
    parameters: Parameters,
    tokens: Int[Array, "batch time"],
    *,
    config: GrokConfig,
    operand: jnp.dtype,
) -> tuple[Float[Array, "batch time vocab"], Float[Array, ""]]:
    """Logits after every token, and how unevenly experts are used: 1 if all are alike.

    Args:
        parameters: Of float32, without scales.
        tokens: Whole sequences.
        config: The model.
        operand: Type of the operands of products.
    """
    multiply = partial(product, dtype=operand)
    hidden = jnp.take(parameters.embedding, tokens, axis=0) * config.embedding_multiplier_scale
    imbalance = jnp.zeros((), jnp.float32)
    for layer in parameters.layers:
        hidden, uneven = _layer(layer, hidden, config=config, operand=operand)
        imbalance = imbalance + uneven / config.num_layers
    hidden = rms_norm(hidden, parameters.final_norm, eps=config.rms_norm_eps)
    logits = multiply("bte,ve->btv", hidden, parameters.embedding)
    return logits * config.output_multiplier_scale, imbalance


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(equation: str, left: Array, right: Array, dtype: jnp.dtype) -> Array:
    """`einsum`; its derivatives have operands of the same type too."""
    return einsum(equation, left, right, dtype=dtype)


def _product_forward(
    equation: str, left: Array, right: Array, dtype: jnp.dtype
) -> tuple[Array, tuple[Array, Array]]:
    left, right = left.astype(dtype), right.astype(dtype)
    return einsum(equation, left, right, dtype=dtype), (left, right)


def _product_backward(
    equation: str, dtype: jnp.dtype, kept: tuple[Array, Array], change: Array
) -> tuple[Array, Array]:
    (inputs, output), (left, right) = equation.split("->"), kept
    of_left, of_right = inputs.split(",")
    change = change.astype(dtype)
    return (
        einsum(f"{output},{of_right}->{of_left}", change, right, dtype=dtype),
        einsum(f"{of_left},{output}->{of_right}", left, change, dtype=dtype),
    )


product.defvjp(_product_forward, _product_backward)


def _layer(
    layer: Layer,
    hidden: Float[Array, "batch time embed"],
    *,
    config: GrokConfig,
    operand: jnp.dtype,
) -> tuple[Float[Array, "batch time embed"], Float[Array, ""]]:
    norms, eps = layer.norms, config.rms_norm_eps
    normed = rms_norm(hidden, norms.pre_attention, eps=eps)
    mixed = _attention(layer.attention, normed, config=config, operand=operand)
    hidden = hidden + rms_norm(mixed, norms.post_attention, eps=eps)
    normed = rms_norm(hidden, norms.pre_moe, eps=eps)
    mixed, uneven = _mixture(layer, normed, config=config, operand=operand)
    return hidden + rms_norm(mixed, norms.post_moe, eps=eps), uneven


def _attention(
    weights: Attention,
    x: Float[Array, "batch time embed"],
    *,
    config: GrokConfig,
    operand: jnp.dtype,
) -> Float[Array, "batch time embed"]:
    batch, time, _ = x.shape
    multiply = partial(product, "bti,io->bto", dtype=operand)
    positions = jnp.broadcast_to(jnp.arange(time)[None], (batch, time))
    query, key, value = (
        multiply(x, matrix.weight).reshape(batch, time, -1, config.key_size)
        for matrix in (weights.query, weights.key, weights.value)
    )
    query = rotate(query, positions, base=config.rope_base)
    key = rotate(key, positions, base=config.rope_base)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((time, time), bool))[None], (batch, time, time))
    context = attend_at_once(
        query, jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2), mask, config=config
    )
    return multiply(context.reshape(batch, time, -1), weights.out.weight)


def _mixture(
    layer: Layer, x: Float[Array, "batch time embed"], *, config: GrokConfig, operand: jnp.dtype
) -> tuple[Float[Array, "batch time embed"], Float[Array, ""]]:
    """Each token's sum over its experts, and the load-balancing term of Switch Transformers.

    The term is `experts * sum_e(fraction of choices_e * mean probability_e)` (Fedus et al., 2021,
    equation 4), which is 1 where both are even.
    """
    rows = x.reshape(-1, x.shape[-1])
    gates, chosen = route(layer.router, rows, config=config)
    probabilities = jax.nn.softmax(
        einsum("te,ex->tx", rows, layer.router, dtype=jnp.dtype(jnp.float32)), axis=-1
    )
    is_of = chosen.reshape(-1, 1) == jnp.arange(config.num_experts)[None]
    fractions = jnp.mean(is_of.astype(jnp.float32), axis=0)
    uneven = config.num_experts * jnp.sum(fractions * jnp.mean(probabilities, axis=0))
    selected = config.num_selected_experts
    places = _Places.of(is_of)
    repeated = jnp.repeat(rows, selected, axis=0)
    runs = _moved(repeated, places.choice_of_row, places.row_of_choice, places.is_real)
    output = _in_runs(layer.experts, runs, places.expert_of_run, operand=operand)
    back = _gathered(output, places.row_of_choice, places.choice_of_row)
    weighted = back.reshape(-1, selected, rows.shape[-1]) * gates[..., None]
    return jnp.sum(weighted, axis=1).reshape(x.shape), uneven


@dataclass(frozen=True, slots=True)
class _Places:
    """Where each choice, a token with one of its experts, goes: runs of one expert each."""

    expert_of_run: Int[Array, " runs"]
    row_of_choice: Int[Array, " choices"]
    choice_of_row: Int[Array, " rows"]
    is_real: Bool[Array, " rows"]
    """False for rows that fill up a run."""

    @classmethod
    def of(cls, is_of: Bool[Array, "choices experts"]) -> "_Places":
        choices, experts = is_of.shape
        runs = choices // RUN + experts
        counts = jnp.sum(is_of, axis=0)
        needed = -(-counts // RUN)
        ends = jnp.cumsum(needed)
        expert_of_run = jnp.sum(ends[None] <= jnp.arange(runs)[:, None], axis=1)
        before = jnp.cumsum(is_of, axis=0) - 1
        first = (ends - needed) * RUN
        row_of_choice = jnp.sum(jnp.where(is_of, first[None] + before, 0), axis=1)
        empty = jnp.full(runs * RUN, choices, jnp.int32)
        choice_of_row = empty.at[row_of_choice].set(jnp.arange(choices), unique_indices=True)
        return cls(
            jnp.minimum(expert_of_run, experts - 1),
            row_of_choice,
            jnp.minimum(choice_of_row, choices - 1),
            choice_of_row < choices,
        )


def _in_runs(
    experts: Experts,
    rows: Float[Array, "rows embed"],
    expert_of_run: Int[Array, " runs"],
    *,
    operand: jnp.dtype,
) -> Float[Array, "rows embed"]:
    """Each run through its expert: `(gelu(x @ gate) * (x @ up)) @ down`."""
    multiply = partial(product, "rti,rio->rto", dtype=operand)
    x = rows.reshape(len(expert_of_run), RUN, -1)
    gate, up, down = (
        matrix.weight[expert_of_run] for matrix in (experts.gate, experts.up, experts.down)
    )
    hidden = jax.nn.gelu(multiply(x, gate), approximate=True) * multiply(x, up)
    return multiply(hidden, down).reshape(rows.shape)


# Rows are moved with gathers both ways: the derivative of a gather is a scatter, which XLA runs on
# a CPU row after row.


@jax.custom_vjp
def _moved(
    x: Shaped[Array, "choices embed"], to: Array, back: Array, is_real: Array
) -> Shaped[Array, "rows embed"]:
    """`x[to]`, zero where nothing real comes."""
    del back
    return jnp.where(is_real[:, None], x[to], 0.0)


def _moved_forward(x: Array, to: Array, back: Array, is_real: Array) -> tuple[Array, Array]:
    return _moved(x, to, back, is_real), back


def _moved_backward(back: Array, change: Array) -> tuple[Array, None, None, None]:
    return change[back], None, None, None


_moved.defvjp(_moved_forward, _moved_backward)


@jax.custom_vjp
def _gathered(
    x: Shaped[Array, "rows embed"], to: Array, back: Array
) -> Shaped[Array, "choices embed"]:
    """`x[to]`: the inverse of `_moved`.

    Rows that fill up a run get a derivative too; nothing comes of it, because they are zero.
    """
    del back
    return x[to]


def _gathered_forward(x: Array, to: Array, back: Array) -> tuple[Array, Array]:
    return x[to], back


def _gathered_backward(back: Array, change: Array) -> tuple[Array, None, None]:
    return change[back], None, None


_gathered.defvjp(_gathered_forward, _gathered_backward)


def loss_of(
    parameters: Parameters,
    tokens: Int[Array, "batch time_and_one"],
    *,
    config: GrokConfig,
    operand: jnp.dtype,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean negative log-likelihood of every token after the first, nats; and the imbalance."""
    logits, imbalance = logits_of(parameters, tokens[:, :-1], config=config, operand=operand)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen), imbalance
