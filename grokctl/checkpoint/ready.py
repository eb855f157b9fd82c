"""The ready format: a manifest and one safetensors file a device, for a chosen mesh."""

import json
import mmap
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from grokctl import __version__
from grokctl.checkpoint.logical import LogicalTensor, Slices, TensorSource, extent, logical_tensors
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.torrent import printable
from grokctl.errors import (
    CorruptCheckpointError,
    Damage,
    GrokctlError,
    PlacementError,
    Reason,
    UsageError,
    corrupt,
)
from grokctl.model.config import GrokConfig
from grokctl.model.placement import MeshShape, check_mesh
from grokctl.model.precision import Precision
from grokctl.model.tensors import tensor_specs
from grokctl.paths import MANIFEST, TOKENIZER

FORMAT: Final = "grokctl-ready"
VERSION: Final = 1
SUMS: Final = "SHA256SUMS"
ALIGNMENT: Final = 64
"""Bytes; JAX maps arrays on the CPU without a copy from such addresses."""
_LARGEST_HEADER = 100 * 2**20
"""The safetensors library's own limit."""
_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "I8": np.dtype(np.int8),
    "BF16": BFLOAT16,
    "F32": np.dtype("<f4"),
}
_UNTRUSTED: Final = (
    *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError),
)
"""What reading a stranger's JSON as if it were a manifest may raise."""
_CODES: Final = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the weights of a ready checkpoint came from."""

    name: str
    infohash: str | None
    proven: bool
    """Whether every byte was verified against the infohash."""
    verified_at: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One file of a ready checkpoint."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTensor:
    """One tensor in a device's file."""

    tensor: LogicalTensor
    slices: Slices
    offset: int
    """In the file, bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(extent(self.slices)) * self.tensor.dtype.itemsize

    @property
    def end(self) -> int:
        """Where the next tensor begins, or the file ends."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLayout:
    """What a device's file holds, and where."""

    device: int
    name: str
    header: bytes
    """The safetensors header with its length, padded so that tensors are aligned."""
    tensors: tuple[DeviceTensor, ...]
    """By offset."""

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.tensors[-1].end


def device_file(device: int, mesh: MeshShape) -> str:
    """Name of a device's file."""
    return f"device-{device:02d}-of-{mesh.size:02d}.safetensors"


def device_layout(
    source: TensorSource, *, mesh: MeshShape, precision: Precision, device: int
) -> DeviceLayout:
    """Lay out a device's file: the same bytes for the same weights, whatever they are cut from.

    Tensors whose size keeps the next one aligned come first, each group in the order of the
    release: safetensors files have no holes.

    Raises:
        PlacementError: The model does not divide over the mesh.
    """
    check_mesh(mesh, source.config)
    cut = [
        (tensor, tensor.slices(mesh, device, source.config)) for tensor in logical_tensors(source)
    ]
    cut.sort(key=lambda item: prod(extent(item[1])) * item[0].dtype.itemsize % ALIGNMENT != 0)
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "mesh": str(mesh),
            "device": str(device),
            "precision": str(precision),
        }
    }
    begin = 0
    for tensor, slices in cut:
        shape = extent(slices)
        end = begin + prod(shape) * tensor.dtype.itemsize
        entries[tensor.key] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return DeviceLayout(
        device=device,
        name=device_file(device, mesh),
        header=header,
        tensors=tuple(
            DeviceTensor(
                tensor=tensor,
                slices=slices,
                offset=len(header) + entries[tensor.key]["data_offsets"][0],
            )
            for tensor, slices in cut
        ),
    )


