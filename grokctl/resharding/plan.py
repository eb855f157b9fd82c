"""Plan a reshard: its files and its memory; `--dry-run` prints the plan, the execution obeys it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Final

from grokctl.checkpoint.frames import FRAME, Compression
from grokctl.checkpoint.layout import DeviceLayout, device_layouts
from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.checkpoint.release import Release
from grokctl.checkpoint.storage import storage_in
from grokctl.checkpoint.tensor_source import ReleaseSource, Slices, Storage, TensorSource, extent
from grokctl.errors import UsageError
from grokctl.machine.memory import memory
from grokctl.model.placement import MeshShape, check_mesh
from grokctl.model.precision import Precision, check_conversion
from grokctl.resharding.slices import cuts_of
from grokctl.system import usable_cores

_LARGEST_ARRAY: Final = 2**24

_SMALLEST_ARRAY: Final = 2**20

_MOST_WAITING: Final = 8

_FEWEST_WAITING: Final = 2
"""Finished arrays that wait for their writers, beside those that workers make: a tenth faster with
eight than with two, where there is memory for them."""

_SCRATCH: Final = 16 * 2**20
"""Bytes that a worker needs beside its array: rows as they were read, floats, integers."""


@dataclass(frozen=True, kw_only=True)
class ReshardPlan:
    """What a reshard will read and write."""

    source: Release | ReadyCheckpoint
    out: Path
    mesh: MeshShape
    storage: Storage
    layouts: tuple[DeviceLayout, ...]
    """Of the devices whose files are written."""
    compression: Compression | None
    jobs: int
    arrays: int
    """How many there are at a time: made, waiting, or being written."""
    array_nbytes: int
    """Bytes of an array that a worker makes at a time, at most."""

    @cached_property
    def tensors(self) -> TensorSource:
        """The source as what tensors are cut from."""
        return ReleaseSource(self.source) if isinstance(self.source, Release) else self.source

    @property
    def precision(self) -> Precision:
        """How weights will be stored."""
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
            for held in layout.tensors:
                if not held.tensor.is_scales:
                    wanted.setdefault(held.tensor.spec.name, set()).add(held.slices)
        total = 0
        for own in self.tensors.storage.tensors:
            name = own.spec.name
            count = sum(prod(extent(slices)) for slices in wanted[name])
            whole = prod(self.storage.weight(own.spec).shape)
            total += prod(own.shape) * own.dtype.itemsize * count // whole
        return total

    @property
    def peak_bytes(self) -> int:
        """Bytes that reading, converting and writing hold at most."""
        frames = 2 if self.compression else 1
        return self.arrays * self.array_nbytes * frames + self.jobs * _SCRATCH


def plan(
    source: Release | ReadyCheckpoint,
    *,
    mesh: MeshShape,
    out: Path,
    precision: Precision | None = None,
    group_size: int | None = None,
    compression: Compression | None = None,
    devices: frozenset[int] | None = None,
    jobs: int | None = None,
    max_memory: int | None = None,
) -> ReshardPlan:
    """Decide every byte that will be written; touch nothing.

    Args:
        source: Opened, so its structure is sound; ready checkpoints should be streamed.
        mesh: Which devices to cut for.
        out: Folder to publish; must not exist when the plan is executed, unless forced.
        precision: How to store weights; as the source does by default.
        group_size: Inputs that share an int4 scale; by default 64, or what the mesh allows.
        compression: Of the device files.
        devices: Whose files to write; all by default.
        jobs: Worker threads; as many as cores by default.
        max_memory: Bytes for all that is under way; a quarter of free memory by default.

    Raises:
        PlacementError: The model does not divide over the mesh, or the precision cannot be had.
        UsageError: The source holds only a part of the model, or there is no such device.
    """
    if isinstance(source, ReadyCheckpoint):
        source.check_whole()
    tensors = ReleaseSource(source) if isinstance(source, Release) else source
    own = tensors.storage
    wanted = own.precision if precision is None else precision
    check_conversion(own.precision, wanted)
    check_mesh(mesh, own.config)
    storage = storage_in(own, wanted, mesh, group_size=group_size)
    layouts = device_layouts(storage, mesh)
    if devices is not None:
        layouts = tuple(layout for layout in layouts if layout.device in devices)
        if len(layouts) != len(devices) or not devices:
            raise UsageError(
                f"devices {_ranges(devices)} are not all of the {mesh.size} of {mesh}",
                f"--only-devices 0-{mesh.size - 1}",
            )
    threads, arrays, array_nbytes = _threads_and_arrays(layouts, compression, jobs, max_memory)
    return ReshardPlan(
        source=source,
        out=out,
        mesh=mesh,
        storage=storage,
        layouts=layouts,
        compression=compression,
        jobs=threads,
        arrays=arrays,
        array_nbytes=array_nbytes,
    )


def usual_name(
    source: Release | ReadyCheckpoint,
    *,
    mesh: MeshShape,
    precision: Precision | None,
    compression: Compression | None,
) -> str:
    """Name of the folder under home: `NAME-PRECISION-MESH`, with `-zst` if compressed."""
    if isinstance(source, ReadyCheckpoint):
        name, own = source.source.folder, source.precision
    else:
        name, own = source.name, Precision.INT8
    return f"{name}-{precision or own}-{mesh.slug}" + ("-zst" if compression else "")


def _ranges(devices: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(devices)[:8])) or "none"


def _threads_and_arrays(
    layouts: Sequence[DeviceLayout],
    compression: Compression | None,
    jobs: int | None,
    max_memory: int | None,
) -> tuple[int, int, int]:
    """How many threads work, how many arrays there are, and bytes of one: all in the memory."""
    budget = memory().usable // 4 if max_memory is None else max_memory
    copies = 2 if compression else 1
    smallest = FRAME if compression else _SMALLEST_ARRAY
    least = copies * _largest(layouts, smallest)
    room = (budget - _FEWEST_WAITING * least) // (_SCRATCH + least)
    threads = max(1, min(jobs or usable_cores(), room))
    rest = budget - threads * _SCRATCH
    waiting = max(_FEWEST_WAITING, min(_MOST_WAITING, rest // (2 * least) - threads))
    share = rest // (copies * (threads + waiting))
    largest = _largest(layouts, max(smallest, min(share, _LARGEST_ARRAY)))
    return threads, threads + waiting, largest


def _largest(layouts: Sequence[DeviceLayout], limit: int) -> int:
    """Bytes of the largest array that is made under a limit."""
    unlike: dict[tuple[object, ...], int] = {}  # layers are alike: one of them tells
    for index, held in enumerate(layouts[0].tensors):
        slices = tuple(layout.tensors[index].slices for layout in layouts)
        unlike.setdefault((held.tensor.dtype, held.tensor.groups, slices), index)
    return max(
        cut.nbytes for index in unlike.values() for cut in cuts_of(layouts, index, limit=limit)
    )
