"""Rows of a matrix in the precision that is wanted, from whatever they are stored in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.quantization import (
    Int4,
    dequantised,
    rounded,
    to_int4,
    to_int8_groups,
    unpacked,
)
from grokctl.checkpoint.tensor_source import LogicalTensor, RowReader, TensorSource
from grokctl.model.placement import Slice
from grokctl.model.precision import Precision

_STORED: Final = 2**20
"""Elements that are copied as they are at a time."""
_CONVERTED: Final = 2**19
"""Elements that are converted at a time, so that their floats stay in the cache."""

Sink = Callable[[Slice, NDArray[Any]], None]
"""Takes a range of stored rows, and those rows, valid only meanwhile."""


@dataclass(frozen=True, slots=True)
class Squares:
    """Sums over values: what rounding changed, and what was there."""

    error: float = 0.0
    total: float = 0.0

    def __add__(self, other: Self) -> "Squares":
        return Squares(self.error + other.error, self.total + other.total)

    @property
    def relative_rms(self) -> float:
        """Root mean square error as a part of the root mean square value, to three digits."""
        if not self.total:
            return 0.0
        return float(f"{np.sqrt(self.error / self.total):.3g}")


NOTHING: Final = Squares()


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Rows of one matrix of a weight as it will be stored."""

    tensor: LogicalTensor
    lead: tuple[int, ...]
    """Which matrix: the number of an expert, or nothing."""
    rows: Slice
    """Inputs; of int4, pairs of them, in whole groups."""
    outputs: Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Values of some inputs: `weight * scale`."""

    inputs: Slice
    weight: NDArray[Any]
    """int8 or float32 `(inputs, outputs)`."""
    scale: NDArray[np.float32] | None
    """`(outputs,)`, of all these inputs; None for float32."""


def is_stored_alike(source: TensorSource, target: LogicalTensor) -> bool:
    """Whether the source holds a weight in just the form that is wanted."""
    return source.storage.weight(target.spec) == target


def convert(
    source: TensorSource, region: Region, sink: Sink, *, scales: NDArray[Any] | None = None
) -> Squares:
    """Make rows of a matrix, some at a time and in order.

    Args:
        source: Where the values are.
        region: What to make.
        sink: Receives the rows as they will be stored.
        scales: Filled with the scales of weights that are quantised now, bfloat16
            `(groups of the rows, outputs)`.

    Returns:
        What that changed; not finite where values are not, or are too large for their precision.

    Raises:
        CorruptCheckpointError: The source is not what it was.
    """
    own = source.storage.weight(region.tensor.spec)
    with source.reading(own, region.lead, region.outputs) as read:
        if own == region.tensor:
            step = max(1, _STORED // (region.outputs[1] - region.outputs[0]))
            for low in range(*region.rows, step):
                rows = (low, min(low + step, region.rows[1]))
                sink(rows, read(*rows))
            return NOTHING
        found = _scales(source, own, region)
        with np.errstate(all="ignore"):  # what is not finite shows in the sums
            match region.tensor.precision:
                case Precision.INT4:
                    assert scales is not None
                    return _quantise(own, region, read, found, sink, scales)
                case Precision.BFLOAT16:
                    return _round(own, region, read, found, sink)
                case Precision.FLOAT32:
                    return _widen(own, region, read, found, sink)
                case Precision.INT8:
                    raise AssertionError("int8 is only ever copied")


def _scales(source: TensorSource, own: LogicalTensor, region: Region) -> NDArray[Any] | None:
    """All groups of the source's own scales, for the region's outputs."""
    if not own.groups:
        return None
    stack = tuple((number, number + 1) for number in region.lead)
    tensor = source.storage.scales(own.spec)
    found = source.read(tensor, (*stack, (0, own.groups), region.outputs))
    return found.reshape(own.groups, -1)


def _blocks(
    own: LogicalTensor,
    region: Region,
    read: RowReader,
    scales: NDArray[Any] | None,
    *,
    align: int,
) -> Iterator[_Block]:
    """Values of a region, in order.

    Blocks begin and end at inputs that are multiples of `align`, and lie in one scale group of the
    source. Where its groups do not allow that, values come as float32.
    """
    is_packed = own.precision is Precision.INT4
    align = max(align, 2) if is_packed else align
    width = own.width if own.groups else own.spec.shape[-2]
    is_apart = width % align == 0
    step = _CONVERTED // (region.outputs[1] - region.outputs[0])
    step = max(align, step // align * align)
    low, end = _inputs(region)
    while low < end:
        high = min(low + step, end, (low // width + 1) * width if is_apart else end)
        if is_packed:  # a range may begin or end within a pair
            weight = unpacked(read(low // 2, (high + 1) // 2))[low % 2 :][: high - low]
        else:
            weight = read(low, high)
        scale = None
        if scales is not None and is_apart:
            scale = scales[low // width].astype(np.float32)
        elif scales is not None:
            weight = weight * scales[np.arange(low, high) // width].astype(np.float32)
        else:
            weight = weight.astype(np.float32, copy=False)
        yield _Block(inputs=(low, high), weight=weight, scale=scale)
        low = high


def _inputs(region: Region) -> Slice:
    if region.tensor.precision is Precision.INT4:
        return (2 * region.rows[0], 2 * region.rows[1])
    return region.rows


def _floats(block: _Block) -> NDArray[np.float32]:
    if block.scale is not None:
        return dequantised(block.weight, block.scale)
    return block.weight


def _widen(
    own: LogicalTensor,
    region: Region,
    read: RowReader,
    scales: NDArray[Any] | None,
    sink: Sink,
) -> Squares:
    """float32 holds every int8, int4 and bfloat16 value exactly."""
    total = 0.0
    for block in _blocks(own, region, read, scales, align=1):
        values = _floats(block)
        sink(block.inputs, values)
        total += _sum_of_squares(values)
    return Squares(0.0, total)


def _round(
    own: LogicalTensor,
    region: Region,
    read: RowReader,
    scales: NDArray[Any] | None,
    sink: Sink,
) -> Squares:
    squares = NOTHING
    for block in _blocks(own, region, read, scales, align=1):
        values = _floats(block)
        stored = rounded(values)
        sink(block.inputs, stored)
        change = stored.astype(np.float32)
        change -= values
        squares += Squares(_sum_of_squares(change), _sum_of_squares(values))
    return squares


def _sum_of_squares(values: NDArray[np.float32]) -> float:
    """Not with BLAS, which would start threads of its own."""
    return float(np.einsum("io,io->", values, values))


def _quantise(
    own: LogicalTensor,
    region: Region,
    read: RowReader,
    scales: NDArray[Any] | None,
    sink: Sink,
    out: NDArray[Any],
) -> Squares:
    """Four bits a weight, with the scale of every group of inputs."""
    group = region.tensor.width
    first = 2 * region.rows[0] // group
    squares = NOTHING
    for block in _blocks(own, region, read, scales, align=group):
        integers, steps = block.weight, block.scale
        if steps is None:
            integers, steps = to_int8_groups(block.weight, group)
        found = to_int4(integers, group=group)
        stored = (found.steps * steps).astype(BFLOAT16)
        sink((block.inputs[0] // 2, block.inputs[1] // 2), found.codes)
        out[block.inputs[0] // group - first : block.inputs[1] // group - first] = stored
        if block.scale is None:  # the int8 on the way was rounded too
            change = unpacked(found.codes).astype(np.float32)
            change *= np.repeat(stored.astype(np.float32), group, axis=0)
            change -= block.weight
            squares += Squares(_sum_of_squares(change), _sum_of_squares(block.weight))
        else:
            squares += _lost(found, steps, stored)
    return squares


def _lost(found: Int4, steps: NDArray[np.float32], stored: NDArray[Any]) -> Squares:
    """What quantising integers with a scale changed, from sums that are there already."""
    step, wide = steps.astype(np.float64), stored.astype(np.float64)
    total = found.qq * step * step
    error = total - 2 * found.qr * step * wide + found.rr * wide * wide
    return Squares(max(float(error.sum()), 0.0), float(total.sum()))  # a NaN stays one
