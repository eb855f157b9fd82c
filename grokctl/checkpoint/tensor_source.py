"""Tensors as the ready format stores them, and sources that they can be sliced from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import prod
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.release import Release
from grokctl.errors import PlacementError
from grokctl.model.config import GrokConfig
from grokctl.model.placement import MeshShape, Slice, place
from grokctl.model.precision import Precision
from grokctl.model.tensors import Axis, TensorSpec, tensor_specs

if TYPE_CHECKING:
    from grokctl.checkpoint.stored_tensor import StoredTensor

Slices = tuple[Slice, ...]

_WEIGHTS: Final[Mapping[Precision, np.dtype[Any]]] = {
    Precision.INT8: np.dtype(np.int8),
    Precision.INT4: np.dtype(np.uint8),
    Precision.BFLOAT16: BFLOAT16,
    Precision.FLOAT32: np.dtype("<f4"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalTensor:
    """A weight or its scales as stored: in the orientation of the release.

    | weight | shape |
    | --- | --- |
    | int8, bf16, float32 | `(*lead, inputs, outputs)` |
    | int4 | `(*lead, inputs / 2, outputs)`, inputs 2r and 2r + 1 in the nibbles of row r |

    int8 and int4 have scales `(*lead, groups, outputs)`, each for consecutive inputs.
    The reason for this order is in docs/adr/0003.
    """

    spec: TensorSpec
    precision: Precision
    """Of this parameter: float32 if the release does not quantize it."""
    groups: int
    """Scale groups of the parameter; 0 without scales."""
    is_scales: bool = False

    @property
    def key(self) -> str:
        """Name in the device files, such as `layers.10.moe.down.scales`."""
        return f"{self.spec.name}.{'scales' if self.is_scales else 'weight'}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        if self.is_scales:
            return (*self.spec.shape[:-2], self.groups, self.spec.shape[-1])
        return extent(self.stored(tuple((0, length) for length in self.spec.shape)))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of an element; for int4, a byte with two of them."""
        return BFLOAT16 if self.is_scales else _WEIGHTS[self.precision]

    @property
    def width(self) -> int:
        """Inputs per scale group."""
        return self.spec.shape[-2] // self.groups

    @property
    def is_matrix(self) -> bool:
        """Whether this is a weight with inputs and outputs, which can have any precision."""
        return (
            not self.is_scales and len(self.spec.shape) > 1 and self.spec.axes[0] is not Axis.VOCAB
        )

    def slices(self, mesh: MeshShape, device: int, config: GrokConfig) -> Slices:
        """The slices of this tensor on one device of a mesh.

        Raises:
            PlacementError: The device's inputs are not whole int4 groups.
        """
        placed = place(self.spec, scale_groups=self.groups, mesh=mesh, device=device, config=config)
        if self.precision is Precision.INT4 and any(end % self.width for end in placed.weight[-2]):
            start, stop = placed.weight[-2]
            raise PlacementError(
                f"{self.spec.name}: inputs {start} to {stop} of a device are not whole int4 groups "
                f"of {self.width}"
            )
        if self.is_scales:
            assert placed.scales is not None
            return placed.scales
        return self.stored(placed.weight)

    def stored(self, released: Slices) -> Slices:
        """Slices of the parameter as slices of this weight: the same, except for int4."""
        if self.precision is not Precision.INT4:
            return released
        *lead, (start, stop), outputs = released
        return (*lead, (start // 2, stop // 2), outputs)


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How a model's parameters are stored; with a mesh, it determines every device file."""

    config: GrokConfig
    precision: Precision
    groups: Mapping[str, int]
    """Scale groups by parameter name; 0 without scales."""

    def weight(self, spec: TensorSpec) -> LogicalTensor:
        """A parameter's weight."""
        precision = self.precision if spec.is_quantized else Precision.FLOAT32
        return LogicalTensor(spec=spec, precision=precision, groups=self.groups[spec.name])

    def scales(self, spec: TensorSpec) -> LogicalTensor:
        """A parameter's scales; only if it has groups."""
        return LogicalTensor(
            spec=spec, precision=self.precision, groups=self.groups[spec.name], is_scales=True
        )

    @cached_property
    def tensors(self) -> tuple[LogicalTensor, ...]:
        """Every weight and every scales tensor, in the order of the release."""
        tensors = []
        for spec in tensor_specs(self.config):
            tensors.append(self.weight(spec))
            if self.groups[spec.name]:
                tensors.append(self.scales(spec))
        return tuple(tensors)


RowReader = Callable[[int, int], NDArray[Any]]
"""Reads a range of stored rows, `(rows, outputs)`, valid until the next call."""


class TensorSource(Protocol):
    """A source of tensors: a release, or a ready checkpoint of any mesh."""

    @property
    def storage(self) -> Storage:
        """How its tensors are stored."""
        ...

    @property
    def config(self) -> GrokConfig:
        """The model."""
        ...

    def read(self, tensor: LogicalTensor, slices: Slices) -> NDArray[Any]:
        """Read a part of a stored tensor; a view of the mapped file if possible."""
        ...

    def reading(
        self, tensor: LogicalTensor, lead: tuple[int, ...], outputs: Slice
    ) -> AbstractContextManager[RowReader]:
        """Open one matrix of a stored weight, to read some outputs of its rows in order.

        Raises:
            CorruptCheckpointError: The source changed; also while reading.
        """
        ...


def digest_of_small(source: TensorSource) -> str:
    """A digest of a model's norms and routers, which every device has."""
    digest = sha256()
    for tensor in source.storage.tensors:
        if not tensor.spec.is_quantized and tensor.spec.axes[0] is not Axis.VOCAB:
            digest.update(tensor.key.encode())
            digest.update(source.read(tensor, tuple((0, n) for n in tensor.shape)).tobytes())
    return digest.hexdigest()


class ReleaseSource:
    """Slices of the tensors of a release; reads no other bytes."""

    def __init__(self, release: Release) -> None:
        self.release = release
        self._tensors: dict[str, StoredTensor] = {
            tensor.spec.name: tensor for tensor in release.tensors
        }
        self.storage = Storage(
            config=release.config,
            precision=Precision.INT8,
            groups={
                name: tensor.scales.shape[-2] if tensor.scales else 0
                for name, tensor in self._tensors.items()
            },
        )

    @property
    def config(self) -> GrokConfig:
        """The model."""
        return self.release.config

    def stored(self, name: str) -> "StoredTensor":
        """A parameter, by its name."""
        return self._tensors[name]

    def read(self, tensor: LogicalTensor, slices: Slices) -> NDArray[Any]:
        """Copy a part of a tensor out of the mapped file."""
        weight, scales = self.stored(tensor.spec.name).map()
        array = scales if tensor.is_scales else weight
        assert array is not None
        return np.array(array[index_of(slices)])

    @contextmanager
    def reading(
        self, tensor: LogicalTensor, lead: tuple[int, ...], outputs: Slice
    ) -> Iterator[RowReader]:
        """Open the file, to read some outputs of its rows in order."""
        first = 0
        for index, length in zip(lead, tensor.spec.shape, strict=False):
            first = first * length + index
        first *= tensor.spec.shape[-2]
        with self.stored(tensor.spec.name).opened() as rows:
            yield lambda low, high: rows.read((first + low, first + high), outputs)


def index_of(slices: Slices) -> tuple[slice, ...]:
    """Slices as a numpy index."""
    return tuple(slice(*bounds) for bounds in slices)


def overlap(slices: Slices, others: Slices) -> Slices:
    """The intersection of two parts; has an empty axis if they are disjoint."""
    return tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(slices, others, strict=True))


def within(slices: Slices, whole: Slices) -> Slices:
    """The slices of a part relative to a whole that contains it."""
    return tuple(
        (low - start, high - start) for (low, high), (start, _) in zip(slices, whole, strict=True)
    )


def extent(slices: Slices) -> tuple[int, ...]:
    """The shape of slices."""
    return tuple(stop - start for start, stop in slices)


def chunks(slices: Slices, *, itemsize: int, limit: int) -> Sequence[Slices]:
    """Divide slices into consecutive parts of at most `limit` bytes, in C order.

    A single row that is larger than the limit is a part of its own.
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
