"""The manifest of a ready checkpoint: typed values, JSON, and strict parsing of untrusted input."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final

from grokctl import __version__
from grokctl.checkpoint.frames import LARGEST_FRAME, SUFFIX, Compression, Frames
from grokctl.checkpoint.layout import CODES, FORMAT, DeviceLayout, device_layouts
from grokctl.checkpoint.tensor_source import Storage
from grokctl.checkpoint.trust import LONGEST
from grokctl.errors import (
    CorruptCheckpointError,
    PlacementError,
    Reason,
    UsageError,
    corrupt,
)
from grokctl.model.config import GrokConfig
from grokctl.model.placement import MeshShape, check_mesh
from grokctl.model.precision import Precision
from grokctl.model.tensors import tensor_specs
from grokctl.paths import MANIFEST
from grokctl.text import printable

_VERSION: Final = 1
UNTRUSTED: Final = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""Exceptions that untrusted JSON may raise when it is read as a manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The source of a ready checkpoint's weights."""

    name: str
    infohash: str | None
    proven: bool
    """Whether every byte was verified against the infohash."""
    verified_at: str | None
    precision: Precision = Precision.INT8
    """The precision of the source: a release, or another ready checkpoint."""
    root_of_trust: str | None = None
    """Of the infohash, in words; of a hub's hashes, if those alone prove it. None if nothing does,
    or by an earlier version."""

    @property
    def folder(self) -> str:
        """The name as a safe folder name, as it may be untrusted; never looks like an option."""
        return re.sub(r"[^\w.+-]", "_", self.name)[:100].lstrip(".-") or "checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One file of a ready checkpoint."""

    name: str
    nbytes: int
    sha256: str
    frames: Frames | None = None
    """The frames of a compressed device file."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a ready checkpoint."""

    storage: Storage
    mesh: MeshShape
    source: Source
    devices: tuple[int, ...]
    """Devices whose files the folder contains: all of the mesh, or those of one host."""
    compression: Compression | None
    errors: Mapping[str, float]
    """Relative root mean square error against the source of each weight that changed precision."""
    files: tuple[FileRecord, ...]

    @cached_property
    def layouts(self) -> tuple[DeviceLayout, ...]:
        """The layout of every device file, including those on other hosts."""
        return device_layouts(self.storage, self.mesh)

    @cached_property
    def records(self) -> Mapping[str, FileRecord]:
        """The files by name."""
        return {record.name: record for record in self.files}

    def record_of(self, device: int) -> FileRecord:
        """The entry of a device file."""
        return self.records[file_name(self.layouts[device], self.compression)]


def file_name(layout: DeviceLayout, compression: Compression | None) -> str:
    """The name of a device file."""
    return layout.name if compression is None else layout.name + SUFFIX


def manifest_bytes(manifest: Manifest) -> bytes:
    """A manifest as JSON; its presence makes the folder a ready checkpoint."""
    by_device = [
        {item.tensor.key: item.slices for item in layout.tensors} for layout in manifest.layouts
    ]
    values = {
        "format": FORMAT,
        "version": _VERSION,
        "created_by": f"grokctl {__version__}",
        "source": source_values(manifest.source),
        "config": manifest.storage.config.to_dict(),
        "precision": str(manifest.storage.precision),
        "mesh": {"expert": manifest.mesh.expert, "model": manifest.mesh.model},
        "devices": manifest.devices,
        "compression": None if manifest.compression is None else str(manifest.compression),
        "tensors": {
            tensor.key: {
                "shape": tensor.shape,
                "dtype": CODES[tensor.dtype],
                "slices": [slices[tensor.key] for slices in by_device],
            }
            | (
                {"relative_rms_error": manifest.errors[tensor.key]}
                if tensor.key in manifest.errors
                else {}
            )
            for tensor in manifest.storage.tensors
        },
        "files": [_file_values(file) for file in manifest.files],
    }
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


def source_values(source: Source) -> dict[str, Any]:
    """A source as JSON values."""
    values = asdict(source)
    if source.root_of_trust is None:
        del values["root_of_trust"]
    return values


def source_of(values: Any) -> Source:
    """Read a source from untrusted JSON; what it raises is in `UNTRUSTED`."""
    return Source(
        name=printable(str(values["name"]), limit=255),
        infohash=_shown(values["infohash"]),
        proven=values["proven"] is True,
        verified_at=_shown(values["verified_at"]),
        precision=Precision(values.get("precision", Precision.INT8)),
        root_of_trust=_words(values.get("root_of_trust")),
    )


def _file_values(file: FileRecord) -> dict[str, Any]:
    values: dict[str, Any] = {"name": file.name, "bytes": file.nbytes, "sha256": file.sha256}
    return values if file.frames is None else values | {"frames": file.frames.sizes}


def parse_manifest(data: bytes, *, is_checked: bool = True) -> Manifest:
    """Read a manifest; redundant entries are recomputed and compared.

    Args:
        data: The bytes of the file.
        is_checked: Whether to compare tensors and files with the layouts, which takes as long as
            computing all of those.

    Raises:
        CorruptCheckpointError: It is malformed, of another version, or contradicts itself.
    """
    try:
        return _parse(json.loads(data.decode()), is_checked=is_checked)
    except UNTRUSTED as error:
        raise malformed(f"is not a manifest ({type(error).__name__}: {error})") from error


