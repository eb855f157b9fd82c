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

    Weights are `(*lead, outputs, inputs)`, scales `(*lead, outputs, groups)`: a decode step reads
    one output's inputs in a row (docs/adr/0003).
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
    def is_turned(self) -> bool:
        """Whether the last two axes are the other way round than in the release."""
        return len(self.spec.shape) > 1 and self.spec.axes[0] is not Axis.VOCAB

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        shape = self.spec.shape
        if self.is_scales:
            shape = (*shape[:-2], self.groups, shape[-1])
        return self.turn(shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """How it is stored: int8 with bfloat16 scales, or float32."""
        weight: np.dtype[Any] = np.dtype(np.int8 if self.groups else np.float32)
        return BFLOAT16 if self.is_scales else weight

    def turn(self, axes: tuple[Any, ...]) -> tuple[Any, ...]:
        """Released order of axes <-> order of the ready format."""
        return (*axes[:-2], axes[-1], axes[-2]) if self.is_turned else axes

    def slices(self, mesh: MeshShape, device: int, config: GrokConfig) -> Slices:
        """What a device of a mesh holds of it."""
        placed = place(self.spec, scale_groups=self.groups, mesh=mesh, device=device, config=config)
        chosen = placed.scales if self.is_scales else placed.weight
        assert chosen is not None
        return self.turn(chosen)


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
        """One part of a tensor, copied out of the mapped file and turned outputs first."""
        weight, scales = self._tensors[tensor.spec.name].map()
        array = scales if tensor.is_scales else weight
        assert array is not None
        part = array[tuple(slice(*bounds) for bounds in tensor.turn(slices))]
        return _turned(part) if tensor.is_turned else np.ascontiguousarray(part)


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
