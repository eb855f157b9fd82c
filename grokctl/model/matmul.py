"""Products of activations with stored weights, in the form that each platform runs fastest."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from grokctl.model import cpu_kernel
from grokctl.model.bucketing import BLOCK
from grokctl.model.parameters import Matrix
from grokctl.model.step_spec import StepShape

_FEW_ROWS: Final = {jnp.dtype(jnp.float32): 8, jnp.dtype(jnp.bfloat16): 4}
"""Up to this many tokens, a CPU is faster with the weight as it is stored than with matrix products
of one type or the other (docs/adr/0003)."""
_FEW_DOTS: Final = 4
"""Up to this many tokens, a CPU is faster with sums along the rows of the embedding."""
_FEW_GROUPS: Final = 8
"""Up to this many scale groups, accelerators keep the sums of each group apart."""
_UNROLL: Final = 8
"""Stored rows added in one pass: each further row makes the program slower to compile."""
_SUMS: Final = 2**16
"""Sums that grow side by side: they fit the CPU's cache, and one pass is enough work to share."""


def project(
    x: Float[Array, "*batch inputs"],
    matrix: Matrix,
    *,
    shape: StepShape,
    expert: Int[Array, ""] | None = None,
) -> Float[Array, "*batch outputs"]:
    """Multiply by a stored weight, `x @ dequantised`: of every weight but the embedding.

    Every form gives the same product, up to the order of float32 sums.

    Args:
        x: Activations.
        matrix: A weight, or a stack of the experts' weights.
        shape: The platform, which decides the fastest form.
        expert: Number of the weight in the stack. Each form cuts out only the rows that it
            multiplies: XLA would copy `weight[expert]`.

    Returns:
        float32, partial if the inputs are split over devices.
    """
    rows = x.reshape(-1, x.shape[-1])
    if shape.has_native_kernel and cpu_kernel.suits(matrix.weight):
        product = cpu_kernel.project(
            rows, matrix.weight, matrix.scales, expert, compute=shape.compute
        )
        return product.reshape(*x.shape[:-1], -1)
    if shape.has_kernel:
        from grokctl.model import kernels  # noqa: PLC0415 (as in the engine)

        if kernels.suits(len(rows), matrix.weight):
            product = kernels.few_rows(
                rows, matrix.weight, matrix.scales, expert, form=shape.kernel_form
            )
            return product.reshape(*x.shape[:-1], -1)
    weight = _Stored.of(matrix.weight, expert)
    scales = None if matrix.scales is None else _Stored.of(matrix.scales, expert)
    if shape.platform == "cpu" and len(rows) <= _FEW_ROWS[shape.operand]:
        return _row_by_row(rows, weight, scales).reshape(*x.shape[:-1], -1)
    # experts' inputs are rounded; those of attention decide which experts come next, and are not
    parts = rows.astype(shape.operand) if expert is not None else _high_and_low(rows, shape.operand)
    multiply = _in_blocks if shape.platform == "cpu" else _in_groups
    product = multiply(parts, weight, scales, dtype=shape.operand)
    if len(product) > len(rows):
        product = product[: len(rows)] + product[len(rows) :]
    return product.reshape(*x.shape[:-1], -1)


def project_together(
    x: Float[Array, "*batch inputs"], matrices: Sequence[Matrix], *, shape: StepShape
) -> list[Float[Array, "*batch _"]]:
    """`project` by several weights: on a GPU, few tokens in one kernel."""
    if not shape.has_kernel:
        return [project(x, matrix, shape=shape) for matrix in matrices]
    from grokctl.model.kernels import added_up  # noqa: PLC0415 (as in the engine)

    sums = sums_together(x.reshape(-1, x.shape[-1]), matrices, shape=shape)
    return [added_up(parts).reshape(*x.shape[:-1], -1) for parts in sums]


def sums_together(
    rows: Float[Array, "tokens inputs"], matrices: Sequence[Matrix], *, shape: StepShape
) -> list[Float[Array, "_ tokens _"]]:
    """`project_together` on a GPU, in parts still to be added up, along the first axis."""
    from grokctl.model import kernels  # noqa: PLC0415 (as in the engine)

    if kernels.suits(len(rows), *[matrix.weight for matrix in matrices]):
        return kernels.sums(rows, matrices, form=shape.kernel_form)
    return [project(rows, matrix, shape=shape)[None] for matrix in matrices]


