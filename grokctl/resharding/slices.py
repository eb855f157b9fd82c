"""The arrays that a reshard makes, their order, and the device files that get parts of them."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.frames import FRAME, Compression
from grokctl.checkpoint.layout import DeviceLayout
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.tensor_source import LogicalTensor, Slices, TensorSource, chunks, extent
from grokctl.model.placement import Slice
from grokctl.model.precision import Precision
from grokctl.resharding.convert import Region, Squares, convert, is_stored_alike
from grokctl.resharding.output import Frame, KeptScales, PieceResult, frames_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """An array that is made once: rows of one matrix, or any part that is copied unchanged.

    The outputs of each device are contiguous, `(rows, its outputs)`, so that they can be appended
    to its file: the cuts of a tensor are in the order of every file.
    """

    tensor: LogicalTensor
    slices: Slices
    """Of the tensor as stored, with the outputs of all devices."""
    devices: Mapping[int, Slice]
    """Device -> the outputs that it gets; all of them if the part is copied unchanged."""

    @property
    def key(self) -> str:
        """The name of its tensor."""
        return self.tensor.key

    @property
    def files(self) -> Collection[int]:
        """The devices whose files get a part of it."""
        return self.devices.keys()

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return prod(extent(self.slices)) * self.tensor.dtype.itemsize

    @property
    def places(self) -> Mapping[Slice, Slice]:
        """Outputs of some device -> where they begin and end in the array, in bytes."""
        wanted = sorted(set(self.devices.values()))
        row = self.nbytes // (self.slices[-1][1] - self.slices[-1][0])
        places, begin = {}, 0
        for outputs in wanted:
            end = begin + row * (outputs[1] - outputs[0])
            places[outputs] = (begin, end)
            begin = end
        return places

    def frame_nbytes(self, outputs: Slice) -> int:
        """Bytes per frame of a device that gets these outputs."""
        if not self.tensor.is_matrix:
            return self.nbytes
        rows = _frame_rows(self.tensor, self.devices.values())
        return rows * (outputs[1] - outputs[0]) * self.tensor.dtype.itemsize

    @property
    def scales_slices(self) -> Slices:
        """The part of its scales that a weight comes with when it is quantized."""
        *lead, (first, last), outputs = self.slices
        half = self.tensor.width // 2
        return (*lead, (first // half, last // half), outputs)

    def frames(
        self, memory: memoryview, compression: Compression | None
    ) -> Mapping[int, list[Frame]]:
        """What each device's file gets of a filled array; made once for all with these outputs."""
        made = {
            outputs: frames_of(memory[begin:end], self.frame_nbytes(outputs), compression)
            for outputs, (begin, end) in self.places.items()
        }
        return {device: made[outputs] for device, outputs in self.devices.items()}

    def make(self, source: TensorSource, memory: NDArray[np.uint8]) -> PieceResult:
        """Fill an array.

        Args:
            source: Has the values.
            memory: The bytes of the array.
        """
        if self.tensor.is_matrix:
            return self._convert(source, memory)
        out = memory.view(self.tensor.dtype).reshape(extent(self.slices))
        if is_scales_of_quantized(source, self.tensor):
            self._quantize_scales(source, out)
        else:
            out[...] = source.read(self.tensor, self.slices)
        with np.errstate(all="ignore"):  # the sum is finite only if every value is
            total = float(np.abs(out).sum(dtype=np.float64))
        return PieceResult(Squares(0.0, total))

    def _convert(self, source: TensorSource, memory: NDArray[np.uint8]) -> PieceResult:
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

        def put(done: Slice, block: NDArray[Any]) -> None:
            for (low, high), out in places.items():
                out[done[0] - rows[0] : done[1] - rows[0]] = block[:, low:high]

        scales = None
        if self.tensor.groups and not is_stored_alike(source, self.tensor):
            scales = np.empty(extent(self.scales_slices)[-2:], BFLOAT16)
        squares = convert(source, region, put, scales=scales)
        if scales is None:
            return PieceResult(squares)
        of_weight = replace(self.tensor, is_scales=True)
        return PieceResult(squares, KeptScales(of_weight, self.scales_slices, scales))

    def _quantize_scales(self, source: TensorSource, out: NDArray[Any]) -> None:
        """Make scales alone, when a run continues between a weight and its scales."""
        weight = _weight_of(self.tensor)
        *lead, (first, last), outputs = self.slices
        half = weight.width // 2
        for index in np.ndindex(out.shape[:-2]):
            matrix = tuple(low + place for (low, _), place in zip(lead, index, strict=True))
            region = Region(
                tensor=weight,
                lead=matrix,
                rows=(first * half, last * half),
                outputs=outputs,
            )
            convert(source, region, lambda _rows, _block: None, scales=out[index])


