"""Tensors as the ready format knows them: outputs first, cut by logical slices, from any source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.release import Release, StoredTensor
from grokctl.model.config import GrokConfig
from grokctl.model.placement import MeshShape, Slice, place
from grokctl.model.tensors import Axis, TensorSpec, tensor_specs

Slices = tuple[Slice, ...]

_BLOCK: Final = 128
"""Columns copied at a time by a transpose: measured fastest for int8, 1.2 GB/s against 0.14."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalTensor:
    """A weight or its scales in the orientation of the ready format.

    Quantised weights are `(*lead, groups, outputs, inputs of a group)` and their scales
    `(*lead, groups, outputs)`: a decode step multiplies one group's inputs with one output's row,
    sums, scales, and sums over groups (docs/adr/0003). Other matrices are `(outputs, inputs)`.
    """

    spec: TensorSpec
    is_scales: bool
    groups: int
    """Scale rows of the parameter; 0 for float32."""

    @property
    def key(self) -> str:
        """Name in the device files, such as `layers.10.moe.down.scales`."""
        return f"{self.spec.name}.{'scales' if self.is_scales else 'weight'}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        whole = tuple((0, length) for length in self.spec.shape)
        if self.is_scales:
            return (*self.spec.shape[:-2], self.groups, self.spec.shape[-1])
        return extent(self._turn(whole))

    @property
    def dtype(self) -> np.dtype[Any]:
        """How it is stored: int8 with bfloat16 scales, or float32."""
        weight: np.dtype[Any] = np.dtype(np.int8 if self.groups else np.float32)
        return BFLOAT16 if self.is_scales else weight

    def slices(self, mesh: MeshShape, device: int, config: GrokConfig) -> Slices:
        """What a device of a mesh holds of it."""
        placed = place(self.spec, scale_groups=self.groups, mesh=mesh, device=device, config=config)
        if self.is_scales:
            assert placed.scales is not None
            return placed.scales
        return self._turn(placed.weight)

    def cut(self, released: NDArray[Any], slices: Slices) -> NDArray[Any]:
        """Cut a part out of the released array; C-contiguous, a view where nothing turns."""
        if self.is_scales or not self._is_matrix:
            return np.ascontiguousarray(released[_index(slices)])
        if not self.groups:
            outputs, inputs = slices
            return _turned(released[_index((inputs, outputs))])
        *lead, (first, last), outputs, (low, high) = slices
        width = self._group_width
        if (low, high) == (0, width):
            part = released[_index((*lead, (first * width, last * width), outputs))]
        else:
            assert last == first + 1, "a part of the inputs lies in one group"
            part = released[_index((*lead, (first * width + low, first * width + high), outputs))]
        groups = part.reshape(*part.shape[:-2], last - first, high - low, part.shape[-1])
        return _turned(groups)

    def _turn(self, released: Slices) -> Slices:
        """Slices of the released weight -> slices of the ready one."""
        if not self._is_matrix:
            return released
        *lead, (start, stop), outputs = released
        if not self.groups:
            return (outputs, (start, stop))
        width = self._group_width
        first = start // width
        if stop - start < width:
            return (
                *lead,
                (first, first + 1),
                outputs,
                (start % width, start % width + stop - start),
            )
        return (*lead, (first, stop // width), outputs, (0, width))

    @property
    def _is_matrix(self) -> bool:
        """Whether inputs come before outputs in the release; not so in the embedding."""
        return len(self.spec.shape) > 1 and self.spec.axes[0] is not Axis.VOCAB

    @property
    def _group_width(self) -> int:
        return self.spec.shape[-2] // self.groups


class TensorSource(Protocol):
    """Something that tensors can be cut from: a release, or a ready checkpoint of any mesh."""

    @property
    def config(self) -> GrokConfig:
        """The model."""
        ...

    @property
    def groups(self) -> Mapping[str, int]:
        """Scale rows by parameter name; 0 for float32."""
        ...

    def read(self, tensor: LogicalTensor, slices: Slices) -> NDArray[Any]:
        """One part of a tensor, C-contiguous; a view of the mapped file where that is possible."""
        ...


def logical_tensors(source: TensorSource) -> tuple[LogicalTensor, ...]:
    """Every weight and every scales tensor of a model, in the order of the release."""
    tensors = []
    for spec in tensor_specs(source.config):
        groups = source.groups[spec.name]
        tensors.append(LogicalTensor(spec=spec, is_scales=False, groups=groups))
        if groups:
            tensors.append(LogicalTensor(spec=spec, is_scales=True, groups=groups))
    return tuple(tensors)


class ReleaseSource:
    """Cuts tensors out of a release, reading no more than it is asked for."""

    def __init__(self, release: Release) -> None:
        self.release = release
        self._tensors: dict[str, StoredTensor] = {
            tensor.spec.name: tensor for tensor in release.tensors
        }
        self.groups: Mapping[str, int] = {
            name: tensor.scales.shape[-2] if tensor.scales else 0
            for name, tensor in self._tensors.items()
        }

    @property
    def config(self) -> GrokConfig:
        """The model."""
        return self.release.config

    def read(self, tensor: LogicalTensor, slices: Slices) -> NDArray[Any]:
        """One part of a tensor, cut out of the mapped file and turned."""
        weight, scales = self._tensors[tensor.spec.name].map()
        array = scales if tensor.is_scales else weight
        assert array is not None
        return tensor.cut(array, slices)


def _index(slices: Slices) -> tuple[slice, ...]:
    return tuple(slice(*bounds) for bounds in slices)


def extent(slices: Slices) -> tuple[int, ...]:
    """Shape of what slices cut out."""
    return tuple(stop - start for start, stop in slices)


def chunks(slices: Slices, *, itemsize: int, limit: int) -> Sequence[Slices]:
    """Cut slices into parts of at most `limit` bytes that follow each other in C order.

    A single row may be larger than the limit; it is then a part of its own.
    """
    if len(slices) == 1 or prod(extent(slices)) * itemsize <= limit:
        return [slices]
    (start, stop), *rest = slices
    row = prod(extent(tuple(rest))) * itemsize
    if row > limit and len(rest) > 1:
        return [
            ((index, index + 1), *part)
            for index in range(start, stop)
            for part in chunks(tuple(rest), itemsize=itemsize, limit=limit)
        ]
    step = max(1, limit // row)
    return [((low, min(low + step, stop)), *rest) for low in range(start, stop, step)]


def _turned(part: NDArray[Any]) -> NDArray[Any]:
    """Swap the last two axes into a new C-contiguous array, a block of columns at a time."""
    turned = np.swapaxes(part, -1, -2)
    out: NDArray[Any] = np.empty(turned.shape, part.dtype)
    for low in range(0, turned.shape[-1], _BLOCK):
        out[..., low : low + _BLOCK] = turned[..., low : low + _BLOCK]
    return out