def project_back(
    x: Float[Array, "*batch embed"], embedding: Float[Array, "vocab embed"], *, shape: StepShape
) -> Float[Array, "*batch vocab"]:
    """Multiply by the transpose of the embedding: `x @ embeddingᵀ`."""
    rows = x.reshape(-1, x.shape[-1])
    if shape.has_native_kernel and cpu_kernel.suits_back(len(rows)):
        product = cpu_kernel.project_back(rows, embedding)
    elif shape.platform != "cpu":
        product = einsum("te,ve->tv", rows, embedding, dtype=shape.operand)
    elif rows.shape[0] <= _FEW_DOTS:
        product = jnp.stack([jnp.sum(embedding * row[None], axis=1) for row in rows])
    else:
        product = einsum("te,ve->tv", rows, embedding, dtype=embedding.dtype)
    return product.reshape(*x.shape[:-1], -1)


def einsum(equation: str, left: Array, right: Array, *, dtype: jnp.dtype) -> Array:
    """Product of two arrays, cast to one type and summed in float32."""
    return jnp.einsum(
        equation,
        left.astype(dtype),
        right.astype(dtype),
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def widened(stored: Shaped[Array, "*any"]) -> Float[Array, "*any"]:
    """Convert int8, float32, bfloat16 or its bits to float32."""
    if stored.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)
    return stored.astype(jnp.float32)


