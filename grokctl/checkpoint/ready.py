"""Ready checkpoints: opened by their manifest, read by logical slices from any mesh."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.device_file import DeviceFile
from grokctl.checkpoint.file_sizes import file_damage, regular_size
from grokctl.checkpoint.frames import Unpacker
from grokctl.checkpoint.layout import DeviceLayout, DeviceTensor
from grokctl.checkpoint.manifest import FileRecord, Manifest, Source, malformed, parse_manifest
from grokctl.checkpoint.tensor_source import (
    LogicalTensor,
    RowReader,
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
from grokctl.os_errors import TooLargeError, is_absence, located, refusal
from grokctl.paths import MANIFEST, TOKENIZER, quoted, read_limited

SUMS: Final = "SHA256SUMS"
_AT_A_TIME: Final = 4 * 2**20
"""Bytes of rows that are read at a time when only a part of each is wanted."""
_LARGEST_MANIFEST: Final = 8 * 2**20
"""Grok-1's is half a MB for 16 devices; in memory, one may take 28 times as much."""


@dataclass(frozen=True)
class ReadyCheckpoint:
    """A resharded checkpoint in which every file exists and has its size.

    It is a `TensorSource`: any part of any tensor can be read, whatever its mesh.
    """

    root: Path
    manifest: Manifest
    is_streamed: bool = False
    """Whether parts of files are read into bounded memory instead of mapped."""
    manifest_sha256: str = ""
    """Of the manifest's bytes, as they were read."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.resolve().name

    @property
    def verb(self) -> str:
        """The command that makes such a folder."""
        return "reshard"

    @property
    def manifest_name(self) -> str:
        """The name of its manifest."""
        return MANIFEST

    @property
    def records(self) -> Mapping[str, FileRecord]:
        """Every file except the manifest and the checksums, by name."""
        return self.manifest.records

    @property
    def storage(self) -> Storage:
        """How its tensors are stored."""
        return self.manifest.storage

    @property
    def config(self) -> GrokConfig:
        """The model."""
        return self.manifest.storage.config

    @property
    def precision(self) -> Precision:
        """The precision of its weights."""
        return self.manifest.storage.precision

    @property
    def mesh(self) -> MeshShape:
        """The mesh that it is sharded for."""
        return self.manifest.mesh

    @property
    def source(self) -> Source:
        """The checkpoint that it was made from."""
        return self.manifest.source

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file except the manifest and the checksums."""
        return self.manifest.files

    @property
    def tensor_files(self) -> tuple[FileRecord, ...]:
        """The device files that it has."""
        return tuple(map(self.manifest.record_of, self.manifest.devices))

    @property
    def layouts(self) -> tuple[DeviceLayout, ...]:
        """The layout of every device file."""
        return self.manifest.layouts

    def part(self, devices: Sequence[int]) -> "ReadyCheckpoint":
        """The same checkpoint, restricted to the files of some devices.

        Raises:
            UsageError: Some of those files are on other hosts.
        """
        if not set(devices) <= set(self.manifest.devices):
            present = ", ".join(map(str, self.manifest.devices))
            wanted = ",".join(map(str, devices))
            raise UsageError(
                f"{self.name}: expected the files of devices {wanted.replace(',', ', ')}, found "
                f"{present} of {self.mesh.size}",
                f"{_command(self)} --only-devices {wanted} --out {quoted(self.root)} --force",
            )
        if tuple(devices) == self.manifest.devices:
            return self
        return replace(self, manifest=replace(self.manifest, devices=tuple(devices)))

    @property
    def is_whole(self) -> bool:
        """Whether it has the files of all devices, and not only those of one host."""
        return len(self.manifest.devices) == self.mesh.size

    @property
    def is_mapped(self) -> bool:
        """Whether tensors are views of files, without memory of their own."""
        return self.manifest.compression is None and not self.is_streamed

    @property
    def tokenizer(self) -> Path | None:
        """The sentencepiece model, if there is one."""
        path = self.root / TOKENIZER
        return path if path.is_file() else None

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    @cached_property
    def _holdings(self) -> dict[str, list[tuple[int, DeviceTensor]]]:
        """Tensor -> its distinct parts, each with the first device that has it."""
        holdings: dict[str, dict[Slices, tuple[int, DeviceTensor]]] = {}
        for device in self.manifest.devices:
            for item in self.layouts[device].tensors:
                parts = holdings.setdefault(item.tensor.key, {})
                parts.setdefault(item.slices, (device, item))
        return {key: list(parts.values()) for key, parts in holdings.items()}

    @cached_property
    def _opened(self) -> dict[int, DeviceFile]:
        return {}

    @property
    def opened(self) -> frozenset[str]:
        """The names of the device files from which something was read."""
        with self._opening:
            return frozenset(self.manifest.record_of(device).name for device in self._opened)

    @cached_property
    def _opening(self) -> Lock:
        return Lock()

    @cached_property
    def _unpacker(self) -> Unpacker:
        return Unpacker()

    def read(self, tensor: LogicalTensor, slices: Slices) -> NDArray[Any]:
        """One part of a tensor.

        Returns:
            A view of a mapped device file if one contains all of this part; otherwise a copy,
            combined from several device files.

        Raises:
            CorruptCheckpointError: A device file does not match the manifest.
            UsageError: A device file that is needed is on another host.
        """
        common = []
        for device, item in self._holdings[tensor.key]:
            both = overlap(slices, item.slices)
            if both == slices:
                return self._part(device, item, slices)
            if all(low < high for low, high in both):
                common.append((device, item, both))
        out: NDArray[Any] = np.empty(extent(slices), tensor.dtype)
        if sum(prod(extent(both)) for _, _, both in common) < out.size:
            self.check_whole()
        for device, item, both in common:
            out[index_of(within(both, slices))] = self._part(device, item, both)
        return out

    @contextmanager
    def reading(
        self, tensor: LogicalTensor, lead: tuple[int, ...], outputs: Slice
    ) -> Iterator[RowReader]:
        """Read some outputs of a matrix, row by row, from all files that have a part of them."""
        stack = tuple((index, index + 1) for index in lead)
        count = outputs[1] - outputs[0]
        yield lambda low, high: self.read(tensor, (*stack, (low, high), outputs)).reshape(-1, count)

    def check_whole(self) -> None:
        """Refuse a checkpoint that does not have the files of all devices.

        Raises:
            UsageError: Some of them are on other hosts.
        """
        if not self.is_whole:
            present = ", ".join(map(str, self.manifest.devices))
            raise UsageError(
                f"{self.name}: expected the files of all devices, found {present} of "
                f"{self.mesh.size}",
                f"{_command(self)} --out {quoted(f'{self.root}-whole')}",
            )

    def _part(self, device: int, item: DeviceTensor, slices: Slices) -> NDArray[Any]:
        """A part of a tensor that one device file contains entirely."""
        inner = within(slices, item.slices)
        shape = extent(item.slices)
        # leading axes with one index, then one axis with a range of indices, then all others
        apart = (axis for axis, (low, high) in enumerate(inner) if high - low > 1)
        axis = next(apart, len(shape) - 1)
        row = prod(shape[axis + 1 :])
        first = 0
        for (low, _), length in zip(inner[: axis + 1], shape, strict=False):
            first = first * length + low
        count = inner[axis][1] - inner[axis][0]
        if axis == len(shape) - 2:
            with self.blaming(device):
                found = self._open(device).columns(item, (first, first + count), inner[-1])
            if found is not None:
                return found.reshape(extent(slices))
        wanted = (slice(None), *index_of(inner[axis + 1 :]))

        def rows(low: int, high: int) -> NDArray[Any]:
            flat = self._elements(device, item, (first + low) * row, (high - low) * row)
            return flat.reshape(high - low, *shape[axis + 1 :])[wanted]

        step = max(1, _AT_A_TIME // (row * item.tensor.dtype.itemsize))
        if self.is_mapped or step >= count or prod(extent(slices)) == count * row:
            return rows(0, count).reshape(extent(slices))
        out: NDArray[Any] = np.empty((count, *extent(inner[axis + 1 :])), item.tensor.dtype)
        for low in range(0, count, step):
            high = min(low + step, count)
            out[low:high] = rows(low, high)
        return out.reshape(extent(slices))

    def _elements(self, device: int, item: DeviceTensor, first: int, count: int) -> NDArray[Any]:
        """Consecutive elements of a tensor in its device file."""
        dtype = item.tensor.dtype
        start, nbytes = item.offset + first * dtype.itemsize, count * dtype.itemsize
        return self.data(device, start, nbytes).view(dtype)

    def data(self, device: int, start: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes of a device file, decompressed.

        Raises:
            CorruptCheckpointError: The file does not match the manifest.
        """
        with self.blaming(device):
            return self._open(device).data(start, nbytes)

    def read_into(self, memory: NDArray[np.uint8], device: int, start: int) -> None:
        """Fill memory with bytes of a device file, decompressed.

        Raises:
            CorruptCheckpointError: The file does not match the manifest.
        """
        with self.blaming(device):
            self._open(device).read_into(memory, start)

    def check_header(self, device: int) -> None:
        """Refuse a device file with another header than the manifest's tensors have.

        Raises:
            CorruptCheckpointError: The file does not match the manifest.
        """
        with self.blaming(device):
            self._open(device)

    def expect(self, device: int, start: int, nbytes: int) -> None:
        """Have the kernel fetch bytes of a device file that will be read soon.

        Raises:
            CorruptCheckpointError: The file does not match the manifest.
        """
        with self.blaming(device):
            self._open(device).expect(start, nbytes)

    @contextmanager
    def blaming(self, device: int) -> Iterator[None]:
        """Report wrong bytes of a device file as damage, and other errors as the machine's.

        Raises:
            CorruptCheckpointError: The file does not match the manifest.
            GrokctlError: The machine cannot read it.
        """
        try:
            yield
        except (ValueError, OSError) as error:
            command = f"grokctl verify {quoted(self.root)}"
            name = self.manifest.record_of(device).name
            if isinstance(error, OSError) and not is_absence(error):
                raise refusal(located(error, self.root / name)) from error
            reason = Reason.UNREADABLE if isinstance(error, OSError) else Reason.ALTERED
            raise corrupt(name, reason, str(error), command) from error

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
    """Read a manifest, and check that every file in it exists and has its size.

    Args:
        root: The folder.
        is_streamed: For readers of the whole checkpoint that need bounded memory.

    Raises:
        CorruptCheckpointError: The manifest is malformed or of another version, or a file is
            missing or has the wrong size.
        UsageError: The folder is not a ready checkpoint.
    """
    checkpoint = read_manifest(root)
    for damage in missing_files(checkpoint):
        raise corrupt(damage.file, damage.reason, damage.detail, reshard_again(checkpoint))
    return replace(checkpoint, is_streamed=is_streamed)


def read_manifest(root: Path, *, is_checked: bool = True) -> ReadyCheckpoint:
    """Read a manifest, and none of the files in it.

    Args:
        root: The folder.
        is_checked: Whether to compare its entries with the layouts; without that, it is only good
            for selecting a checkpoint.

    Raises:
        CorruptCheckpointError: It is malformed or of another version.
        UsageError: The folder is not a ready checkpoint.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise UsageError(
            f"{root}: expected a ready checkpoint, found no {MANIFEST}",
            "grokctl reshard --devices 8",
        )
    try:
        data = read_limited(path, _LARGEST_MANIFEST)
    except TooLargeError as error:
        raise malformed(f"{error.strerror}") from error
    manifest = parse_manifest(data, is_checked=is_checked)
    return ReadyCheckpoint(root, manifest, manifest_sha256=sha256(data).hexdigest())


def missing_files(checkpoint: ReadyCheckpoint) -> Iterator[Damage]:
    """Files of the manifest that are missing or have the wrong size."""
    manifest = checkpoint.manifest
    expected = {record.name: record.nbytes for record in manifest.files}
    if manifest.compression is None:
        expected |= {
            manifest.layouts[device].name: manifest.layouts[device].nbytes
            for device in manifest.devices
        }
    for name, nbytes in sorted(expected.items()):
        path = checkpoint.root / name
        size = regular_size(path)
        damage = file_damage(checkpoint.root, name, expected=nbytes, size=size)
        if damage is not None:
            yield damage


def reshard_again(checkpoint: ReadyCheckpoint) -> str:
    """The command that makes a checkpoint again."""
    devices = ",".join(map(str, checkpoint.manifest.devices))
    some = "" if checkpoint.is_whole else f" --only-devices {devices}"
    return f"{_command(checkpoint)}{some} --out {quoted(checkpoint.root)} --force"


def _command(checkpoint: ReadyCheckpoint) -> str:
    """The command that made a checkpoint, without its destination."""
    manifest = checkpoint.manifest
    command = f"grokctl reshard {quoted(checkpoint.source.folder)} --mesh {checkpoint.mesh}"
    if checkpoint.precision is not Precision.INT8:
        command += f" --precision {checkpoint.precision}"
    if manifest.compression is not None:
        command += f" --compress {manifest.compression}"
    return command
