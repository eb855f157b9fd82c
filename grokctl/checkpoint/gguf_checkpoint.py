"""A GGUF export as a source of tensors: the integers and scales that were written come back."""

import json
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.blocks import BLOCK, Q4_0, Q8_0, codes_turned_back, from_q4_0, turned_back
from grokctl.checkpoint.export_manifest import Export, open_export
from grokctl.checkpoint.gguf import SUFFIX, Gguf, GgufTensor, TensorType, read_gguf
from grokctl.checkpoint.gguf_model import STORAGE, gguf_name, gguf_shape
from grokctl.checkpoint.manifest import UNTRUSTED, FileRecord, Source
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.published import on_its_source
from grokctl.checkpoint.rows import read_into
from grokctl.checkpoint.tensor_source import LogicalTensor, RowReader, Slices, Storage, extent
from grokctl.errors import CorruptCheckpointError, PlacementError, Reason, UsageError, corrupt
from grokctl.model.config import GrokConfig
from grokctl.model.placement import Slice
from grokctl.model.precision import Precision
from grokctl.model.tensors import TensorSpec, tensor_specs
from grokctl.os_errors import is_absence, located, refusal
from grokctl.paths import quoted
from grokctl.text import printable

_TYPES: Final = {
    Precision.INT8: TensorType.Q8_0,
    Precision.INT4: TensorType.Q4_0,
    Precision.BFLOAT16: TensorType.BF16,
    Precision.FLOAT32: TensorType.F32,
}
_BLOCKS: Final = {TensorType.Q8_0: Q8_0, TensorType.Q4_0: Q4_0}
_CHUNK: Final = 2**23
"""Values that are read at a time: of a few inputs of every output, which lie far apart."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a parameter lies."""

    file: str
    offset: int
    tensor: GgufTensor

    @property
    def row_nbytes(self) -> int:
        values, nbytes = self.tensor.type.block
        return self.tensor.shape[-1] // values * nbytes


