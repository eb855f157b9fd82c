"""Products of activations with stored weights, in the form that each platform runs fastest."""

from dataclasses import dataclass
from math import gcd
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from grokctl.model import kernels
from grokctl.model.bucketing import BLOCK
from grokctl.model.parameters import Matrix
from grokctl.model.step_spec import StepShape

_FEW_ROWS: Final = {jnp.dtype(jnp.float32): 8, jnp.dtype(jnp.bfloat16): 4}
"""Up to this many tokens a CPU is faster reading the weight as it is stored, beside matrix products
in one type or the other (docs/adr/0003)."""
_FEW_DOTS: Final = 4
"""Up to this many tokens it is faster summing along the rows of the embedding."""
_FEW_GROUPS: Final = 8
"""Up to this many scale groups their sums are kept apart on accelerators."""
_UNROLL: Final = 8
"""Stored rows that are added in one pass: every further one makes the program slower to compile."""
_SUMS: Final = 2**16
"""Sums that grow side by side: they stay in the cache, and one pass is worth sharing out."""


def project(
    x: Float[Array, "*batch inputs"],
    matrix: Matrix,
    *,
    shape: StepShape,
    expert: Int[Array, ""] | None = None,
) -> Float[Array, "*batch outputs"]:
    """Multiply by a stored weight: the one seam between weights and activations.

    Every form is a twin of every other, and of `x @ dequantised`, up to the order of float32 sums.

    Args:
        x: Activations.
        matrix: A weight, or a stack of the experts'.
        shape: Says which form this platform runs fastest.
        expert: Which of the stack. Only what is multiplied is cut out of it: XLA copies
            `weight[expert]`.

    Returns:
        float32, partial if the inputs are split over devices.
    """
    rows = x.reshape(-1, x.shape[-1])
    if shape.has_kernel and kernels.suits(len(rows), matrix.weight):
        product = kernels.few_rows(rows, matrix.weight, matrix.scales, expert)
        return product.reshape(*x.shape[:-1], -1)
    weight = _Stored.of(matrix.weight, expert)
    scales = None if matrix.scales is None else _Stored.of(matrix.scales, expert)
    if shape.platform == "cpu" and len(rows) <= _FEW_ROWS[shape.operand]:
        return _row_by_row(rows, weight, scales).reshape(*x.shape[:-1], -1)
    # experts' inputs are rounded; those of attention decide which experts come next, and are not
    parts = rows.astype(shape.operand) if expert is not None else _high_and_low(rows, shape.operand)
    multiply = _in_blocks if shape.platform == "cpu" else _in_groups
    product = multiply(parts, weight, scales, kind=shape.operand)
    if len(product) > len(rows):
        product = product[: len(rows)] + product[len(rows) :]
    return product.reshape(*x.shape[:-1], -1)


def project_back(
    x: Float[Array, "*batch embed"], embedding: Float[Array, "vocab embed"], *, shape: StepShape
) -> Float[Array, "*batch vocab"]:
    """Multiply by the transpose of the embedding, which the model shares with its head."""
    rows = x.reshape(-1, x.shape[-1])
    if shape.platform != "cpu":
        product = einsum("te,ve->tv", rows, embedding, kind=shape.operand)
    elif rows.shape[0] <= _FEW_DOTS:
        product = jnp.stack([jnp.sum(embedding * row[None], axis=1) for row in rows])
    else:
        product = einsum("te,ve->tv", rows, embedding, kind=embedding.dtype)
    return product.reshape(*x.shape[:-1], -1)


def einsum(equation: str, left: Array, right: Array, *, kind: jnp.dtype) -> Array:
    """A product of two arrays cast to one type, summed in float32."""
    return jnp.einsum(
        equation,
        left.astype(kind),
        right.astype(kind),
        precision=jax.lax.Precision.HIGHEST if kind == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def widened(stored: Shaped[Array, "*any"]) -> Float[Array, "*any"]:
    """float32 of int8, of float32, or of the bits of bfloat16."""
    if stored.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)
    return stored.astype(jnp.float32)