def _parse(values: Any, *, is_checked: bool) -> Manifest:
    if values["format"] != FORMAT or values["version"] != _VERSION:
        actual = f"{values['format']} version {values['version']}"
        raise malformed(
            f"expected {FORMAT} version {_VERSION}, found {actual}",
            "install the grokctl that wrote it, or reshard again",
        )
    config = GrokConfig.from_dict(values["config"], file=MANIFEST)
    mesh = MeshShape(int(values["mesh"]["expert"]), int(values["mesh"]["model"]))
    tensors = values["tensors"]
    packed = values.get("compression")
    try:
        check_mesh(mesh, config)
        manifest = Manifest(
            storage=_storage(config, Precision(values["precision"]), tensors),
            mesh=mesh,
            source=source_of(values["source"]),
            devices=_devices(values.get("devices", list(range(mesh.size))), mesh),
            compression=None if packed is None else Compression.parse(packed),
            errors=_errors(tensors),
            files=tuple(map(_file_record, values["files"])),
        )
        if is_checked:
            _compare_tensors(manifest, tensors)
    except (PlacementError, UsageError) as error:
        raise malformed(str(error)) from error
    if is_checked:
        _check_files(manifest)
    return manifest


def _storage(config: GrokConfig, precision: Precision, tensors: Any) -> Storage:
    """The storage, with the number of scale groups from the shapes of the scales."""
    is_grouped = precision in {Precision.INT8, Precision.INT4}
    groups = {}
    for spec in tensor_specs(config):
        scales = tensors.get(f"{spec.name}.scales")
        rows = 0 if scales is None else scales["shape"][-2]
        inputs = spec.shape[-2] if len(spec.shape) > 1 else 0
        if type(rows) is not int or rows < 0 or (rows and (not inputs or inputs % rows)):
            raise malformed(f"{spec.name} has {rows!r} scale groups")
        if bool(rows) != (is_grouped and spec.is_quantized):
            raise malformed(f"{spec.name} has {rows} scale groups in {precision}")
        if precision is Precision.INT4 and rows and inputs // rows % 2:
            raise malformed(f"{spec.name} has int4 groups of {inputs // rows}")
        groups[spec.name] = rows
    return Storage(config=config, precision=precision, groups=groups)


def _devices(entry: Any, mesh: MeshShape) -> tuple[int, ...]:
    devices = tuple(entry)
    if (
        not devices
        or any(type(device) is not int for device in devices)
        or devices != tuple(sorted(set(devices) & set(range(mesh.size))))
    ):
        raise malformed(f"expected devices of {mesh} in ascending order, found {entry!r}")
    return devices


def _errors(tensors: Any) -> dict[str, float]:
    errors = {}
    for key, entry in tensors.items():
        error = entry.get("relative_rms_error")
        if error is None:
            continue
        if type(error) not in {int, float} or not 0 <= error < math.inf:
            raise malformed(f"{key}: expected an error of 0 or more, found {error!r}")
        errors[key] = float(error)
    return errors


def _compare_tensors(manifest: Manifest, tensors: Any) -> None:
    """Compare shapes and slices with those that follow from mesh and config."""
    expected = {
        tensor.key: [list(tensor.shape), CODES[tensor.dtype]] for tensor in manifest.storage.tensors
    }
    actual = {key: [entry["shape"], entry["dtype"]] for key, entry in tensors.items()}
    if expected != actual:
        wrong = sorted(set(expected) ^ set(actual)) or [
            key for key in expected if expected[key] != actual[key]
        ]
        key = wrong[0]
        raise malformed(f"{key}: expected {expected.get(key)}, found {actual.get(key)}")
    for layout in manifest.layouts:
        for item in layout.tensors:
            slices = [list(bounds) for bounds in item.slices]
            if tensors[item.tensor.key]["slices"][layout.device] != slices:
                raise malformed(f"{item.tensor.key}: expected {slices} on {layout.name}")


def _check_files(manifest: Manifest) -> None:
    for device in manifest.devices:
        layout = manifest.layouts[device]
        name = file_name(layout, manifest.compression)
        record = manifest.records.get(name)
        if record is None:
            raise malformed(f"has no entry for {name}")
        if (record.frames is None) != (manifest.compression is None):
            raise malformed(f"{name}: frames and compression contradict each other")
        if record.frames is None:
            continue
        starts = set(record.frames.plain_starts)
        begins = {len(layout.header), layout.nbytes, *(item.offset for item in layout.tensors)}
        if record.frames.plain_starts[-1] != layout.nbytes or not begins <= starts:
            raise malformed(f"{name}: the frames do not match the tensors")
        if record.frames.packed_starts[-1] != record.nbytes:
            raise malformed(f"{name}: the frames do not add up to {record.nbytes} bytes")


def _file_record(entry: Any) -> FileRecord:
    frames = entry.get("frames")
    record = FileRecord(
        name=str(entry["name"]),
        nbytes=int(entry["bytes"]),
        sha256=str(entry["sha256"]),
        frames=None if frames is None else _frames(frames),
    )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", record.name):
        raise malformed(f"has the invalid file name {record.name!r}")
    if not re.fullmatch(r"[0-9a-f]{64}", record.sha256):
        raise malformed(f"{record.name} has no valid sha256")
    return record


def _frames(entries: Any) -> Frames:
    sizes = tuple((plain, packed) for plain, packed in entries)
    for plain, packed in sizes:
        if type(plain) is not int or type(packed) is not int:
            raise malformed("has a frame without a size")
        if not (0 < plain <= LARGEST_FRAME and 0 < packed <= 2 * LARGEST_FRAME):
            raise malformed(f"has a frame of {packed} bytes that decompresses to {plain}")
    return Frames(sizes)


def _shown(value: object) -> str | None:
    return None if value is None else printable(str(value))


def _words(value: object) -> str | None:
    return None if value is None else printable(str(value), limit=LONGEST)


def malformed(detail: str, hint: str | None = None) -> CorruptCheckpointError:
    """The error for a manifest that is not valid."""
    return corrupt(MANIFEST, Reason.MALFORMED, printable(detail, limit=300), hint)
