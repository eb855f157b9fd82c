"""Arithmetic between precisions: dequantize, round to bfloat16, quantize to int4."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.pickles import BFLOAT16

_INTEGERS: Final = 2**19
"""Integers of int16 that are quantized at a time: they stay in the L2 cache, and each numpy call is
long enough for threads not to wait for each other."""

_LARGEST: Final = 7
"""The largest code of int4: codes are symmetric, so -8 is not used."""
_FACTORS: Final = (1.0, 0.9)
"""Candidates for code 7, as fractions of a group's largest magnitude. Relative RMS error of normal
values in groups of 64: 10.8 % with 1.0 and no fit, 10.1 with these two, 10.0 with any."""
_BITS: Final = 11
"""Fraction bits of a code before rounding: 7 / 0.9 plus a half fits int16."""
_HALF: Final = np.int16(1 << _BITS - 1)
_ROWS: Final = 64
"""Products of 128 and 7 that fit uint16 as a sum."""
_INVERSES: Final = (
    np.array([[0, *(_LARGEST << _BITS) / (np.arange(1, 129) * factor)] for factor in _FACTORS])
    .round()
    .astype(np.int16)
)
"""`(factors, 129)`: the factor from integers to codes, by largest magnitude of the group."""


# --- floats


def dequantised(
    weight: NDArray[np.int8], scales: NDArray[Any], *, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Multiply integers by the scales of their outputs; exact for bfloat16 scales.

    Args:
        weight: `(*lead, inputs, outputs)` int8; all inputs are in one scale group.
        scales: `(*lead, outputs)` bfloat16 or float32.
        out: Receives the result; a new array by default.

    Returns:
        `(*lead, inputs, outputs)` float32.
    """
    if out is None:
        out = np.empty(weight.shape, np.float32)
    assert out.shape == weight.shape
    np.copyto(out, weight)  # int8 * float32 is slower in numpy
    out *= scales.astype(np.float32)[..., None, :]
    return out


def rounded(values: NDArray[np.float32]) -> NDArray[Any]:
    """Round finite float32 to the nearest bfloat16, ties to even."""
    return values.astype(BFLOAT16)  # integer arithmetic is no faster


