"""Plan a reshard: its files and its memory. `--dry-run` prints the plan, execution follows it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Final

from grokctl.checkpoint.frames import Compression
from grokctl.checkpoint.layout import DeviceLayout, device_layouts
from grokctl.checkpoint.published import Checkpoint, on_its_source, tensors_of
from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.checkpoint.release import Release
from grokctl.checkpoint.storage import storage_in
from grokctl.checkpoint.tensor_source import Slices, Storage, TensorSource, extent
from grokctl.errors import invalid
from grokctl.events import Stage
from grokctl.model.placement import MeshShape, check_mesh
from grokctl.model.precision import Precision, check_conversion
from grokctl.resharding.memory_limits import memory_limits, peak_nbytes
from grokctl.resharding.replaced import READY, FolderKind
from grokctl.resharding.slices import Cut, cuts_of, is_scales_of_quantized

_SAMPLES: Final = 12
"""Tensors, from all over the model, whose pieces are made to measure the work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardOptions:
    """Options of a reshard."""

    mesh: MeshShape
    """The devices to shard for."""
    out: Path
    """The folder to publish; must not exist when the plan is executed, unless forced."""
    precision: Precision | None = None
    """Of the weights; by default that of the source."""
    group_size: int | None = None
    """Inputs per int4 scale; by default 64, or the most that the mesh allows."""
    compression: Compression | None = None
    """Of the device files."""
    devices: frozenset[int] | None = None
    """Devices whose files are written; all by default."""
    jobs: int | None = None
    """Worker threads; one per core by default."""
    max_memory: int | None = None
    """Bytes of memory for arrays; a quarter of free memory by default."""


@dataclass(frozen=True, kw_only=True)
class ReshardPlan:
    """Everything that a reshard will read and write."""

    source: Checkpoint
    out: Path
    mesh: MeshShape
    storage: Storage
    layouts: tuple[DeviceLayout, ...]
    """Of the device files that are written."""
    compression: Compression | None
    jobs: int
    arrays: int
    """Arrays in memory at a time: being filled, waiting, or being written."""
    array_nbytes: int
    """Bytes of an array at most."""
    opened: TensorSource | None = None
    """The source as a source of tensors, if it is not read as usual."""

    @property
    def kind(self) -> FolderKind:
        """The kind of folder that is published."""
        return READY

    @property
    def stage(self) -> Stage:
        """The stage that reports the progress."""
        return Stage.RESHARD

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The names of the tensors, in the order of every file."""
        return tuple(item.tensor.key for item in self.layouts[0].tensors)

    def pieces(self, index: int) -> Iterator[Cut]:
        """The arrays of a tensor, by its place in that order."""
        return cuts_of(self.layouts, index, limit=self.array_nbytes)

    def made_with(self, index: int) -> int | None:
        """The weight that is quantized together with these scales; None if they are read."""
        tensor = self.layouts[0].tensors[index].tensor
        if not is_scales_of_quantized(self.tensors, tensor):
            return None
        return self.keys.index(replace(tensor, is_scales=False).key)

    def reader(self) -> TensorSource:
        """The source as pieces read it."""
        return self.tensors

    def trial(self) -> list[Cut]:
        """An array of weights from all over the model."""
        tensors = self.layouts[0].tensors
        matrices = [index for index, item in enumerate(tensors) if item.tensor.is_matrix]
        return [next(self.pieces(index)) for index in spread(matrices, _SAMPLES)]

    @cached_property
    def tensors(self) -> TensorSource:
        """The source as a source of tensors."""
        return self.opened or tensors_of(self.source)

    @property
    def precision(self) -> Precision:
        """The precision of the new weights."""
        return self.storage.precision

    @property
    def bytes_out(self) -> int:
        """Bytes of all device files, before compression."""
        return sum(layout.nbytes for layout in self.layouts)

    @cached_property
    def bytes_in(self) -> int:
        """Bytes of the source's tensors that are read."""
        wanted: dict[str, set[Slices]] = {}
        for layout in self.layouts:
            for item in layout.tensors:
                if not item.tensor.is_scales:
                    wanted.setdefault(item.tensor.spec.name, set()).add(item.slices)
        total = 0
        for own in self.tensors.storage.tensors:
            name = own.spec.name
            count = sum(prod(extent(slices)) for slices in wanted[name])
            whole = prod(self.storage.weight(own.spec).shape)
            total += prod(own.shape) * own.dtype.itemsize * count // whole
        return total

    @property
    def peak_bytes(self) -> int:
        """Bytes of memory for reading, converting and writing, at most."""
        return peak_nbytes(
            self.jobs, self.arrays, self.array_nbytes, is_compressed=self.compression is not None
        )