def narrowed(values: Float[Array, "*any"], dtype: jnp.dtype) -> Shaped[Array, "*any"]:
    """float32 as it is, or rounded to bfloat16 as its bits: what `widened` undoes."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    return values.astype(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """A matrix as it is stored: some rows of a two-dimensional array.

    Nothing is reshaped to an axis of length one: XLA may then copy the whole array into another
    layout. What is cut out is fused with what is done to it.
    """

    array: Shaped[Array, "all_rows outputs"]
    first: Array | int
    """Which row begins it."""
    rows: int

    @classmethod
    def of(cls, array: Shaped[Array, "*stack rows outputs"], number: Array | None) -> "_Stored":
        """A matrix, or one of a stack."""
        rows, outputs = array.shape[-2:]
        first = 0 if number is None else number * rows
        return cls(array=array.reshape(-1, outputs), first=first, rows=rows)

    @property
    def outputs(self) -> int:
        return self.array.shape[1]

    def cut(self, row: Array | int, column: Array | int, shape: tuple[int, int]) -> Array:
        """Rows and columns that follow each other."""
        return jax.lax.dynamic_slice(self.array, (self.first + row, column), shape)

    def across(self, run: Array, row: Array, *, side: int, height: int) -> Array:
        """One row out of each of `side` runs of `height` rows, from a run onwards."""
        if side == 1 or height == 1:
            return self.cut(run * height + row, 0, (side, self.outputs))
        runs = self.array.reshape(-1, height, self.outputs)
        starts = (self.first // height + run, row, 0)
        return jax.lax.dynamic_slice(runs, starts, (side, 1, self.outputs))[:, 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Walk:
    """An order to read stored rows in: `outer` times `side` runs of `turns` times `unroll` rows.

    No run crosses a scale group. Rows of `side` runs are added to as many sums in one pass.
    """

    outer: int
    side: int
    turns: int
    unroll: int

    @classmethod
    def over(cls, rows: int, *, groups: int, room: int) -> "_Walk":
        """At most `room` sums side by side, and the fewest passes."""
        height = rows // groups
        unroll = gcd(_UNROLL, height)
        if groups > room:
            side = _largest_divisor(groups, room)
            return cls(outer=groups // side, side=side, turns=height // unroll, unroll=unroll)
        runs = _largest_divisor(height // unroll, room // groups)
        return cls(outer=1, side=groups * runs, turns=height // unroll // runs, unroll=unroll)

    @property
    def passes(self) -> int:
        return self.outer * self.turns

    @property
    def height(self) -> int:
        """Rows of a run."""
        return self.turns * self.unroll


def _row_by_row(
    x: Float[Array, "tokens inputs"], weight: _Stored, scales: _Stored | None
) -> Float[Array, "tokens outputs"]:
    """Add every stored row, times its input, to the sums of all outputs: one pass over the weight.

    Rows are added one after the other, and not by a reduction, which XLA on the CPU hands to a
    kernel that takes its operands from memory.
    """
    (tokens, _), outputs = x.shape, weight.outputs
    groups = 1 if scales is None else scales.rows
    room = max(1, _SUMS // (tokens * outputs))
    walk = _Walk.over(weight.rows, groups=groups, room=room)
    inputs = x.reshape(tokens, walk.outer, walk.side, walk.turns, walk.unroll, -1)
    inputs = jnp.transpose(inputs, (1, 3, 0, 2, 4, 5))
    inputs = inputs.reshape(walk.passes, tokens, walk.side, walk.unroll, -1)
    offsets = jnp.sum(inputs, axis=(3, 4))[..., None] * _offset(weight)

    def add(index: Array, sums: Array) -> Array:
        first, row = index // walk.turns * walk.side, index % walk.turns * walk.unroll
        factors, total = inputs[index], offsets[index]
        for step in range(walk.unroll):
            stored = weight.across(first, row + step, side=walk.side, height=walk.height)
            for place, codes in enumerate(_codes(stored)):
                total = total + codes[None] * factors[:, :, step, place, None]
        if scales is not None and walk.outer > 1:
            total = total * widened(scales.cut(first, 0, (walk.side, outputs)))[None]
        return sums + total

    zeros = jnp.zeros((tokens, walk.side, outputs), jnp.float32)
    sums: Array = jax.lax.fori_loop(0, walk.passes, add, zeros)
    if scales is not None and walk.outer == 1:
        scale = widened(scales.cut(0, 0, (groups, outputs)))
        sums = jnp.sum(sums.reshape(tokens, groups, -1, outputs), axis=2) * scale[None]
    return jnp.sum(sums, axis=1)


def _in_blocks(
    x: Float[Array, "tokens inputs"],
    weight: _Stored,
    scales: _Stored | None,
    *,
    kind: jnp.dtype,
) -> Float[Array, "tokens outputs"]:
    """Matrix products with a block of stored rows at a time, so that no more is ever dequantised.

    A block is a part of a scale group, whose sums are scaled after; int4 has many small groups, and
    several are scaled before together.
    """
    (tokens, inputs), outputs = x.shape, weight.outputs
    groups = 1 if scales is None else scales.rows
    held = inputs // weight.rows
    room = max(tokens, BLOCK // (kind.itemsize * outputs)) // held  # sums pass once a block
    height = weight.rows // groups
    runs = _largest_divisor(groups, max(1, room // height)) if held > 1 else 1
    rows = runs * height if runs > 1 else _largest_divisor(height, max(1, room))
    # of int4, the inputs of low nibbles apart from those of high ones, as their codes come
    parts = jnp.moveaxis(x.reshape(tokens, weight.rows, held), 2, 0)

    def multiply(index: Array, sums: Array) -> Array:
        product = jnp.zeros((tokens, outputs), jnp.float32)
        for part, codes in zip(
            parts, _codes(weight.cut(index * rows, 0, (rows, outputs))), strict=True
        ):
            wide = codes + _offset(weight)
            if runs > 1 and scales is not None:
                scale = widened(scales.cut(index * runs, 0, (runs, outputs)))
                wide = (wide.reshape(runs, height, outputs) * scale[:, None]).reshape(rows, outputs)
            some = jax.lax.dynamic_slice(part, (0, index * rows), (tokens, rows))
            product = product + einsum("ti,io->to", some, wide, kind=kind)
        if runs == 1 and scales is not None:
            product = product * widened(scales.cut(index * rows // height, 0, (1, outputs)))
        return sums + product

    zeros = jnp.zeros((tokens, outputs), jnp.float32)
    found: Array = jax.lax.fori_loop(0, weight.rows // rows, multiply, zeros)
    return found


def _high_and_low(x: Float[Array, "tokens inputs"], kind: jnp.dtype) -> Float[Array, "both inputs"]:
    """Activations in a type, and below them what bfloat16 drops of them, in bfloat16 as well.

    The two have 16 bits together, and the released integers are exact in 8: little is lost.
    """
    if kind == jnp.float32:
        return x
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return jnp.concatenate([high, x - high]).astype(kind)


def _in_groups(
    x: Float[Array, "tokens inputs"],
    weight: _Stored,
    scales: _Stored | None,
    *,
    kind: jnp.dtype,
) -> Float[Array, "tokens outputs"]:
    """A matrix product a scale group, scaled after; the weight dequantised if there are many.

    XLA for GPUs reads the weight in the product itself if it is converted to the operands' type at
    once; by way of float32, or with a slice for each group, it would write a copy first.
    """
    outputs = weight.outputs
    codes = weight.cut(0, 0, (weight.rows, outputs))
    scale = None if scales is None else scales.cut(0, 0, (scales.rows, outputs))
    if codes.dtype == jnp.uint8 or (scale is not None and scale.shape[0] > _FEW_GROUPS):
        return einsum("ti,io->to", x, _dequantised(codes, scale), kind=kind)
    if codes.dtype == jnp.uint16:
        codes = jax.lax.bitcast_convert_type(codes, jnp.bfloat16)
    if scale is None:
        return einsum("ti,io->to", x, codes, kind=kind)
    groups = scale.shape[0]
    parts, grouped = x.reshape(x.shape[0], groups, -1), codes.reshape(groups, -1, outputs)
    sums = einsum("tgi,gio->tgo", parts, grouped, kind=kind)
    return jnp.sum(sums * widened(scale)[None], axis=1)


def _dequantised(
    stored: Shaped[Array, "rows outputs"], scales: Shaped[Array, "groups outputs"] | None
) -> Float[Array, "inputs outputs"]:
    """Codes times scales, in float32."""
    outputs = stored.shape[-1]
    wide = jnp.stack(_codes(stored), axis=1).reshape(-1, outputs)
    if stored.dtype == jnp.uint8:
        wide = wide - _INT4_OFFSET
    if scales is None:
        return wide
    grouped = wide.reshape(scales.shape[0], -1, outputs) * widened(scales)[:, None]
    return grouped.reshape(-1, outputs)


_INT4_OFFSET: Final = 8.0
"""Two codes in a byte are stored as 1 to 15."""


def _offset(weight: _Stored) -> float:
    """What the codes of a stored weight lack."""
    return -_INT4_OFFSET if weight.array.dtype == jnp.uint8 else 0.0


def _codes(stored: Shaped[Array, "*any"]) -> list[Float[Array, "*any"]]:
    """The codes of the inputs that a stored row holds: one, or two of four bits, low one first."""
    if stored.dtype == jnp.uint8:
        return [(stored & 15).astype(jnp.float32), (stored >> 4).astype(jnp.float32)]
    return [widened(stored)]


def _largest_divisor(number: int, limit: int) -> int:
    return max(part for part in range(1, limit + 1) if number % part == 0)