@dataclass(frozen=True)
class GgufCheckpoint:
    """An export in GGUF whose tensors can be read: it is a `TensorSource`."""

    export: Export
    storage: Storage
    shifts: Mapping[str, tuple[int, ...]]
    """The powers of two by which the scales of each matrix were multiplied, by parameter."""
    places: Mapping[str, _Place]
    """By parameter."""

    @property
    def root(self) -> Path:
        """The folder."""
        return self.export.root

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.export.name

    @property
    def verb(self) -> str:
        """The command that makes such a folder."""
        return self.export.verb

    @property
    def manifest_name(self) -> str:
        """The name of its manifest."""
        return self.export.manifest_name

    @property
    def manifest_sha256(self) -> str:
        """Of the manifest's bytes, as they were read."""
        return self.export.manifest_sha256

    @property
    def records(self) -> Mapping[str, FileRecord]:
        """Every file except the manifest and the checksums, by name."""
        return self.export.records

    @property
    def source(self) -> Source:
        """The checkpoint that it was made from."""
        return self.export.source

    @property
    def tokenizer(self) -> Path | None:
        """The sentencepiece model, if there is one."""
        return self.export.tokenizer

    @property
    def config(self) -> GrokConfig:
        """The model."""
        return self.storage.config

    @property
    def precision(self) -> Precision:
        """The precision of its weights."""
        return self.storage.precision

    @property
    def tensor_files(self) -> tuple[FileRecord, ...]:
        """The files with tensors, in order."""
        return tuple(self.records[name] for name in _gguf_names(self.export))

    @property
    def opened(self) -> frozenset[str]:
        """The names of the files from which something was read."""
        with self._opening:
            return frozenset(self._handles)

    @cached_property
    def _opening(self) -> Lock:
        return Lock()

    @cached_property
    def _handles(self) -> dict[str, int]:
        return {}

    def read(self, tensor: LogicalTensor, slices: Slices) -> NDArray[Any]:
        """A part of a stored tensor.

        Raises:
            CorruptCheckpointError: A file changed.
        """
        if not tensor.is_matrix and not tensor.is_scales:
            return self._plain(tensor, slices)
        *lead, rows, outputs = slices
        out = np.empty(extent(slices), tensor.dtype)
        for index in np.ndindex(out.shape[:-2]):
            matrix = tuple(low + place for (low, _), place in zip(lead, index, strict=True))
            if tensor.is_scales:
                out[index] = self._scales(tensor, matrix, rows, outputs)
            else:
                with self.reading(tensor, matrix, outputs) as read:
                    out[index] = read(*rows)
        return out

    @contextmanager
    def reading(
        self, tensor: LogicalTensor, lead: tuple[int, ...], outputs: Slice
    ) -> Iterator[RowReader]:
        """Read some outputs of a matrix, row by row: a few inputs of every output at a time."""
        height = self._height(tensor)
        total = tensor.shape[-2]
        step = max(height, _CHUNK // (outputs[1] - outputs[0]) // height * height)
        kept: list[Any] = [(0, 0), None]

        def read(low: int, high: int) -> NDArray[Any]:
            (first, last), rows = kept
            if not first <= low < high <= last:
                first = low // height * height
                last = min(total, max(-(-high // height) * height, first + step))
                rows = self._rows(tensor, lead, (first, last), outputs)
                kept[:] = [(first, last), rows]
            part: NDArray[Any] = rows[low - first : high - first]
            return part

        yield read

    def _height(self, tensor: LogicalTensor) -> int:
        """Stored rows of a block."""
        return {Precision.INT8: BLOCK, Precision.INT4: BLOCK // 2}.get(tensor.precision, 1)

    def _rows(
        self, tensor: LogicalTensor, lead: tuple[int, ...], rows: Slice, outputs: Slice
    ) -> NDArray[Any]:
        """Whole blocks of rows, `(rows, outputs)`, contiguous."""
        place = self.places[tensor.spec.name]
        height = self._height(tensor)
        first, last = rows[0] // height, rows[1] // height
        dtype = _BLOCKS.get(place.tensor.type, tensor.dtype)
        blocks = np.empty((outputs[1] - outputs[0], last - first), dtype)
        start = self._offset(place, lead, outputs[0]) + first * dtype.itemsize
        self._gather(place, blocks, start)
        if place.tensor.type not in _BLOCKS:
            return turned_back(blocks.view(f"u{dtype.itemsize}")).view(dtype)
        codes = codes_turned_back(blocks["codes"])
        return from_q4_0(codes) if tensor.precision is Precision.INT4 else codes

    def _scales(
        self, tensor: LogicalTensor, matrix: tuple[int, ...], groups: Slice, outputs: Slice
    ) -> NDArray[Any]:
        """bfloat16 scales of a matrix, `(groups, outputs)`: those of the first blocks of groups."""
        place = self.places[tensor.spec.name]
        width, nbytes = tensor.width // BLOCK, place.tensor.type.block[1]
        halves = np.empty((groups[1] - groups[0], outputs[1] - outputs[0], 1), "<f2")
        start = self._offset(place, matrix, outputs[0])
        for row, group in enumerate(range(*groups)):
            self._gather(place, halves[row], start + group * width * nbytes)
        shape = tensor.spec.shape[:-2]
        shifts = self.shifts.get(tensor.spec.name)
        shift = (
            0
            if shifts is None
            else shifts[int(np.ravel_multi_index(matrix, shape) if shape else 0)]
        )
        wide = np.ldexp(halves[:, :, 0].astype(np.float32), -shift)
        stored = wide.astype(BFLOAT16)
        if (stored.astype(np.float32) != wide).any():
            raise self._damaged(place.file, "has a scale that is no bfloat16")
        return stored

    def _offset(self, place: _Place, matrix: tuple[int, ...], row: int) -> int:
        """Where a row of a matrix begins in its file."""
        *stack, count, _ = place.tensor.shape
        index = 0
        for one, length in zip(matrix, stack, strict=True):
            index = index * length + one
        return place.offset + (index * count + row) * place.row_nbytes

    def _gather(self, place: _Place, out: NDArray[Any], start: int) -> None:
        """Fill each row of an array from the same place in consecutive rows of a file."""
        handle = self._open(place.file)
        flat = out.view(np.uint8).reshape(len(out), -1)
        with self._blaming(place.file):
            if flat.shape[1] == place.row_nbytes:
                read_into(flat.reshape(-1), handle, start)
                return
            for number, row in enumerate(flat):
                read_into(row, handle, start + number * place.row_nbytes)

    def _plain(self, tensor: LogicalTensor, slices: Slices) -> NDArray[Any]:
        """Rows of the embedding, or a part of a norm: float32 in the order of the release."""
        place = self.places[tensor.spec.name]
        (low, high), *rest = slices
        row = prod(tensor.shape[1:])
        out = np.empty((high - low) * row, "<f4")
        with self._blaming(place.file):
            read_into(out.view(np.uint8), self._open(place.file), place.offset + 4 * low * row)
        whole: NDArray[Any] = out.reshape(high - low, *tensor.shape[1:])
        return whole[(slice(None), *(slice(*bounds) for bounds in rest))]

    def _open(self, name: str) -> int:
        with self._opening, self._blaming(name):
            handle = self._handles.get(name)
            if handle is None:
                handle = os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC)
                self._handles[name] = handle
                weakref.finalize(self, os.close, handle)
            return handle

    @contextmanager
    def _blaming(self, name: str) -> Iterator[None]:
        """Report a file that ends early as damage, and other errors as the machine's."""
        try:
            yield
        except OSError as error:
            if error.errno is not None and not is_absence(error):
                raise refusal(located(error, self.root / name)) from error
            raise self._damaged(name, "changed since it was opened") from error

    def _damaged(self, name: str, detail: str) -> CorruptCheckpointError:
        return corrupt(name, Reason.ALTERED, detail, f"grokctl verify {quoted(self.root)}")


def open_gguf(root: Path) -> GgufCheckpoint:
    """Open an export in GGUF to read its tensors.

    Raises:
        CorruptCheckpointError: Its manifest or a header is malformed, or a file is missing or has
            another size.
        UsageError: It is of another format.
        PlacementError: Some of its tensors are not in the precision of the others.
    """
    export = open_export(root)
    names = _gguf_names(export)
    if not names:
        raise UsageError(
            f"{root}: expected an export in GGUF, found one in {export.manifest.format}",
            on_its_source(export),
        )
    headers = {name: read_gguf(root / name) for name in names}
    storage, shifts = _stored(names[0], headers[names[0]], hint=on_its_source(export))
    if storage.config != export.manifest.config:
        raise _malformed(names[0], f"is of another model than {export.manifest_name}")
    places = {}
    found = {
        tensor.name: _Place(name, offset, tensor)
        for name, header in headers.items()
        for tensor, offset in zip(header.tensors, header.offsets, strict=True)
    }
    for spec in tensor_specs(storage.config):
        place = found.pop(gguf_name(spec), None)
        if place is None or place.tensor.shape != gguf_shape(spec):
            actual = "none" if place is None else f"{place.tensor.shape}"
            expected = f"{gguf_name(spec)}: expected {gguf_shape(spec)}, found {actual}"
            raise _malformed(names[0] if place is None else place.file, expected)
        _require_type(spec, place, storage, hint=on_its_source(export))
        places[spec.name] = place
    if found:
        place = found[min(found)]
        raise _malformed(place.file, f"has {place.tensor.name}, which Grok-1 has not")
    return GgufCheckpoint(export=export, storage=storage, shifts=shifts, places=places)


def _gguf_names(export: Export) -> list[str]:
    """The files with tensors, in order: their numbers have leading zeros."""
    return sorted(name for name in export.records if name.endswith(SUFFIX))


def _stored(
    name: str, header: Gguf, *, hint: str | None
) -> tuple[Storage, dict[str, tuple[int, ...]]]:
    """How a file says that its weights are stored."""
    text = header.metadata.get(STORAGE)
    if not isinstance(text, str):
        raise _malformed(name, f"has no {STORAGE}: grokctl did not write it")
    try:
        values = json.loads(text)
        config = _config(name, values["config"])
        precision = Precision(values["precision"])
        float32 = [printable(str(one), limit=255) for one in values["float32"]]
        if float32:
            message = f"expected all weights as {precision}, found {float32[0]} as float32"
            raise PlacementError(f"{name}: {message}", hint)
        groups = {spec.name: 0 for spec in tensor_specs(config)}
        for spec in tensor_specs(config):
            count = values["groups"].get(spec.name, 0)
            has_groups = precision in {Precision.INT8, Precision.INT4} and spec.is_quantized
            if type(count) is not int or bool(count) != has_groups:
                raise _malformed(name, f"{spec.name} has {count!r} scale groups")
            if count and (count < 0 or spec.shape[-2] % (BLOCK * count)):
                raise _malformed(name, f"{spec.name} has {count!r} scale groups")
            groups[spec.name] = count
        shifts = {str(key): tuple(int(one) for one in own) for key, own in values["shifts"].items()}
        _require_shifts(name, config, shifts)
    except UNTRUSTED as error:
        detail = f"{STORAGE} makes no sense ({type(error).__name__}: {error})"
        raise _malformed(name, detail) from error
    return Storage(config=config, precision=precision, groups=groups), shifts


def _config(name: str, values: Any) -> GrokConfig:
    try:
        return GrokConfig.from_dict(values, file=name)
    except CorruptCheckpointError as error:
        raise _malformed(name, error.damage[0].detail) from error


def _require_shifts(name: str, config: GrokConfig, shifts: Mapping[str, tuple[int, ...]]) -> None:
    """Check that exponents are of weights, and those of float32."""
    specs = {spec.name: spec for spec in tensor_specs(config)}
    for key, own in shifts.items():
        spec = specs.get(key)
        count = prod(spec.shape[:-2]) if spec is not None and spec.is_quantized else 0
        if len(own) != count or not all(-300 < one < 300 for one in own):  # noqa: PLR2004
            raise _malformed(name, f"{key} has the exponents {own}")


def _require_type(spec: TensorSpec, place: _Place, storage: Storage, *, hint: str | None) -> None:
    kind = _TYPES[storage.precision] if spec.is_quantized else TensorType.F32
    if place.tensor.type is kind:
        return
    raise PlacementError(
        f"{place.tensor.name}: expected {kind.name}, found {place.tensor.type.name}",
        hint,
    )


def _malformed(name: str, detail: str) -> CorruptCheckpointError:
    return corrupt(name, Reason.MALFORMED, printable(detail, limit=300))
