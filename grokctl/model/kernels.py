"""The product of a few activations with a stored weight on a GPU: one kernel, every byte read once.

It is Pallas for Triton, which takes all sizes, and lowers for AMD's GPUs and without a GPU. Its
successor, Mosaic GPU, refuses AMD's, takes only multiples of 128 elements, and cannot be imported
with JAX 0.10 alone: it needs absl.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Shaped

try:
    from jax.experimental.pallas import triton
except ImportError:  # announced for a version after JAX 0.11
    triton = None  # type: ignore[assignment]

FEW_ROWS: Final = 8
"""Tokens up to which the kernel is the fastest form; half as many of int4. With more, their sums no
longer fit into registers, and multiplying takes longer than reading."""
_LARGEST: Final = 2**31
"""Elements of a stack that the offsets of Triton's lowering reach."""
_WARPS: Final = 4
_STRIP: Final = 256
"""Bytes of a stored row that a program reads: two cache lines."""
_TILE: Final = 8
"""Stored rows that a program adds up at a time: 16 bytes for each of its threads, one load."""
_AHEAD: Final = 4
"""Loads that a thread begins before it uses the first, because memory answers late."""
_PROGRAMS: Final = 512
"""Programs that fill a GPU: four for each of 128 multiprocessors."""


def suits(tokens: int, weight: Shaped[Array, "*stack rows outputs"]) -> bool:
    """Whether `few_rows` is the fastest form on a GPU."""
    codes = 2 if weight.dtype == jnp.uint8 else 1
    return triton is not None and tokens * codes <= FEW_ROWS and weight.size < _LARGEST


def works(device: jax.Device) -> bool:
    """Whether the kernel compiles for a device and gives the right product there."""
    x, weight = jnp.ones((2, 64), jnp.float32), jnp.full((3, 64, 128), 3, jnp.int8)
    try:
        with jax.default_device(device):
            product = jax.jit(few_rows)(x, weight, None, jnp.int32(1))
            return bool(jnp.all(product == jnp.float32(3 * 64)))
    except (RuntimeError, ValueError, TypeError, AttributeError):  # triton may be missing
        return False