def plan_reshard(source: Checkpoint, options: ReshardOptions) -> ReshardPlan:
    """Decide every byte that will be written; reads and writes no file.

    Args:
        source: Opened, so its structure is sound; ready checkpoints should be streamed.
        options: Mesh, destination, precision and limits.

    Raises:
        PlacementError: The model does not divide over the mesh, or the precision is impossible.
        UsageError: The source has only a part of the model, or a device does not exist.
    """
    if isinstance(source, ReadyCheckpoint):
        source.check_whole()
    tensors = tensors_of(source)
    own, mesh = tensors.storage, options.mesh
    precision = own.precision if options.precision is None else options.precision
    check_conversion(own.precision, precision, hint=on_its_source(source))
    check_mesh(mesh, own.config)
    storage = storage_in(own, precision, mesh, group_size=options.group_size)
    layouts = _layouts(storage, options)
    jobs, arrays, array_nbytes = memory_limits(
        lambda limit: _largest_cut(layouts, limit),
        is_compressed=options.compression is not None,
        jobs=options.jobs,
        max_memory=options.max_memory,
    )
    return ReshardPlan(
        source=source,
        out=options.out,
        mesh=mesh,
        storage=storage,
        layouts=layouts,
        compression=options.compression,
        jobs=jobs,
        arrays=arrays,
        array_nbytes=array_nbytes,
    )


def spread(places: Sequence[int], count: int) -> list[int]:
    """So many of these places, from all over them."""
    return sorted({places[n * len(places) // count] for n in range(count)})


def usual_name(
    source: Checkpoint,
    *,
    mesh: MeshShape,
    precision: Precision | None,
    compression: Compression | None,
) -> str:
    """The default folder name: `NAME-PRECISION-MESH`, with `-zst` if compressed."""
    if isinstance(source, Release):
        name, own = source.name, Precision.INT8
    else:
        name, own = source.source.folder, source.precision
    return f"{name}-{precision or own}-{mesh.slug}" + ("-zst" if compression else "")


def _layouts(storage: Storage, options: ReshardOptions) -> tuple[DeviceLayout, ...]:
    layouts, devices, mesh = device_layouts(storage, options.mesh), options.devices, options.mesh
    if devices is None:
        return layouts
    layouts = tuple(layout for layout in layouts if layout.device in devices)
    if len(layouts) != len(devices) or not devices:
        some = ", ".join(map(str, sorted(devices)[:8])) or "none"
        expected = f"expected devices 0 to {mesh.size - 1} of {mesh}"
        raise invalid("only_devices", some, expected, f"--only-devices 0-{mesh.size - 1}")
    return layouts


def _largest_cut(layouts: Sequence[DeviceLayout], limit: int) -> int:
    """Bytes of the largest array under a limit."""
    distinct: dict[tuple[object, ...], int] = {}  # layers are alike: one of them is enough
    for index, item in enumerate(layouts[0].tensors):
        slices = tuple(layout.tensors[index].slices for layout in layouts)
        distinct.setdefault((item.tensor.dtype, item.tensor.groups, slices), index)
    return max(
        cut.nbytes for index in distinct.values() for cut in cuts_of(layouts, index, limit=limit)
    )
