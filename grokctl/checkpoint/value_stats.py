"""Statistics of stored tensors, read block by block; and a search for unusual values."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod, sqrt
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.pickle_objects import ArrayRef
from grokctl.checkpoint.quantization import unpacked
from grokctl.checkpoint.rows import read_into

CELLS: Final = 16
"""Bins of |q|, eight integers each: 0 to 7, …, 120 to 127; -128, never written, is in the last."""
_LARGEST_INTEGER: Final = 127
_BLOCK: Final = 4 * 2**20
"""Bytes read at a time."""
_CACHED: Final = 2**20
"""Bytes per histogram; measured: with four times as many it takes a third longer."""
_TILE: Final = (128, 1024)
"""Rows and columns converted to float32 at a time: small enough for a cache, and for exact float32
sums of squares of integers up to 128."""
_MOST_RANGES: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class OddValues:
    """Values that are unusual for an array: facts about a file, not damage to it."""

    nonfinite: int = 0
    """Infinities and NaN: arithmetic with them has no result."""
    zeros: int = 0
    negative: int = 0
    subnormal: int = 0
    index: tuple[int, ...] = ()
    """Index of the first one in its array."""
    value: float = 0.0
    """The first one."""
    ranges: tuple[tuple[int, int], ...] = ()
    """Byte ranges of the file, half open; a single range if they are scattered."""

    @property
    def count(self) -> int:
        """How many there are."""
        return self.nonfinite + self.zeros + self.negative + self.subnormal

    def __str__(self) -> str:
        """Such as `3 values of 0, 1 value not finite`."""
        kinds = (
            (self.nonfinite, "not finite"),
            (self.zeros, "of 0"),
            (self.negative, "below 0"),
            (self.subnormal, "subnormal"),
        )
        return ", ".join(
            f"{count:,} {'value' if count == 1 else 'values'} {kind}"
            for count, kind in kinds
            if count
        )


def find_odd(
    path: Path, ref: ArrayRef, *, is_scales: bool = False, is_norm: bool = False
) -> OddValues | None:
    """Find infinities and NaN; in norms also zeros; in scales all but positive normal numbers.

    Reads only the bytes of the array, in blocks; nothing is mapped, so that a shrinking file or a
    bad sector is an error and not a signal.

    Args:
        path: The tensor's file.
        ref: A float32 or bfloat16 array in it.
        is_scales: Whether it has the scales of a weight.
        is_norm: Whether it is the weight of a norm.

    Raises:
        OSError: The file cannot be read, or ends early.
    """
    size = ref.dtype.itemsize
    bits = np.dtype(f"<u{size}")
    infinity = bits.type(0x7F80 << 8 * (size - 2))
    smallest = bits.type(0x0080 << 8 * (size - 2))
    odd, ranges = OddValues(), _Ranges()
    with path.open("rb", buffering=0) as file:
        for offset, nbytes in _spans(ref.offset, ref.nbytes):
            block = _read(file.fileno(), offset, nbytes).view(bits)
            # smaller ones and negative numbers wrap around to above infinity
            is_odd = (
                block - smallest >= infinity - smallest
                if is_scales
                else block & infinity == infinity
            )
            if is_norm:
                is_odd |= block << 1 == 0  # of either sign
            places = np.flatnonzero(is_odd)
            if not places.size:
                continue
            with np.errstate(invalid="ignore"):  # a NaN may be signaling
                values = block.view(ref.dtype)[places].astype(np.float64)
            if not odd.count:
                first = (offset - ref.offset) // size + int(places[0])
                index = tuple(map(int, np.unravel_index(first, ref.shape)))
                odd = replace(odd, index=index, value=float(values[0]))
            odd = _counted(odd, values)
            ranges.add(places, offset, size)
    return replace(odd, ranges=tuple(ranges.joined)) if odd.count else None


def _counted(odd: OddValues, values: NDArray[np.float64]) -> OddValues:
    """Count more unusual values, each in one way."""
    is_finite = np.isfinite(values)
    nonfinite = values.size - int(np.count_nonzero(is_finite))
    zeros = int(np.count_nonzero(values == 0))
    negative = int(np.count_nonzero(values[is_finite] < 0))
    return replace(
        odd,
        nonfinite=odd.nonfinite + nonfinite,
        zeros=odd.zeros + zeros,
        negative=odd.negative + negative,
        subnormal=odd.subnormal + values.size - nonfinite - zeros - negative,
    )


class _Ranges:
    """Byte ranges, joined if they touch; too many of them become one."""

    def __init__(self) -> None:
        self.joined: list[tuple[int, int]] = []
        self._is_scattered = False

    def add(self, places: NDArray[np.intp], offset: int, size: int) -> None:
        breaks = np.flatnonzero(np.diff(places) != 1)
        lows = [int(places[0]), *map(int, places[breaks[:_MOST_RANGES] + 1])]
        highs = [*map(int, places[breaks[:_MOST_RANGES]]), int(places[-1])]
        for low, high in zip(lows, highs, strict=True):
            start, stop = offset + low * size, offset + (high + 1) * size
            if self.joined and self.joined[-1][1] == start:
                self.joined[-1] = (self.joined[-1][0], stop)
            else:
                self.joined.append((start, stop))
        self._is_scattered |= len(self.joined) > _MOST_RANGES
        if self._is_scattered:
            self.joined = [(self.joined[0][0], self.joined[-1][1])]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueStats:
    """Statistics of the values of one or several tensors; `+` combines two."""

    count: int = 0
    nonfinite: int = 0
    """Infinities and NaN, which are not in the statistics below."""
    minimum: float = float("inf")
    maximum: float = float("-inf")
    squares: float = 0.0
    """Sum of squares of the dequantized values."""
    integers: int = 0
    """Number of values that are stored as int8."""
    zeros: int = 0
    """Integers that are 0."""
    saturated: int = 0
    """Integers at the ends of their range."""
    lowest: int = 0
    """Integers that are -128, which no symmetric quantization writes."""
    zero_scales: int = 0
    negative_scales: int = 0
    zero_values: int = 0
    """Zeros in an array without scales."""
    cells: tuple[int, ...] = field(default=(0,) * CELLS)
    """Integers by magnitude, see `CELLS`."""

    def __add__(self, other: "ValueStats") -> "ValueStats":
        return ValueStats(
            count=self.count + other.count,
            nonfinite=self.nonfinite + other.nonfinite,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            squares=self.squares + other.squares,
            integers=self.integers + other.integers,
            zeros=self.zeros + other.zeros,
            saturated=self.saturated + other.saturated,
            lowest=self.lowest + other.lowest,
            zero_scales=self.zero_scales + other.zero_scales,
            negative_scales=self.negative_scales + other.negative_scales,
            zero_values=self.zero_values + other.zero_values,
            cells=tuple(map(sum, zip(self.cells, other.cells, strict=True))),
        )

    @property
    def rms(self) -> float:
        """Root mean square of the finite values."""
        finite = self.count - self.nonfinite
        return sqrt(self.squares / finite) if finite else 0.0


_Read = Callable[[int, int], NDArray[np.uint8]]
"""Reads bytes: offset, count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredValues:
    """The place of a tensor's values: plain, int8 or packed int4 with scales."""

    path: Path
    array: ArrayRef
    """`(*lead, inputs, outputs)`; uint8 has two inputs per byte, see `quantization.unpacked`."""
    scales: ArrayRef | None = None
    """`(*lead, groups, outputs)`."""
    read: _Read | None = None
    """Reads the file; None to read it directly."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(scale vectors, rows, columns)` in the order of the file."""
        if self.scales is None:
            return 1, 1, prod(self.array.shape)
        *lead, outputs = self.scales.shape
        vectors = prod(lead)
        return vectors, prod(self.array.shape) // (vectors * outputs), outputs

    def parts(self) -> "Iterator[Part]":
        """Divide into parts of a few megabytes that can be read independently."""
        vectors, rows, columns = self.shape
        limit = _BLOCK // self.array.dtype.itemsize
        height, width = max(1, limit // columns), min(columns, limit)
        for vector in range(vectors):
            for row in range(0, rows, height):
                for column in range(0, columns, width):
                    yield Part(
                        of=self,
                        vector=vector,
                        rows=(row, min(row + height, rows)),
                        columns=(column, min(column + width, columns)),
                    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Consecutive values of one tensor: whole rows, or a part of one."""

    of: StoredValues
    vector: int
    """Index of the vector of scales."""
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the values, without their scales."""
        return prod(high - low for low, high in (self.rows, self.columns)) * self._itemsize

    @property
    def _itemsize(self) -> int:
        return self.of.array.dtype.itemsize

    def stats(self) -> ValueStats:
        """Read every value.

        Raises:
            OSError: The file cannot be read, or ends early.
        """
        if self.of.read is not None:
            return self._stats(self.of.read)
        with self.of.path.open("rb", buffering=0) as file:
            return self._stats(partial(_read, file.fileno()))

    def _stats(self, read: _Read) -> ValueStats:
        _, rows, columns = self.of.shape
        (top, bottom), (left, right) = self.rows, self.columns
        start = ((self.vector * rows + top) * columns + left) * self._itemsize
        data = read(self.of.array.offset + start, self.nbytes)
        block = data.view(self.of.array.dtype).reshape(bottom - top, right - left)
        scales = self.of.scales
        if scales is None:
            return _stats_of_floats(block.reshape(-1))
        size = scales.dtype.itemsize
        place = scales.offset + (self.vector * columns + left) * size
        factors = read(place, (right - left) * size).view(scales.dtype)
        with np.errstate(invalid="ignore"):  # a NaN may be signaling
            wide = factors.astype(np.float64)
        if block.dtype == np.uint8:
            stats, empty = (
                self._of_scales(_stats_of_integers(unpacked(block), wide), wide),
                ValueStats(),
            )
            return replace(  # the use of int8's range does not apply to four bits
                stats,
                integers=empty.integers,
                zeros=empty.zeros,
                saturated=empty.saturated,
                lowest=empty.lowest,
                cells=empty.cells,
            )
        return self._of_scales(_stats_of_integers(block, wide), wide)

    def _of_scales(self, stats: ValueStats, scales: NDArray[np.float64]) -> ValueStats:
        """Count the scales with the first rows that have them."""
        if self.rows[0]:
            return stats
        return replace(
            stats,
            zero_scales=int(np.count_nonzero(scales == 0)),
            negative_scales=int(np.count_nonzero(scales < 0)),
        )


def _stats_of_floats(values: NDArray[Any]) -> ValueStats:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return ValueStats(count=values.size, nonfinite=values.size)
    wide = finite.astype(np.float64)
    return ValueStats(
        count=values.size,
        nonfinite=values.size - finite.size,
        minimum=float(finite.min()),
        maximum=float(finite.max()),
        squares=float((wide * wide).sum()),
        zero_values=finite.size - int(np.count_nonzero(finite)),
    )


def _stats_of_integers(block: NDArray[np.int8], scales: NDArray[Any]) -> ValueStats:
    """Statistics of `block * scales`, with one scale for each column."""
    is_finite = np.isfinite(scales)  # those of a ready checkpoint are not checked
    factors = np.where(is_finite, scales, 0.0)
    ends = np.stack([block.min(axis=0), block.max(axis=0)])[:, is_finite] * scales[is_finite]
    saturated, lowest, cells = _use(block.reshape(-1))
    return ValueStats(
        count=block.size,
        nonfinite=block.size // scales.size * int(np.count_nonzero(~is_finite)),
        minimum=float(ends.min(initial=np.inf)),
        maximum=float(ends.max(initial=-np.inf)),
        # not np.dot: the threads of BLAS would take twice the time of all the rest
        squares=float((_square_sums(block) * factors * factors).sum()),
        integers=block.size,
        zeros=block.size - int(np.count_nonzero(block)),
        saturated=saturated,
        lowest=lowest,
        cells=cells,
    )


def _use(integers: NDArray[np.int8]) -> tuple[int, int, tuple[int, ...]]:
    """The number of saturated integers, of those that are -128, and the number in each cell.

    Counts four at a time: two cells make a byte, and two bytes an index.
    """
    saturated = lowest = 0
    counts: NDArray[np.int64] = np.zeros(CELLS**4, np.int64)
    rest: NDArray[np.int64] = np.zeros(CELLS, np.int64)
    for start in range(0, integers.size, _CACHED):
        size = np.abs(integers[start : start + _CACHED]).view(np.uint8)  # 128 stays 128
        largest = size.max()
        if largest == 0:  # a hole: counting the same cell again and again is slowest
            rest[0] += size.size
            continue
        if largest > _LARGEST_INTEGER:
            lowest += int(np.count_nonzero(size > _LARGEST_INTEGER))
            np.minimum(size, _LARGEST_INTEGER, out=size)
        saturated += int(np.count_nonzero(size == _LARGEST_INTEGER))
        size >>= 3  # eight magnitudes to a cell
        whole = size.size // 4 * 4
        pairs = size[:whole].view(np.uint16)
        counts += np.bincount((pairs | pairs >> 4).astype(np.uint8).view(np.uint16), None, CELLS**4)
        rest += np.bincount(size[whole:], None, CELLS)
    fours = counts.reshape((CELLS,) * 4)
    totals = rest + sum(fours.sum(axis=tuple({0, 1, 2, 3} - {axis})) for axis in range(4))
    return saturated, lowest, tuple(totals.tolist())


def _square_sums(block: NDArray[np.int8]) -> NDArray[np.float64]:
    """Exact sums of squares of each column, tile by tile."""
    rows, columns = block.shape
    sums: NDArray[np.float64] = np.zeros(columns)
    height, width = _TILE
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            wide = block[top : top + height, left : left + width].astype(np.float32)
            sums[left : left + width] += np.einsum("ij,ij->j", wide, wide)
    return sums


def _spans(offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
    for low in range(0, nbytes, _BLOCK):
        yield offset + low, min(_BLOCK, nbytes - low)


def _read(handle: int, offset: int, nbytes: int) -> NDArray[np.uint8]:
    data: NDArray[np.uint8] = np.empty(nbytes, np.uint8)
    read_into(data, handle, offset)
    return data