def is_scales_of_quantized(source: TensorSource, scales: LogicalTensor) -> bool:
    """Whether these scales come from quantizing their weight, not from the source."""
    return scales.is_scales and not is_stored_alike(source, _weight_of(scales))


def _weight_of(scales: LogicalTensor) -> LogicalTensor:
    return replace(scales, is_scales=False)


def cuts_of(layouts: Sequence[DeviceLayout], index: int, *, limit: int) -> Iterator[Cut]:
    """The cuts of one tensor.

    Args:
        layouts: Of the device files that are written; all have the same tensors in one order.
        index: The tensor's place in that order.
        limit: Bytes of an array; more if one row, one frame of every device or one int4 group is
            larger.
    """
    tensor = layouts[0].tensors[index].tensor
    parts = {layout.device: layout.tensors[index].slices for layout in layouts}
    if tensor.is_matrix:
        yield from _matrix_cuts(tensor, parts, limit)
    else:
        yield from _copied_cuts(tensor, parts, limit)


def _copied_cuts(tensor: LogicalTensor, parts: Mapping[int, Slices], limit: int) -> Iterator[Cut]:
    """Parts that are copied unchanged, devices taking turns; equal parts are made once."""
    sharing: dict[Slices, list[int]] = {}
    for device, slices in parts.items():
        sharing.setdefault(slices, []).append(device)
    size = min(limit, FRAME)
    queues = [
        (devices, list(chunks(slices, itemsize=tensor.dtype.itemsize, limit=size)))
        for slices, devices in sharing.items()
    ]
    for turn in range(max(len(queue) for _, queue in queues)):
        for devices, queue in queues:
            if turn < len(queue):
                part = queue[turn]
                yield Cut(tensor=tensor, slices=part, devices=dict.fromkeys(devices, part[-1]))


def _matrix_cuts(tensor: LogicalTensor, parts: Mapping[int, Slices], limit: int) -> Iterator[Cut]:
    """Rows of one matrix after the other, for all devices that need these rows."""
    stack = [
        range(min(low for low, _ in axis), max(high for _, high in axis))
        for axis in zip(*(slices[:-2] for slices in parts.values()), strict=True)
    ]
    for index in product(*stack):
        sharing: dict[Slice, dict[int, Slice]] = {}
        for device, (*lead, rows, outputs) in parts.items():
            if all(low <= at < high for at, (low, high) in zip(index, lead, strict=True)):
                sharing.setdefault(rows, {})[device] = outputs
        at_index = [(at, at + 1) for at in index]
        for rows, wanted in sharing.items():
            for outputs, devices in _touching(wanted):
                for run in _runs(tensor, rows, outputs, devices, limit):
                    slices = (*at_index, run, outputs)
                    yield Cut(tensor=tensor, slices=slices, devices=devices)


def _touching(wanted: Mapping[int, Slice]) -> Iterator[tuple[Slice, dict[int, Slice]]]:
    """Contiguous ranges of outputs, each with the outputs of every device in it."""
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
    """Ranges of rows, each a whole number of frames of every device file and of int4 groups."""
    unit = _frame_rows(tensor, devices.values())
    row = (outputs[1] - outputs[0]) * tensor.dtype.itemsize
    step = max(1, limit // row // unit) * unit
    for low in range(*rows, step):
        yield low, min(low + step, rows[1])


def _frame_rows(tensor: LogicalTensor, outputs: Iterable[Slice]) -> int:
    """Rows per frame of a device file: whole int4 groups; the same for any limit."""
    row = max(high - low for low, high in outputs) * tensor.dtype.itemsize
    group = tensor.width // 2 if tensor.precision is Precision.INT4 else 1
    return max(1, FRAME // row // group) * group
