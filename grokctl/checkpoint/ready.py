"""Ready checkpoints: opened by their manifest, read by logical slices whatever the mesh."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.device_file import DeviceFile
from grokctl.checkpoint.file_sizes import file_damage
from grokctl.checkpoint.frames import Unpacker
from grokctl.checkpoint.layout import DeviceLayout, DeviceTensor
from grokctl.checkpoint.manifest import FileRecord, Manifest, Source, malformed, parse_manifest
from grokctl.checkpoint.tensor_source import (
    LogicalTensor,
    Reader,
    Slices,
    Storage,
    extent,
    index_of,
    overlap,
    within,
)
from grokctl.errors import Damage, Reason, UsageError, corrupt
from grokctl.model.config import GrokConfig
from grokctl.model.placement import MeshShape, Slice
from grokctl.model.precision import Precision
from grokctl.paths import MANIFEST, TOKENIZER, quoted

SUMS: Final = "SHA256SUMS"
_AT_A_TIME: Final = 4 * 2**20
"""Bytes of rows that are read to take a part of each."""
_LARGEST_MANIFEST: Final = 32 * 2**20
"""Grok-1's takes half a MB, cut for 16 devices: this is a model of four thousand layers."""


@dataclass(frozen=True)
class ReadyCheckpoint:
    """A resharded checkpoint whose files are all there and have the size they should have.

    It is a `TensorSource`: any part of any tensor can be read, whatever the mesh it was cut for.
    """

    root: Path
    manifest: Manifest
    is_streamed: bool = False
    """Whether parts of files are read into memory, which is bounded, instead of mapped."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.resolve().name

    @property
    def storage(self) -> Storage:
        """What it stores."""
        return self.manifest.storage

    @property
    def config(self) -> GrokConfig:
        """The model."""
        return self.manifest.storage.config

    @property
    def precision(self) -> Precision:
        """How weights are stored."""
        return self.manifest.storage.precision

    @property
    def mesh(self) -> MeshShape:
        """What it was cut for."""
        return self.manifest.mesh

    @property
    def source(self) -> Source:
        """What it was cut from."""
        return self.manifest.source

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file beside the manifest and the sums."""
        return self.manifest.files

    @property
    def layouts(self) -> tuple[DeviceLayout, ...]:
        """What each device's file holds."""
        return self.manifest.layouts

    def part(self, devices: Sequence[int]) -> "ReadyCheckpoint":
        """The same with the files of some devices only.

        Raises:
            UsageError: Not all of them are here.
        """
        if not set(devices) <= set(self.manifest.devices):
            here = ", ".join(map(str, self.manifest.devices))
            wanted = ",".join(map(str, devices))
            raise UsageError(
                f"{self.name}: holds device {here} of {self.mesh.size}, this process needs "
                f"{wanted.replace(',', ', ')}",
                f"{_command(self)} --only-devices {wanted} --out {quoted(self.root)} --force",
            )
        if tuple(devices) == self.manifest.devices:
            return self
        return replace(self, manifest=replace(self.manifest, devices=tuple(devices)))

    @property
    def is_whole(self) -> bool:
        """Whether every device's file is here, and not only those of one host."""
        return len(self.manifest.devices) == self.mesh.size

    @property
    def is_mapped(self) -> bool:
        """Whether tensors are views of files, and take no memory of their own."""
        return self.manifest.compression is None and not self.is_streamed

    @property
    def tokenizer(self) -> Path | None:
        """The sentencepiece model, if it is there."""
        path = self.root / TOKENIZER
        return path if path.is_file() else None

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    @cached_property
    def _holdings(self) -> dict[str, list[tuple[int, DeviceTensor]]]:
        """Who holds which parts of a tensor; of devices that hold the same, the first."""
        holdings: dict[str, dict[Slices, tuple[int, DeviceTensor]]] = {}
        for device in self.manifest.devices:
            for held in self.layouts[device].tensors:
                parts = holdings.setdefault(held.tensor.key, {})
                parts.setdefault(held.slices, (device, held))
        return {key: list(parts.values()) for key, parts in holdings.items()}

    @cached_property
    def _opened(self) -> dict[int, DeviceFile]:
        return {}

    @cached_property
    def _opening(self) -> Lock:
        return Lock()

    @cached_property
    def _unpacker(self) -> Unpacker:
        return Unpacker()

    def read(self, tensor: LogicalTensor, slices: Slices) -> NDArray[Any]:
        """One part of a tensor.

        Returns:
            A view of a mapped device file when one holds all of this part, else a copy put
            together from all files that hold some of it.

        Raises:
            CorruptCheckpointError: A device file is not the one that the manifest describes.
            UsageError: A device file that holds some of it is on another host.
        """
        common = []
        for device, held in self._holdings[tensor.key]:
            both = overlap(slices, held.slices)
            if both == slices:
                return self._part(device, held, slices)
            if all(low < high for low, high in both):
                common.append((device, held, both))
        out: NDArray[Any] = np.empty(extent(slices), tensor.dtype)
        if sum(prod(extent(both)) for _, _, both in common) < out.size:
            self.check_whole()
        for device, held, both in common:
            out[index_of(within(both, slices))] = self._part(device, held, both)
        return out

    @contextmanager
    def reading(
        self, tensor: LogicalTensor, lead: tuple[int, ...], outputs: Slice
    ) -> Iterator[Reader]:
        """Some outputs of a matrix's rows, from all files that hold some of them."""
        stack = tuple((number, number + 1) for number in lead)
        count = outputs[1] - outputs[0]
        yield lambda low, high: self.read(tensor, (*stack, (low, high), outputs)).reshape(-1, count)

    def check_whole(self) -> None:
        """Refuse what needs all devices' files.

        Raises:
            UsageError: Only those of some devices are here.
        """
        if not self.is_whole:
            here = ", ".join(map(str, self.manifest.devices))
            raise UsageError(
                f"{self.name}: holds device {here} of {self.mesh.size}, all are needed",
                f"{_command(self)} --out {quoted(f'{self.root}-whole')}",
            )

    def _part(self, device: int, held: DeviceTensor, slices: Slices) -> NDArray[Any]:
        """What a device holds of `slices`, all of which it holds."""
        inner = within(slices, held.slices)
        shape = extent(held.slices)
        # the leading axes of which one index is wanted, then one of which some are, then the rest
        apart = (axis for axis, (low, high) in enumerate(inner) if high - low > 1)
        axis = next(apart, len(shape) - 1)
        row = prod(shape[axis + 1 :])
        first = 0
        for (low, _), length in zip(inner[: axis + 1], shape, strict=False):
            first = first * length + low
        count = inner[axis][1] - inner[axis][0]
        wanted = (slice(None), *index_of(inner[axis + 1 :]))

        def rows(low: int, high: int) -> NDArray[Any]:
            flat = self._elements(device, held, (first + low) * row, (high - low) * row)
            return flat.reshape(high - low, *shape[axis + 1 :])[wanted]

        step = max(1, _AT_A_TIME // (row * held.tensor.dtype.itemsize))
        if self.is_mapped or step >= count or prod(extent(slices)) == count * row:
            return rows(0, count).reshape(extent(slices))
        out: NDArray[Any] = np.empty((count, *extent(inner[axis + 1 :])), held.tensor.dtype)
        for low in range(0, count, step):
            high = min(low + step, count)
            out[low:high] = rows(low, high)
        return out.reshape(extent(slices))

    def _elements(self, device: int, held: DeviceTensor, first: int, count: int) -> NDArray[Any]:
        """Some of a tensor's elements that follow each other in its file."""
        dtype = held.tensor.dtype
        start, nbytes = held.offset + first * dtype.itemsize, count * dtype.itemsize
        return self.data(device, start, nbytes).view(dtype)

    def data(self, device: int, start: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes of a device's safetensors file, decompressed.

        Raises:
            CorruptCheckpointError: It is not the file that the manifest describes.
        """
        with self._blaming(device):
            return self._open(device).data(start, nbytes)

    def read_into(self, memory: NDArray[np.uint8], device: int, start: int) -> None:
        """Fill memory with bytes of a device's safetensors file, decompressed.

        Raises:
            CorruptCheckpointError: It is not the file that the manifest describes.
        """
        with self._blaming(device):
            self._open(device).read_into(memory, start)

    @contextmanager
    def _blaming(self, device: int) -> Iterator[None]:
        """Say of what a device's file is not that it is damaged."""
        try:
            yield
        except (ValueError, OSError) as error:
            look = f"grokctl verify {quoted(self.root)}"
            name = self.manifest.record_of(device).name
            reason = Reason.UNREADABLE if isinstance(error, OSError) else Reason.ALTERED
            raise corrupt(name, reason, str(error), look) from error

    def _open(self, device: int) -> DeviceFile:
        with self._opening:
            file = self._opened.get(device)
            if file is None:
                record = self.manifest.record_of(device)
                file = self._opened[device] = DeviceFile(
                    self.root / record.name,
                    record,
                    self.layouts[device],
                    owner=f"device {device} of {self.mesh}",
                    is_mapped=not self.is_streamed,
                    unpacker=self._unpacker,
                )
            return file


def open_ready(root: Path, *, is_streamed: bool = False) -> ReadyCheckpoint:
    """Read a manifest, and check that every file it names is there with its size.

    Args:
        root: The folder.
        is_streamed: For readers that take everything once and must not grow with it.

    Raises:
        CorruptCheckpointError: The manifest is malformed or of another version, or a file is
            missing or has another size.
        UsageError: There is no ready checkpoint here.
    """
    checkpoint = read_manifest(root)
    for damage in missing_files(checkpoint):
        raise corrupt(damage.file, damage.reason, damage.detail, cut_again(checkpoint))
    return replace(checkpoint, is_streamed=is_streamed)


def read_manifest(root: Path, *, is_checked: bool = True) -> ReadyCheckpoint:
    """Read a manifest, and look at no file that it names.

    Args:
        root: The folder.
        is_checked: Whether it must say of every file what follows from its mesh; without that,
            it is only good for choosing.

    Raises:
        CorruptCheckpointError: It is malformed or of another version.
        UsageError: There is no ready checkpoint here.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise UsageError(
            f"{root}: holds no {MANIFEST}, so no ready checkpoint", "grokctl reshard --devices 8"
        )
    if path.stat().st_size > _LARGEST_MANIFEST:
        raise malformed(f"is {path.stat().st_size} bytes")
    return ReadyCheckpoint(root, parse_manifest(path.read_bytes(), is_checked=is_checked))


def missing_files(checkpoint: ReadyCheckpoint) -> Iterator[Damage]:
    """Files that the manifest names and that are not there, or have another size."""
    manifest = checkpoint.manifest
    expected = {record.name: record.nbytes for record in manifest.files}
    if manifest.compression is None:
        expected |= {
            manifest.layouts[device].name: manifest.layouts[device].nbytes
            for device in manifest.devices
        }
    for name, nbytes in sorted(expected.items()):
        path = checkpoint.root / name
        size = path.stat().st_size if path.is_file() else None
        damage = file_damage(checkpoint.root, name, expected=nbytes, size=size)
        if damage is not None:
            yield damage


def cut_again(checkpoint: ReadyCheckpoint) -> str:
    """The command that makes a checkpoint anew."""
    devices = ",".join(map(str, checkpoint.manifest.devices))
    some = "" if checkpoint.is_whole else f" --only-devices {devices}"
    return f"{_command(checkpoint)}{some} --out {quoted(checkpoint.root)} --force"


def _command(checkpoint: ReadyCheckpoint) -> str:
    """How it was cut."""
    manifest = checkpoint.manifest
    command = f"grokctl reshard {quoted(checkpoint.source.folder)} --mesh {checkpoint.mesh}"
    if checkpoint.precision is not Precision.INT8:
        command += f" --precision {checkpoint.precision}"
    if manifest.compression is not None:
        command += f" --compress {manifest.compression}"
    return command