@dataclass(frozen=True, kw_only=True)
class ReadyCheckpoint:
    """A resharded checkpoint whose files are all there and have the size they should have.

    It is a `TensorSource`: any part of any tensor can be read, whatever the mesh it was cut for.
    """

    root: Path
    config: GrokConfig
    precision: Precision
    mesh: MeshShape
    source: Source
    groups: Mapping[str, int]
    files: tuple[FileRecord, ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.resolve().name

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
    def layouts(self) -> tuple[DeviceLayout, ...]:
        """What each device's file holds."""
        return tuple(
            device_layout(self, mesh=self.mesh, precision=self.precision, device=device)
            for device in range(self.mesh.size)
        )

    @cached_property
    def _holdings(self) -> dict[str, list[tuple[int, DeviceTensor]]]:
        holdings: dict[str, list[tuple[int, DeviceTensor]]] = {}
        for layout in self.layouts:
            for held in layout.tensors:
                holdings.setdefault(held.tensor.key, []).append((layout.device, held))
        return holdings

    @cached_property
    def _mapped(self) -> dict[int, mmap.mmap]:
        return {}

    def read(self, tensor: LogicalTensor, slices: Slices) -> NDArray[Any]:
        """One part of a tensor.

        Returns:
            A view of a mapped device file when one holds exactly this part, else a copy put
            together from all files that hold some of it.

        Raises:
            CorruptCheckpointError: A device file is not the one that the manifest describes.
        """
        parts = self._holdings[tensor.key]
        for device, held in parts:
            if held.slices == slices:
                return self._view(device, held)
        out: NDArray[Any] = np.empty(extent(slices), tensor.dtype)
        for device, held in parts:
            common = tuple(
                (max(a, c), min(b, d)) for (a, b), (c, d) in zip(slices, held.slices, strict=True)
            )
            if all(low < high for low, high in common):
                out[_relative(common, slices)] = self._view(device, held)[
                    _relative(common, held.slices)
                ]
        return out

    def _view(self, device: int, held: DeviceTensor) -> NDArray[Any]:
        mapped = self._mapped.get(device)
        if mapped is None:
            mapped = self._mapped[device] = self._map(device)
        flat: NDArray[Any] = np.frombuffer(
            mapped,
            dtype=held.tensor.dtype,
            count=held.nbytes // held.tensor.dtype.itemsize,
            offset=held.offset,
        )
        return flat.reshape(extent(held.slices))

    def _map(self, device: int) -> mmap.mmap:
        layout = self.layouts[device]
        path = self.root / layout.name
        with path.open("rb") as file:
            if file.read(len(layout.header)) != layout.header:
                raise corrupt(
                    layout.name,
                    Reason.ALTERED,
                    f"its header is not that of device {device} of {self.mesh}",
                    f"grokctl verify {self.root}",
                )
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _relative(slices: Slices, origin: Slices) -> tuple[slice, ...]:
    return tuple(
        slice(low - start, high - start)
        for (low, high), (start, _) in zip(slices, origin, strict=True)
    )


def manifest_bytes(
    source: TensorSource,
    layouts: Sequence[DeviceLayout],
    *,
    mesh: MeshShape,
    precision: Precision,
    origin: Source,
    files: Sequence[FileRecord],
) -> bytes:
    """The manifest of a ready checkpoint; its presence makes the folder one."""
    held = [{item.tensor.key: item.slices for item in layout.tensors} for layout in layouts]
    values = {
        "format": FORMAT,
        "version": VERSION,
        "created_by": f"grokctl {__version__}",
        "source": asdict(origin),
        "config": source.config.to_dict(),
        "precision": str(precision),
        "mesh": {"expert": mesh.expert, "model": mesh.model},
        "tensors": {
            tensor.key: {
                "shape": tensor.shape,
                "dtype": _CODES[tensor.dtype],
                "slices": [slices[tensor.key] for slices in held],
            }
            for tensor in logical_tensors(source)
        },
        "files": [
            {"name": file.name, "bytes": file.nbytes, "sha256": file.sha256} for file in files
        ],
    }
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


def open_ready(root: Path) -> ReadyCheckpoint:
    """Read a manifest, and check that every file it names is there with its size.

    Raises:
        CorruptCheckpointError: The manifest is malformed or of another version, or a file is
            missing or has another size.
        UsageError: There is no ready checkpoint here.
    """
    checkpoint = read_manifest(root)
    for damage in missing_files(checkpoint):
        raise corrupt(damage.file, damage.reason, damage.detail, cut_again(checkpoint))
    return checkpoint


def read_manifest(root: Path) -> ReadyCheckpoint:
    """Read a manifest, and look at no file that it names.

    Raises:
        CorruptCheckpointError: It is malformed or of another version.
        UsageError: There is no ready checkpoint here.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise UsageError(
            f"{root}: holds no {MANIFEST}, so no ready checkpoint", "grokctl reshard --devices 8"
        )
    if path.stat().st_size > _LARGEST_HEADER:
        raise _malformed(f"is {path.stat().st_size} bytes")
    try:
        checkpoint = _parse(root, json.loads(path.read_bytes().decode()))
    except _UNTRUSTED as error:
        raise _malformed(f"is no manifest ({type(error).__name__}: {error})") from error
    for name in sorted({layout.name for layout in checkpoint.layouts} - _names(checkpoint)):
        raise _malformed(f"says nothing about {name}")
    return checkpoint


def _parse(root: Path, values: Any) -> ReadyCheckpoint:
    if values["format"] != FORMAT or values["version"] != VERSION:
        found = f"{values['format']} version {values['version']}"
        raise _malformed(
            f"expected {FORMAT} version {VERSION}, found {found}",
            "install the grokctl that wrote it, or reshard again",
        )
    config = GrokConfig.from_dict(values["config"], file=MANIFEST)
    mesh = MeshShape(int(values["mesh"]["expert"]), int(values["mesh"]["model"]))
    try:
        check_mesh(mesh, config)
    except PlacementError as error:
        raise _malformed(str(error)) from error
    source = values["source"]
    checkpoint = ReadyCheckpoint(
        root=root,
        config=config,
        precision=Precision(values["precision"]),
        mesh=mesh,
        source=Source(
            name=printable(str(source["name"]), limit=255),
            infohash=_shown(source["infohash"]),
            proven=source["proven"] is True,
            verified_at=_shown(source["verified_at"]),
        ),
        groups=_groups(config, values["tensors"]),
        files=tuple(_file_record(entry) for entry in values["files"]),
    )
    _compare_tensors(checkpoint, values["tensors"])
    return checkpoint


def _groups(config: GrokConfig, tensors: Any) -> dict[str, int]:
    """Scale rows by parameter, read from the shapes of the scales."""
    groups = {}
    for spec in tensor_specs(config):
        scales = tensors.get(f"{spec.name}.scales")
        rows = 0 if scales is None else scales["shape"][-2]
        if type(rows) is not int or rows < 0 or (rows and spec.shape[-2] % rows):
            raise _malformed(f"{spec.name} has {rows!r} scale groups")
        groups[spec.name] = rows
    return groups


def _compare_tensors(checkpoint: ReadyCheckpoint, tensors: Any) -> None:
    """The slices follow from mesh and config; the manifest must say the same."""
    expected = {
        tensor.key: [list(tensor.shape), _CODES[tensor.dtype]]
        for tensor in logical_tensors(checkpoint)
    }
    found = {key: [entry["shape"], entry["dtype"]] for key, entry in tensors.items()}
    if expected != found:
        wrong = sorted(set(expected) ^ set(found)) or [
            key for key in expected if expected[key] != found[key]
        ]
        key = wrong[0]
        raise _malformed(f"{key}: expected {expected.get(key)}, found {found.get(key)}")
    for layout in checkpoint.layouts:
        for held in layout.tensors:
            slices = [list(bounds) for bounds in held.slices]
            if tensors[held.tensor.key]["slices"][layout.device] != slices:
                raise _malformed(f"{held.tensor.key}: expected {slices} on {layout.name}")


def _file_record(entry: Any) -> FileRecord:
    record = FileRecord(
        name=str(entry["name"]), nbytes=int(entry["bytes"]), sha256=str(entry["sha256"])
    )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", record.name):
        raise _malformed(f"names the file {record.name!r}")
    if not re.fullmatch(r"[0-9a-f]{64}", record.sha256):
        raise _malformed(f"{record.name} has no sha256")
    return record


def missing_files(checkpoint: ReadyCheckpoint) -> Iterator[Damage]:
    """Files that the manifest names and that are not there, or have another size."""
    expected = {layout.name: layout.nbytes for layout in checkpoint.layouts}
    records = {record.name: record.nbytes for record in checkpoint.files}
    for name, nbytes in sorted((records | expected).items()):
        path = checkpoint.root / name
        whole = ((0, nbytes),) if nbytes else ()
        if path.is_file():
            found = path.stat().st_size
            detail = f"expected {nbytes} bytes, found {found}"
            if found < nbytes:
                yield Damage(name, Reason.SHORT, detail, ((found, nbytes),))
            if found > nbytes:
                yield Damage(name, Reason.LONG, detail, ((nbytes, found),))
        elif os.path.lexists(path):
            yield Damage(name, Reason.UNREADABLE, "is no regular file", whole)
        else:
            yield Damage(name, Reason.MISSING, f"expected {nbytes} bytes", whole)


def _names(checkpoint: ReadyCheckpoint) -> set[str]:
    return {record.name for record in checkpoint.files}


def cut_again(checkpoint: ReadyCheckpoint) -> str:
    """The command that makes a checkpoint anew."""
    name = shlex.quote(checkpoint.source.name)
    return f"grokctl reshard {name} --mesh {checkpoint.mesh} --force"


def _shown(value: object) -> str | None:
    return None if value is None else printable(str(value))


def _malformed(detail: str, hint: str | None = None) -> GrokctlError:
    error = corrupt(MANIFEST, Reason.MALFORMED, printable(detail, limit=300), hint)
    assert isinstance(error, CorruptCheckpointError)
    return error