def to_int8_groups(
    values: NDArray[np.float32], group: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize floats by the largest magnitude of each group: the step before `to_int4`.

    Args:
        values: `(inputs, outputs)` float32, finite.
        group: Inputs per scale; divides the inputs.

    Returns:
        int8 values `(inputs, outputs)` in [-127, 127] and float32 scales `(groups, outputs)`.
    """
    inputs, outputs = values.shape
    groups = values.reshape(inputs // group, group, outputs)
    integers = np.empty(groups.shape, np.int8)
    largest = np.maximum(groups.max(axis=1), -groups.min(axis=1))
    scales = largest / np.float32(127)
    divisors = np.where(scales > 0, largest, np.float32(np.inf))  # a scale of 0 makes all values 0
    for block, result, divisor in zip(groups, integers, divisors, strict=True):
        ratios = block / divisor  # not times an inverse, which is infinite for tiny numbers
        ratios *= np.float32(127)
        np.rint(ratios, out=ratios)
        result[...] = ratios.astype(np.int8)
    return integers.reshape(inputs, outputs), scales


# --- int4


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4:
    """Integers in four bits, and sums that give the error for any step.

    With the scale s of the integers and the stored step S of a group,
    `sum((q * s - r * S) ** 2) == qq * s * s - 2 * qr * s * S + rr * S * S`.
    """

    codes: NDArray[np.uint8]
    """`(inputs // 2, outputs)`: row r holds the code of input 2r plus 8 in its low nibbles and that
    of input 2r + 1 in its high ones."""
    steps: NDArray[np.float32]
    """`(groups, outputs)`: the value of code 1 in units of the integers; 0 if all are 0."""
    qq: NDArray[np.float32]
    """`(groups, outputs)`: sums of squared integers; these three are exact integers."""
    qr: NDArray[np.float32]
    """`(groups, outputs)`: sums of integers times codes."""
    rr: NDArray[np.float32]
    """`(groups, outputs)`: sums of squared codes."""


def to_int4(values: NDArray[np.int8], *, group: int) -> Int4:
    """Quantize int8 to int4 with the step of least squared error among several candidates.

    Every candidate maps a fraction of the group's largest magnitude to code 7, rounds, saturates,
    and then takes the step that fits its codes best. The first candidate saturates nothing, so
    that the error is at most that of quantizing by the largest magnitude; in a single group it
    may be one hundredth larger, because rounding is in fixed point.

    Args:
        values: `(inputs, outputs)` int8; may be a view with any strides.
        group: Inputs per step: even, at most 1024, divides the inputs.

    Returns:
        Codes in [-7, 7], steps, and sums for the error.
    """
    inputs, outputs = values.shape
    assert group % 2 == 0
    assert inputs % group == 0
    assert group <= 1024  # noqa: PLR2004 (float32 is exact up to 128 ** 2 * 1024)
    count = inputs // group
    shape = (count, outputs)
    packed = np.empty((inputs // 2, outputs), np.uint8)
    steps, qq, qr, rr = np.empty((4, *shape), np.float32)
    groups = values.reshape(count, group, outputs)
    codes = packed.reshape(count, group // 2, outputs)
    width = min(outputs, max(1, _INTEGERS // group))
    height = max(1, _INTEGERS // (group * width))
    for down, across in _tiles(shape, (height, width)):
        block, place = groups[down, :, across], (down, across)
        integers = block.astype(np.int16)
        largest = np.abs(block).view(np.uint8).max(axis=1)  # 128 is its own negative in int8
        best = _best(integers, largest)
        qq[place] = _squares(integers)
        _, qr[place], rr[place] = best
        steps[place] = _steps(best)
        _round(integers, best[0].astype(np.int16), integers)
        codes[down, :, across] = _packed(integers)
    return Int4(codes=packed, steps=steps, qq=qq, qr=qr, rr=rr)


def unpacked(codes: NDArray[np.uint8]) -> NDArray[np.int8]:
    """The integers of int4 codes.

    Args:
        codes: `(rows, outputs)`: inputs 2r and 2r + 1 in the low and high nibbles of row r.

    Returns:
        `(2 * rows, outputs)` int8 in [-8, 7].
    """
    rows, outputs = codes.shape
    values = np.empty((rows, 2, outputs), np.uint8)
    np.bitwise_and(codes, 15, out=values[:, 0])
    np.right_shift(codes, 4, out=values[:, 1])
    values -= 8
    return values.reshape(2 * rows, outputs).view(np.int8)


def _best(integers: NDArray[np.int16], largest: NDArray[np.uint8]) -> NDArray[np.float32]:
    """`(3, groups, outputs)`: the factor whose codes fit best, and their `qr` and `rr`."""
    places = largest.astype(np.intp)
    codes = np.empty_like(integers)
    best: NDArray[np.float32] = np.empty((3, *largest.shape), np.float32)
    new = np.empty_like(best)
    _try(integers, _INVERSES[0].take(places), codes, best)
    gain = _steps(best) * best[1]
    for candidate in _INVERSES[1:]:
        _try(integers, candidate.take(places), codes, new)
        other = _steps(new) * new[1]
        new -= best
        new *= other > gain  # exact for integers, and faster than np.copyto(where=…)
        best += new
        np.maximum(gain, other, out=gain)
    return best


def _try(
    integers: NDArray[np.int16],
    inverses: NDArray[np.int16],
    codes: NDArray[np.int16],
    into: NDArray[np.float32],
) -> None:
    """Write a candidate's factor, `qr` and `rr` into `(3, groups, outputs)`."""
    _round(integers, inverses, codes)
    into[0] = inverses
    into[1] = _products(integers, codes)
    into[2] = _products(codes, codes)


def _steps(best: NDArray[np.float32]) -> NDArray[np.float32]:
    """The steps of best fit; times `qr`, the reduction of the squared error."""
    steps: NDArray[np.float32] = best[1] / np.maximum(best[2], np.float32(1))
    return steps


def _round(
    integers: NDArray[np.int16], inverses: NDArray[np.int16], codes: NDArray[np.int16]
) -> None:
    """Codes of `(groups, group, outputs)` integers, by the factor of each group and output."""
    np.multiply(integers, inverses[:, None, :], out=codes)
    codes += _HALF
    codes >>= _BITS
    codes.clip(-_LARGEST, _LARGEST, out=codes)  # np.minimum takes six times as long


def _products(left: NDArray[np.int16], right: NDArray[np.int16]) -> NDArray[np.float32]:
    """Sums over each group of nonnegative products: of an integer and its code."""
    sums: NDArray[np.float32] = np.zeros((left.shape[0], left.shape[2]), np.float32)
    for low in range(0, left.shape[1], _ROWS):
        rows = slice(low, low + _ROWS)
        # 16 bits are twice as fast as 32: a sum that overflows int16 is right in uint16
        sums += np.einsum("gij,gij->gj", left[:, rows], right[:, rows]).view(np.uint16)
    return sums


def _squares(integers: NDArray[np.int16]) -> NDArray[np.float32]:
    """Sums over each group of squares; no more than three of them fit 16 bits."""
    half = integers.shape[1] // 2
    squares = (integers * integers).view(np.uint16)
    pairs = squares[:, :half] + squares[:, half:]
    sums: NDArray[np.float32] = np.add.reduce(pairs, axis=1, dtype=np.float32)
    return sums


def _packed(codes: NDArray[np.int16]) -> NDArray[np.int16]:
    pairs = codes[:, 1::2] << 4
    pairs += codes[:, ::2]
    pairs += 0x88  # 8 on both
    return pairs


def _tiles(shape: tuple[int, ...], tile: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    (rows, columns), (height, width) = shape, tile
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))
