"""The product of a few activations with a stored weight on a GPU: one kernel, every byte read once.

It is Pallas for Triton, which has no favourite sizes, lowers for AMD's GPUs as well, and where no
GPU is. Mosaic GPU, which is to replace it, refuses AMD's, takes only multiples of 128 elements, and
cannot be imported with JAX 0.10 alone: it needs absl.
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
except ImportError:  # JAX 0.11 announced that it will go
    triton = None  # type: ignore[assignment]

FEW_ROWS: Final = 8
"""Tokens up to which the kernel is the form to take; half as many of int4. With more, their sums no
longer fit into registers, and multiplying takes longer than reading."""
_LARGEST: Final = 2**31
"""Elements of a stack that the offsets of Triton's lowering reach."""
_WARPS: Final = 4
_STRIP: Final = 256
"""Bytes of a stored row that a program reads: two cache lines."""
_TILE: Final = 8
"""Stored rows that it adds up at a time: 16 bytes for each of its threads, one load."""
_AHEAD: Final = 4
"""Loads that a thread begins before it uses the first, because memory answers late."""
_PROGRAMS: Final = 512
"""Programs that fill a GPU: four for each of 128 multiprocessors."""


def suits(tokens: int, weight: Shaped[Array, "*stack rows outputs"]) -> bool:
    """Whether `few_rows` is the form to take on a GPU."""
    codes = 2 if weight.dtype == jnp.uint8 else 1
    return triton is not None and tokens * codes <= FEW_ROWS and weight.size < _LARGEST


def works(device: jax.Device) -> bool:
    """Whether the kernel can be compiled for a device, and is right on it."""
    x, weight = jnp.ones((2, 64), jnp.float32), jnp.full((3, 64, 128), 3, jnp.int8)
    try:
        with jax.default_device(device):
            found = jax.jit(few_rows)(x, weight, None, jnp.int32(1))
            return bool(jnp.all(found == jnp.float32(3 * 64)))
    except (RuntimeError, ValueError, TypeError, AttributeError):  # it may be missing
        return False


def few_rows(
    x: Float[Array, "tokens inputs"],
    weight: Shaped[Array, "*stack rows outputs"],
    scales: Shaped[Array, "*stack groups outputs"] | None,
    expert: Int[Array, ""] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "tokens outputs"]:
    """Multiply by a weight as it is stored; everything is float32 as soon as it is read.

    The number of the expert goes into the kernel: nothing is cut out of the stack. Programs share
    out the inputs too, and their sums are added afterwards in an order that never changes.

    Args:
        x: Activations.
        weight: As `Matrix` has it.
        scales: Likewise.
        expert: Which of the stack.
        interpret: Run the kernel as ordinary operations, on any platform.
    """
    tokens, (rows, outputs) = x.shape[0], weight.shape[-2:]
    groups = 1 if scales is None else scales.shape[-2]
    cut = _Cut.of(rows, outputs, groups=groups, itemsize=weight.dtype.itemsize)
    number = jnp.zeros(1, jnp.int32) if expert is None else expert.astype(jnp.int32).reshape(1)
    # of int4, those that meet the low nibbles before those that meet the high ones
    inputs = jnp.moveaxis(x.astype(jnp.float32).reshape(tokens, rows, -1), 2, 0).reshape(-1)
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
    """How a weight is shared out.

    A program has `width` outputs, and of the groups of `height` stored rows that are scaled alike
    `each` whole ones, or one of the `parts` of one. It reads `ahead` tiles of `tile` rows before it
    adds them up, `steps` times for a group.
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
        """Enough programs, as long as each has something to read."""
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
        """Programs for the same outputs."""
        return self.groups // self.each * self.parts


def _kernel(
    number: Any, x: Any, weight: Any, *scales_and_sums: Any, tokens: int, cut: _Cut
) -> None:
    """One program: sums over some rows for some outputs."""
    *scales, sums = scales_and_sums
    split, expert, height = pl.program_id(1), number[0], cut.groups * cut.height
    column = pl.program_id(0) * cut.width
    columns = pl.ds(column, cut.width)
    there = column + jnp.arange(cut.width) < cut.outputs
    zeros = (jnp.zeros((cut.tile, cut.width), jnp.float32),) * tokens

    def add_tiles(step: Array, totals: tuple[Array, ...], *, group: Array) -> tuple[Array, ...]:
        first = (split % cut.parts * cut.steps + step) * cut.ahead
        starts = [(first + index) * cut.tile for index in range(cut.ahead)]
        insides = [start + jnp.arange(cut.tile) < cut.height for start in starts]
        rows = [group * cut.height + start for start in starts]
        tiles = []
        for row, inside in zip(rows, insides, strict=True):
            place = weight.at[pl.ds(expert * height + row, cut.tile), columns]
            tiles.append(_load(place, inside[:, None] & there[None]))
        for row, inside, tile in zip(rows, insides, tiles, strict=True):
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
        found = jax.lax.fori_loop(0, cut.steps, partial(add_tiles, group=group), zeros)
        for table in scales:
            (scale,) = _codes(_load(table.at[expert * cut.groups + group, columns], there))
            found = tuple(part * scale[None] for part in found)
        return tuple(total + part for total, part in zip(totals, found, strict=True))

    for token, total in enumerate(jax.lax.fori_loop(0, cut.each, add_group, zeros)):
        place = sums.at[split * tokens + token, columns]
        triton.store(place, jnp.sum(total, axis=0), mask=there)


def _load(part: Any, mask: Array) -> Array:
    found: Array = triton.load(part, mask=mask, other=jnp.zeros((), part.dtype))
    return found


def _codes(stored: Shaped[Array, "*any"]) -> list[Float[Array, "*any"]]:
    """What stored numbers mean: one each, or of a byte of int4 two, low nibble first.

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
