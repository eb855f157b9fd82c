"""Convert rows of a matrix from the stored to the wanted precision."""

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

_CONVERTED: Final = 2**19
"""Elements that are converted at a time: their floats stay in the cache."""

_Sink = Callable[[Slice, NDArray[Any]], None]
"""Receives a range of stored rows and the rows, which are valid only during the call."""


@dataclass(frozen=True, slots=True)
class Squares:
    """Sums of squares over values: of the rounding error, and of the values."""

    error: float = 0.0
    total: float = 0.0

    def __add__(self, other: Self) -> "Squares":
        return Squares(self.error + other.error, self.total + other.total)

    @property
    def relative_rms(self) -> float:
        """Root mean square error relative to the root mean square value, to three digits."""
        if not self.total:
            return 0.0
        return float(f"{np.sqrt(self.error / self.total):.3g}")


NOTHING: Final = Squares()


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Rows of one matrix of a weight, in its new storage."""

    tensor: LogicalTensor
    lead: tuple[int, ...]
    """The index of the matrix: of an expert, or empty."""
    rows: Slice
    """Inputs; in int4, pairs of inputs, in whole groups."""
    outputs: Slice
    align: int = 1
    """Ranges of rows begin at multiples of it; of a weight that is quantized, at its groups."""
    copied: int = 2**20
    """Elements that are copied at a time, without conversion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Values of some inputs: `weight * scale`."""

    inputs: Slice
    weight: NDArray[Any]
    """int8 or float32 `(inputs, outputs)`."""
    scale: NDArray[np.float32] | None
    """`(outputs,)`, for all these inputs; None for float32."""


def is_stored_alike(source: TensorSource, target: LogicalTensor) -> bool:
    """Whether the source stores a weight exactly as the target does."""
    return source.storage.weight(target.spec) == target


def convert(
    source: TensorSource, region: Region, sink: _Sink, *, scales: NDArray[Any] | None = None
) -> Squares:
    """Convert rows of a matrix, block by block and in order.

    Args:
        source: Has the values.
        region: The rows to make.
        sink: Receives the rows in their new storage.
        scales: Filled with the scales of a weight that is being quantized: bfloat16
            `(groups of the rows, outputs)`.

    Returns:
        The rounding error; not finite if a value is not, or is too large for its precision.

    Raises:
        CorruptCheckpointError: The source changed.
    """
    own = source.storage.weight(region.tensor.spec)
    with source.reading(own, region.lead, region.outputs) as read:
        if own == region.tensor:
            step = region.copied // (region.outputs[1] - region.outputs[0])
            step = max(region.align, step // region.align * region.align)
            for low in range(*region.rows, step):
                rows = (low, min(low + step, region.rows[1]))
                sink(rows, read(*rows))
            return NOTHING
        own_scales = _scales(source, own, region)
        with np.errstate(all="ignore"):  # values that are not finite show in the sums
            match region.tensor.precision:
                case Precision.INT4:
                    assert scales is not None
                    return _quantize(own, region, read, own_scales, sink, scales)
                case Precision.BFLOAT16:
                    return _round(own, region, read, own_scales, sink)
                case Precision.FLOAT32:
                    return _widen(own, region, read, own_scales, sink)
                case Precision.INT8:
                    raise AssertionError("int8 is only ever copied")


def _scales(source: TensorSource, own: LogicalTensor, region: Region) -> NDArray[Any] | None:
    """The source's scales for the region's outputs, all groups."""
    if not own.groups:
        return None
    stack = tuple((index, index + 1) for index in region.lead)
    tensor = source.storage.scales(own.spec)
    scales = source.read(tensor, (*stack, (0, own.groups), region.outputs))
    return scales.reshape(own.groups, -1)


def _blocks(
    own: LogicalTensor,
    region: Region,
    read: RowReader,
    scales: NDArray[Any] | None,
    *,
    align: int,
) -> Iterator[_Block]:
    """The values of a region, in order.

    Blocks begin and end at multiples of `align` inputs, and are in one scale group of the source.
    If its groups do not allow that, the values are float32.
    """
    is_packed = own.precision is Precision.INT4
    align = max(align, 2) if is_packed else align
    width = own.width if own.groups else own.spec.shape[-2]
    is_aligned = width % align == 0
    step = _CONVERTED // (region.outputs[1] - region.outputs[0])
    step = max(align, step // align * align)
    low, end = _inputs(region)
    while low < end:
        high = min(low + step, end, (low // width + 1) * width if is_aligned else end)
        if is_packed:  # a range may begin or end inside a pair
            weight = unpacked(read(low // 2, (high + 1) // 2))[low % 2 :][: high - low]
        else:
            weight = read(low, high)
        scale = None
        if scales is not None and is_aligned:
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
    sink: _Sink,
) -> Squares:
    """float32 represents every int8, int4 and bfloat16 value exactly."""
    total = 0.0
    for block in _blocks(own, region, read, scales, align=region.align):
        values = _floats(block)
        sink(block.inputs, values)
        total += sum_of_squares(values)
    return Squares(0.0, total)


def _round(
    own: LogicalTensor,
    region: Region,
    read: RowReader,
    scales: NDArray[Any] | None,
    sink: _Sink,
) -> Squares:
    squares = NOTHING
    for block in _blocks(own, region, read, scales, align=region.align):
        values = _floats(block)
        stored = rounded(values)
        sink(block.inputs, stored)
        change = stored.astype(np.float32)
        change -= values
        squares += Squares(sum_of_squares(change), sum_of_squares(values))
    return squares


def sum_of_squares(values: NDArray[np.float32]) -> float:
    """Of a matrix, without BLAS, which would start its own threads."""
    return float(np.einsum("io,io->", values, values))


def _quantize(
    own: LogicalTensor,
    region: Region,
    read: RowReader,
    scales: NDArray[Any] | None,
    sink: _Sink,
    out: NDArray[Any],
) -> Squares:
    """Four bits per weight, and a scale for every group of inputs."""
    group = region.tensor.width
    first = 2 * region.rows[0] // group
    squares = NOTHING
    for block in _blocks(own, region, read, scales, align=group):
        integers, steps = block.weight, block.scale
        if steps is None:
            integers, steps = to_int8_groups(block.weight, group)
        int4 = to_int4(integers, group=group)
        stored = (int4.steps * steps).astype(BFLOAT16)
        sink((block.inputs[0] // 2, block.inputs[1] // 2), int4.codes)
        out[block.inputs[0] // group - first : block.inputs[1] // group - first] = stored
        if block.scale is None:  # the intermediate int8 was rounded too
            change = unpacked(int4.codes).astype(np.float32)
            change *= np.repeat(stored.astype(np.float32), group, axis=0)
            change -= block.weight
            squares += Squares(sum_of_squares(change), sum_of_squares(block.weight))
        else:
            squares += _rounding_error(int4, steps, stored)
    return squares


def _rounding_error(int4: Int4, steps: NDArray[np.float32], stored: NDArray[Any]) -> Squares:
    """The error of quantizing integers with a scale, from the sums in `Int4`."""
    step, wide = steps.astype(np.float64), stored.astype(np.float64)
    total = int4.qq * step * step
    error = total - 2 * int4.qr * step * wide + int4.rr * wide * wide
    return Squares(max(float(error.sum()), 0.0), float(total.sum()))  # a NaN stays one