def narrowed(values: Float[Array, "*any"], dtype: jnp.dtype) -> Shaped[Array, "*any"]:
    """Convert float32 to a stored type, of bfloat16 to its bits: the inverse of `widened`."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    return values.astype(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """A stored matrix: consecutive rows of a two-dimensional array.

    No reshape makes an axis of length one: XLA may then copy the whole array into another layout.
    It fuses a cut with the operations on it.
    """

    array: Shaped[Array, "all_rows outputs"]
    first: Array | int
    """The matrix's first row in the array."""
    rows: int

    @classmethod
    def of(cls, array: Shaped[Array, "*stack rows outputs"], expert: Array | None) -> "_Stored":
        """A matrix, or an expert's in a stack."""
        rows, outputs = array.shape[-2:]
        first = 0 if expert is None else expert * rows
        return cls(array=array.reshape(-1, outputs), first=first, rows=rows)

    @property
    def outputs(self) -> int:
        return self.array.shape[1]

    def cut(self, row: Array | int, column: Array | int, shape: tuple[int, int]) -> Array:
        """A block of rows and columns."""
        return jax.lax.dynamic_slice(self.array, (self.first + row, column), shape)

    def across(self, run: Array, row: Array, *, side: int, height: int) -> Array:
        """The same row of each of `side` runs of `height` rows, from a run onwards."""
        if side == 1 or height == 1:
            return self.cut(run * height + row, 0, (side, self.outputs))
        runs = self.array.reshape(-1, height, self.outputs)
        starts = (self.first // height + run, row, 0)
        return jax.lax.dynamic_slice(runs, starts, (side, 1, self.outputs))[:, 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Walk:
    """An order of stored rows: `outer` times `side` runs of `turns` times `unroll` rows each.

    No run crosses a scale group. One pass adds rows of `side` runs, each run to a sum of its own.
    """

    outer: int
    side: int
    turns: int
    unroll: int

    @classmethod
    def over(cls, rows: int, *, groups: int, room: int) -> "_Walk":
        """The order with the fewest passes and at most `room` sums side by side."""
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

    Rows are added one after the other, not by a reduction: XLA on the CPU would hand that to a
    kernel whose operands come from memory.
    """
    (tokens, _), outputs = x.shape, weight.outputs
    groups = 1 if scales is None else scales.rows
    room = max(1, _SUMS // (tokens * outputs))
    walk = _Walk.over(weight.rows, groups=groups, room=room)
    inputs = x.reshape(tokens, walk.outer, walk.side, walk.turns, walk.unroll, -1)
    # shape: tokens outer side turns unroll codes_per_row
    inputs = jnp.transpose(inputs, (1, 3, 0, 2, 4, 5))
    # shape: outer turns tokens side unroll codes_per_row
    inputs = inputs.reshape(walk.passes, tokens, walk.side, walk.unroll, -1)
    # shape: passes tokens side unroll codes_per_row
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
        grouped = sums.reshape(tokens, groups, -1, outputs)
        sums = jnp.sum(grouped, axis=2) * scale[None]
    return jnp.sum(sums, axis=1)


def _in_blocks(
    x: Float[Array, "tokens inputs"],
    weight: _Stored,
    scales: _Stored | None,
    *,
    dtype: jnp.dtype,
) -> Float[Array, "tokens outputs"]:
    """Matrix products with one block of stored rows after the other: only a block is dequantised.

    A block is part of a scale group, and its product is scaled. int4 has many small groups: there a
    block holds several, and is scaled before it is multiplied.
    """
    (tokens, inputs), outputs = x.shape, weight.outputs
    groups = 1 if scales is None else scales.rows
    codes_per_row = inputs // weight.rows
    room = (
        max(tokens, BLOCK // (dtype.itemsize * outputs)) // codes_per_row
    )  # one pass of sums each
    height = weight.rows // groups
    runs = _largest_divisor(groups, max(1, room // height)) if codes_per_row > 1 else 1
    rows = runs * height if runs > 1 else _largest_divisor(height, max(1, room))
    # of int4, the inputs of low nibbles, then the inputs of high nibbles
    parts = jnp.moveaxis(x.reshape(tokens, weight.rows, codes_per_row), 2, 0)
    # shape: codes_per_row tokens rows

    def add_block(index: Array, sums: Array) -> Array:
        product = jnp.zeros((tokens, outputs), jnp.float32)
        for part, codes in zip(
            parts, _codes(weight.cut(index * rows, 0, (rows, outputs))), strict=True
        ):
            wide = codes + _offset(weight)
            if runs > 1 and scales is not None:
                scale = widened(scales.cut(index * runs, 0, (runs, outputs)))
                wide = (wide.reshape(runs, height, outputs) * scale[:, None]).reshape(rows, outputs)
            block = jax.lax.dynamic_slice(part, (0, index * rows), (tokens, rows))
            product = product + einsum("ti,io->to", block, wide, dtype=dtype)
        if runs == 1 and scales is not None:
            product = product * widened(scales.cut(index * rows // height, 0, (1, outputs)))
        return sums + product

    zeros = jnp.zeros((tokens, outputs), jnp.float32)
    sums: Array = jax.lax.fori_loop(0, weight.rows // rows, add_block, zeros)
    return sums


def _high_and_low(
    x: Float[Array, "tokens inputs"], dtype: jnp.dtype
) -> Float[Array, "both inputs"]:
    """Activations in bfloat16, and below them the remainders, in bfloat16 too; or float32 as it is.

    Both together have 16 bits, and the released integers are exact in 8: little is lost.
    """
    if dtype == jnp.float32:
        return x
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return jnp.concatenate([high, x - high]).astype(dtype)


def _in_groups(
    x: Float[Array, "tokens inputs"],
    weight: _Stored,
    scales: _Stored | None,
    *,
    dtype: jnp.dtype,
) -> Float[Array, "tokens outputs"]:
    """One matrix product for each scale group, then scaled; many groups are dequantised instead.

    XLA for GPUs reads the weight inside the product if it is converted directly to the operands'
    type; by way of float32, or with a slice for each group, it would write a copy first.
    """
    outputs = weight.outputs
    codes = weight.cut(0, 0, (weight.rows, outputs))
    scale = None if scales is None else scales.cut(0, 0, (scales.rows, outputs))
    if codes.dtype == jnp.uint8 or (scale is not None and scale.shape[0] > _FEW_GROUPS):
        return einsum("ti,io->to", x, _dequantised(codes, scale), dtype=dtype)
    if codes.dtype == jnp.uint16:
        codes = jax.lax.bitcast_convert_type(codes, jnp.bfloat16)
    if scale is None:
        return einsum("ti,io->to", x, codes, dtype=dtype)
    groups = scale.shape[0]
    parts, grouped = x.reshape(x.shape[0], groups, -1), codes.reshape(groups, -1, outputs)
    # shape: tokens groups group_inputs; groups group_inputs outputs
    sums = einsum("tgi,gio->tgo", parts, grouped, dtype=dtype)
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
"""Codes -7 to 7 are stored as 1 to 15, two in a byte."""


def _offset(weight: _Stored) -> float:
    """Added to the codes of a stored weight, gives their values."""
    return -_INT4_OFFSET if weight.array.dtype == jnp.uint8 else 0.0


def _codes(stored: Shaped[Array, "*any"]) -> list[Float[Array, "*any"]]:
    """Codes in a stored number, as float32: one, or two of four bits, the low one first."""
    if stored.dtype == jnp.uint8:
        return [(stored & 15).astype(jnp.float32), (stored >> 4).astype(jnp.float32)]
    return [widened(stored)]


def _largest_divisor(number: int, limit: int) -> int:
    return max(part for part in range(1, limit + 1) if number % part == 0)