def few_rows(
    x: Float[Array, "tokens inputs"],
    weight: Shaped[Array, "*stack rows outputs"],
    scales: Shaped[Array, "*stack groups outputs"] | None,
    expert: Int[Array, ""] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "tokens outputs"]:
    """Multiply by a stored weight, in float32.

    The kernel takes the number of the expert: nothing is cut out of the stack. Programs share out
    the inputs too, and their sums are added afterwards in an order that never changes.

    Args:
        x: Activations.
        weight: As in `Matrix`.
        scales: As in `Matrix`.
        expert: Number of the weight in the stack.
        interpret: Run the kernel as ordinary operations, on any platform.
    """
    tokens, (rows, outputs) = x.shape[0], weight.shape[-2:]
    groups = 1 if scales is None else scales.shape[-2]
    cut = _Cut.of(rows, outputs, groups=groups, itemsize=weight.dtype.itemsize)
    number = jnp.zeros(1, jnp.int32) if expert is None else expert.astype(jnp.int32).reshape(1)
    # of int4, the inputs of low nibbles before the inputs of high nibbles
    inputs = jnp.moveaxis(x.astype(jnp.float32).reshape(tokens, rows, -1), 2, 0).reshape(-1)
    # shape: codes_per_row tokens rows, flat
    tables = [table.reshape(-1, outputs) for table in (weight, scales) if table is not None]
    sums = pl.pallas_call(
        partial(_kernel, tokens=tokens, cut=cut),
        grid=(pl.cdiv(outputs, cut.width), cut.splits),
        out_shape=jax.ShapeDtypeStruct((cut.splits * tokens, outputs), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name="few_rows",
    )(number, inputs, *tables)
    return jnp.sum(sums.reshape(cut.splits, tokens, outputs), axis=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """How programs share out a weight.

    A program has `width` outputs. Of the `groups` scale groups of `height` stored rows, it has
    `each` whole groups, or one of the `parts` of a group. It reads `ahead` tiles of `tile` rows
    before it adds them up, `steps` times for a group.
    """

    outputs: int
    groups: int
    height: int
    width: int
    tile: int
    ahead: int
    steps: int
    parts: int
    each: int

    @classmethod
    def of(cls, rows: int, outputs: int, *, groups: int, itemsize: int) -> "_Cut":
        """As many programs as a GPU needs, unless some would have nothing to read."""
        height = rows // groups
        width = min(_STRIP // itemsize, pl.next_power_of_2(outputs))
        tile = min(_TILE, pl.next_power_of_2(height))
        ahead = min(_AHEAD, pl.cdiv(height, tile))
        splits = pl.cdiv(_PROGRAMS, pl.cdiv(outputs, width))
        parts = min(pl.cdiv(splits, groups), pl.cdiv(height, tile * ahead))
        steps = pl.cdiv(height, tile * ahead * pl.next_power_of_2(parts))
        most = max(1, groups // splits)
        return cls(
            outputs=outputs,
            groups=groups,
            height=height,
            width=width,
            tile=tile,
            ahead=ahead,
            steps=steps,
            parts=pl.cdiv(height, tile * ahead * steps),
            each=max(each for each in range(1, most + 1) if groups % each == 0),
        )

    @property
    def splits(self) -> int:
        """How many programs share the same outputs."""
        return self.groups // self.each * self.parts


def _kernel(
    number: Any, x: Any, weight: Any, *scales_and_sums: Any, tokens: int, cut: _Cut
) -> None:
    """One program: sums over its rows, for its outputs."""
    *scales, sums = scales_and_sums
    split, expert, height = pl.program_id(1), number[0], cut.groups * cut.height
    column = pl.program_id(0) * cut.width
    columns = pl.ds(column, cut.width)
    in_outputs = column + jnp.arange(cut.width) < cut.outputs
    zeros = (jnp.zeros((cut.tile, cut.width), jnp.float32),) * tokens

    def add_tiles(step: Array, totals: tuple[Array, ...], *, group: Array) -> tuple[Array, ...]:
        first = (split % cut.parts * cut.steps + step) * cut.ahead
        starts = [(first + index) * cut.tile for index in range(cut.ahead)]
        in_rows = [start + jnp.arange(cut.tile) < cut.height for start in starts]
        rows = [group * cut.height + start for start in starts]
        tiles = []
        for row, inside in zip(rows, in_rows, strict=True):
            place = weight.at[pl.ds(expert * height + row, cut.tile), columns]
            tiles.append(_load(place, inside[:, None] & in_outputs[None]))
        for row, inside, tile in zip(rows, in_rows, tiles, strict=True):
            for nibble, codes in enumerate(_codes(tile)):
                begins = [(nibble * tokens + token) * height + row for token in range(tokens)]
                factors = [_load(x.at[pl.ds(begin, cut.tile)], inside) for begin in begins]
                totals = tuple(
                    total + codes * factor[:, None]
                    for total, factor in zip(totals, factors, strict=True)
                )
        return totals

    def add_group(index: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        group = split // cut.parts * cut.each + index
        sums_of_group = jax.lax.fori_loop(0, cut.steps, partial(add_tiles, group=group), zeros)
        for table in scales:
            (scale,) = _codes(_load(table.at[expert * cut.groups + group, columns], in_outputs))
            sums_of_group = tuple(part * scale[None] for part in sums_of_group)
        return tuple(total + part for total, part in zip(totals, sums_of_group, strict=True))

    for token, total in enumerate(jax.lax.fori_loop(0, cut.each, add_group, zeros)):
        place = sums.at[split * tokens + token, columns]
        triton.store(place, jnp.sum(total, axis=0), mask=in_outputs)


def _load(part: Any, mask: Array) -> Array:
    loaded: Array = triton.load(part, mask=mask, other=jnp.zeros((), part.dtype))
    return loaded


def _codes(stored: Shaped[Array, "*any"]) -> list[Float[Array, "*any"]]:
    """Codes in stored numbers, as float32: one, or of a byte of int4 two, the low nibble first.

    A code becomes the last bits of a large float, which is then subtracted, exactly: a GPU converts
    integers at a fraction of the rate of its other operations, too slowly for its memory.
    """
    as_float = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    if stored.dtype == jnp.uint8:
        bits = stored.astype(jnp.uint32)
        low, high = as_float((bits & 0x0F) | 0x4B000000), as_float((bits & 0xF0) | 0x49000000)
        return [low - (2.0**23 + 8), high - (2.0**19 + 8)]
    if stored.dtype == jnp.int8:
        bits = jax.lax.bitcast_convert_type(stored, jnp.uint8).astype(jnp.uint32)
        return [as_float(bits ^ 0x4B000080) - (2.0**23 + 128)]
    return [as_float(stored.astype(jnp.uint32) << 16) if stored.dtype == jnp.uint16 else stored]
