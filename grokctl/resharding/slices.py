"""Which arrays a reshard makes, in which order, and to which device files parts of them go."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.frames import FRAME
from grokctl.checkpoint.layout import DeviceLayout
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.tensor_source import LogicalTensor, Slices, TensorSource, chunks, extent
from grokctl.model.placement import Slice
from grokctl.model.precision import Precision
from grokctl.resharding.convert import NOTHING, Region, Squares, convert, is_stored_alike


@dataclass(frozen=True, slots=True)
class Made:
    """What comes with an array."""

    squares: Squares = NOTHING
    scales: NDArray[Any] | None = None
    """bfloat16 `(groups, outputs)` of all outputs, of a weight that is quantised now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """An array that is made once: rows of one matrix, or any part that is copied as it is.

    The outputs of each device follow each other, `(rows, its outputs)`, so that what a device gets
    continues its file: cuts of a tensor come in the order of every file.
    """

    tensor: LogicalTensor
    slices: Slices
    """Of the tensor as it is stored, with the outputs of all devices."""
    devices: Mapping[int, Slice]
    """Which outputs each device gets; of a part that is copied as it is, all."""

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return prod(extent(self.slices)) * self.tensor.dtype.itemsize

    @property
    def places(self) -> Mapping[Slice, Slice]:
        """Where in the array the outputs of each device begin and end, bytes."""
        wanted = sorted(set(self.devices.values()))
        row = self.nbytes // (self.slices[-1][1] - self.slices[-1][0])
        found, begin = {}, 0
        for outputs in wanted:
            end = begin + row * (outputs[1] - outputs[0])
            found[outputs] = (begin, end)
            begin = end
        return found

    def frame_nbytes(self, outputs: Slice) -> int:
        """Bytes of a frame of what a device gets."""
        if not self.tensor.is_matrix:
            return self.nbytes
        rows = unit_of(self.tensor, self.devices.values())
        return rows * (outputs[1] - outputs[0]) * self.tensor.dtype.itemsize

    @property
    def scales_slices(self) -> Slices:
        """Of a weight that is quantised now: which part of its scales comes with it."""
        *lead, (first, last), outputs = self.slices
        half = self.tensor.width // 2
        return (*lead, (first // half, last // half), outputs)

    def make(self, source: TensorSource, memory: NDArray[np.uint8]) -> Made:
        """Fill an array.

        Args:
            source: Where the values are.
            memory: As many bytes as it has.
        """
        if self.tensor.is_matrix:
            return self._convert(source, memory)
        out = memory.view(self.tensor.dtype).reshape(extent(self.slices))
        if are_made_together(source, self.tensor):
            self._quantised_scales(source, out)
        else:
            out[...] = source.read(self.tensor, self.slices)
        with np.errstate(all="ignore"):  # a sum is finite only if all of it is
            sound = float(np.abs(out).sum(dtype=np.float64))
        return Made(Squares(0.0, sound))

    def _convert(self, source: TensorSource, memory: NDArray[np.uint8]) -> Made:
        *lead, rows, outputs = self.slices
        region = Region(
            tensor=self.tensor, lead=tuple(low for low, _ in lead), rows=rows, outputs=outputs
        )
        left = outputs[0]
        places = {
            (low - left, high - left): memory[begin:end]
            .view(self.tensor.dtype)
            .reshape(rows[1] - rows[0], high - low)
            for (low, high), (begin, end) in self.places.items()
        }

        def put(some: Slice, found: NDArray[Any]) -> None:
            for (low, high), out in places.items():
                out[some[0] - rows[0] : some[1] - rows[0]] = found[:, low:high]

        scales = None
        if self.tensor.groups and not is_stored_alike(source, self.tensor):
            scales = np.empty(extent(self.scales_slices)[-2:], BFLOAT16)
        return Made(convert(source, region, put, scales=scales), scales)

    def _quantised_scales(self, source: TensorSource, out: NDArray[Any]) -> None:
        """Scales alone, where a run goes on between a weight and them."""
        weight = _weight_of(self.tensor)
        *lead, (first, last), outputs = self.slices
        half = weight.width // 2
        for index in np.ndindex(out.shape[:-2]):
            numbers = (low + number for (low, _), number in zip(lead, index, strict=True))
            region = Region(
                tensor=weight,
                lead=tuple(numbers),
                rows=(first * half, last * half),
                outputs=outputs,
            )
            convert(source, region, lambda _rows, _found: None, scales=out[index])


def are_made_together(source: TensorSource, scales: LogicalTensor) -> bool:
    """Whether these are scales that come from quantising their weight, not from the source."""
    return scales.is_scales and not is_stored_alike(source, _weight_of(scales))


def _weight_of(scales: LogicalTensor) -> LogicalTensor:
    return replace(scales, is_scales=False)


def cuts_of(layouts: Sequence[DeviceLayout], index: int, *, limit: int) -> Iterator[Cut]:
    """What is made of one tensor.

    Args:
        layouts: Of the devices whose files are written; all hold the same tensors in one order.
        index: The tensor's place in them.
        limit: Bytes of an array; what has to be made at once may be more: a row, a frame of
            every device's, an int4 group.
    """
    tensor = layouts[0].tensors[index].tensor
    held = {layout.device: layout.tensors[index].slices for layout in layouts}
    if tensor.is_matrix:
        yield from _matrices(tensor, held, limit)
    else:
        yield from _parts(tensor, held, limit)


def _parts(tensor: LogicalTensor, held: Mapping[int, Slices], limit: int) -> Iterator[Cut]:
    """Parts that are copied as they are, the devices taking turns; equal ones are made once."""
    sharing: dict[Slices, list[int]] = {}
    for device, slices in held.items():
        sharing.setdefault(slices, []).append(device)
    size = min(limit, FRAME)
    queues = [
        (devices, list(chunks(slices, itemsize=tensor.dtype.itemsize, limit=size)))
        for slices, devices in sharing.items()
    ]
    for turn in range(max(len(parts) for _, parts in queues)):
        for devices, parts in queues:
            if turn < len(parts):
                part = parts[turn]
                yield Cut(tensor=tensor, slices=part, devices=dict.fromkeys(devices, part[-1]))


def _matrices(tensor: LogicalTensor, held: Mapping[int, Slices], limit: int) -> Iterator[Cut]:
    """Rows of one matrix of the stack after the other, for all devices that want these rows."""
    stack = [
        range(min(low for low, _ in axis), max(high for _, high in axis))
        for axis in zip(*(slices[:-2] for slices in held.values()), strict=True)
    ]
    for index in product(*stack):
        sharing: dict[Slice, dict[int, Slice]] = {}
        for device, (*lead, rows, outputs) in held.items():
            if all(low <= at < high for at, (low, high) in zip(index, lead, strict=True)):
                sharing.setdefault(rows, {})[device] = outputs
        at_index = [(at, at + 1) for at in index]
        for rows, wanted in sharing.items():
            for outputs, devices in _touching(wanted):
                for part in _runs(tensor, rows, outputs, devices, limit):
                    slices = (*at_index, part, outputs)
                    yield Cut(tensor=tensor, slices=slices, devices=devices)


def _touching(wanted: Mapping[int, Slice]) -> Iterator[tuple[Slice, dict[int, Slice]]]:
    """Ranges of outputs without a gap, and who wants some of each."""
    begin = end = -1
    devices: dict[int, Slice] = {}
    for device, (low, high) in sorted(wanted.items(), key=lambda item: item[1]):
        if devices and low > end:
            yield (begin, end), devices
            devices = {}
        begin = begin if devices else low
        devices[device] = (low, high)
        end = high
    yield (begin, end), devices


def _runs(
    tensor: LogicalTensor, rows: Slice, outputs: Slice, devices: Mapping[int, Slice], limit: int
) -> Iterator[Slice]:
    """Ranges of rows, each a whole number of frames of every device's file and of int4 groups."""
    unit = unit_of(tensor, devices.values())
    row = (outputs[1] - outputs[0]) * tensor.dtype.itemsize
    step = max(1, limit // row // unit) * unit
    for low in range(*rows, step):
        yield low, min(low + step, rows[1])


def unit_of(tensor: LogicalTensor, outputs: Iterable[Slice]) -> int:
    """Rows of a frame of a device's file: whole int4 groups; the same however work is cut."""
    row = max(high - low for low, high in outputs) * tensor.dtype.itemsize
    group = tensor.width // 2 if tensor.precision is Precision.INT4 else 1
    return max(1, FRAME // row // group) * group
