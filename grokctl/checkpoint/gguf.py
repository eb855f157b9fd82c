"""GGUF containers: headers that are written before the data, and read from untrusted files.

Source of the format: the file `docs/gguf.md` of ggml. Little endian: magic, version, counts,
metadata, descriptions of tensors, padding, data. Tensors lie in the order of their descriptions.
"""

import os
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from grokctl.errors import Reason, corrupt
from grokctl.os_errors import NotAFileError
from grokctl.text import printable

SUFFIX: Final = ".gguf"
ALIGNMENT: Final = 32
"""Bytes; the format's default."""
_MAGIC: Final = b"GGUF"
_VERSION: Final = 3
_TEXT: Final = 8
_ARRAY: Final = 9
_NUMBERS: Final[Mapping[int, np.dtype[Any]]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
"""Types of values by their codes; 8 is a text, and 9 an array."""
_CODES: Final = {dtype: code for code, dtype in _NUMBERS.items()}
_LONGEST_NAME: Final = 63
"""Bytes of a tensor's name: ggml's buffer has 64."""
_MOST_AXES: Final = 4
_LARGEST_HEADER: Final = 64 * 2**20
"""Bytes that an untrusted file may have before its data: Grok-1's vocabulary takes four million."""
_MOST_VALUES: Final = 2**12
_MOST_TENSORS: Final = 2**16
_MOST_TEXTS: Final = 2**20
"""Texts in arrays, over a whole file: each takes far more memory than its bytes."""

Value = str | tuple[str, ...] | np.generic | NDArray[Any]
"""A value of metadata; numbers and arrays have the dtypes of the format."""


class TensorType(IntEnum):
    """Types of tensors that grokctl writes, by their codes in ggml."""

    F32 = 0
    Q4_0 = 2
    Q8_0 = 8
    BF16 = 30

    @property
    def block(self) -> tuple[int, int]:
        """Values of a block along the last axis, and its bytes."""
        return _BLOCKS[self]


_BLOCKS: Final = {
    TensorType.F32: (1, 4),
    TensorType.BF16: (1, 2),
    TensorType.Q4_0: (32, 18),
    TensorType.Q8_0: (32, 34),
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's description."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    """Slowest axis first, as in numpy; the file has the opposite order."""

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        values, nbytes = self.type.block
        return prod(self.shape) // values * nbytes

    @property
    def padded_nbytes(self) -> int:
        """The same with the zeros before the next tensor."""
        return self.nbytes + -self.nbytes % ALIGNMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Gguf:
    """The header of a file, without its data."""

    metadata: Mapping[str, Value]
    tensors: tuple[GgufTensor, ...]
    offsets: tuple[int, ...]
    """Of each tensor's values, from the start of the file."""
    nbytes: int
    """Of the whole file."""


# --- writing


def gguf_header(metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> bytes:
    """Everything before the data, padded; the first tensor begins right after it.

    Args:
        metadata: Keys and values.
        tensors: In the order of the data, each padded to `padded_nbytes`.
    """
    parts = [struct.pack("<4sIQQ", _MAGIC, _VERSION, len(tensors), len(metadata))]
    parts += (_text(key) + _value(value) for key, value in metadata.items())
    offset = 0
    for tensor in tensors:
        values, _ = tensor.type.block
        assert len(tensor.name.encode()) <= _LONGEST_NAME
        assert tensor.shape[-1] % values == 0
        axes = tensor.shape[::-1]
        parts.append(_text(tensor.name))
        parts.append(struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, tensor.type, offset))
        offset += tensor.padded_nbytes
    header = b"".join(parts)
    return header + bytes(-len(header) % ALIGNMENT)


def _value(value: Value) -> bytes:
    match value:
        case str():
            return struct.pack("<I", _TEXT) + _text(value)
        case tuple():
            return struct.pack("<IIQ", _ARRAY, _TEXT, len(value)) + b"".join(map(_text, value))
        case np.ndarray():
            return struct.pack("<IIQ", _ARRAY, _CODES[value.dtype], value.size) + value.tobytes()
        case _:
            return struct.pack("<I", _CODES[value.dtype]) + value.tobytes()


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


# --- reading


class _MalformedError(ValueError):
    """The bytes are no GGUF header."""


class _Reader:
    """Takes values from the beginning of a file, and never more than a header may have."""

    def __init__(self, file: BinaryIO, nbytes: int) -> None:
        self._file = file
        self.nbytes = nbytes
        """Of the whole file."""
        self.position = 0
        self.texts = 0
        """Texts in arrays so far."""

    def bytes(self, count: int) -> bytes:
        """The next bytes."""
        if count > _LARGEST_HEADER - self.position:
            raise _MalformedError(f"its header has more than {_LARGEST_HEADER:,} bytes")
        is_inside = count <= self.nbytes - self.position  # else a buffer of that size would be made
        data = self._file.read(count) if is_inside else b""
        if len(data) < count:
            raise _MalformedError("ends inside its header")
        self.position += count
        return data

    def integer(self, code: str) -> int:
        """An unsigned integer: `I` of 32 bits, or `Q` of 64."""
        (value,) = struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))
        assert isinstance(value, int)
        return value

    def text(self) -> str:
        """A text with its length before it."""
        data = self.bytes(self.integer("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise _MalformedError("has a text that is not UTF-8") from error

    def value(self) -> Value:
        """A value of metadata with its type before it."""
        code = self.integer("I")
        if code == _TEXT:
            return self.text()
        if code != _ARRAY:
            value: np.generic = self._numbers(code, 1)[0]
            return value
        code, count = self.integer("I"), self.integer("Q")
        if code != _TEXT:
            return self._numbers(code, count)
        self.texts += count
        if self.texts > _MOST_TEXTS:
            raise _MalformedError(f"has arrays of more than {_MOST_TEXTS:,} texts")
        return tuple(self.text() for _ in range(count))

    def _numbers(self, code: int, count: int) -> NDArray[Any]:
        dtype = _NUMBERS.get(code)
        if dtype is None:
            raise _MalformedError(f"has a value of type {code}")
        data = self.bytes(count * dtype.itemsize)
        if dtype.kind == "b" and data.translate(None, b"\0\1"):
            raise _MalformedError("has a boolean that is neither 0 nor 1")
        return np.frombuffer(data, dtype)


def read_gguf(path: Path) -> Gguf:
    """Read the header of a file that anybody may have made, and none of its data.

    Args:
        path: The file.

    Raises:
        CorruptCheckpointError: It is no GGUF file of version 3, describes tensors that do not lie
            in it, or has types of tensors that grokctl does not write.
        OSError: It cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise NotAFileError(path)
        try:
            return _parse(_Reader(file, status.st_size))
        except _MalformedError as error:
            name = printable(path.name, limit=255)
            raise corrupt(name, Reason.MALFORMED, printable(str(error), limit=300)) from error


def _parse(reader: _Reader) -> Gguf:
    if (magic := reader.bytes(4)) != _MAGIC:
        raise _MalformedError(f"expected {_MAGIC!r} at its beginning, found {magic!r}")
    if (version := reader.integer("I")) != _VERSION:
        raise _MalformedError(f"expected GGUF version {_VERSION}, found {version}")
    num_tensors, num_values = reader.integer("Q"), reader.integer("Q")
    if num_tensors > _MOST_TENSORS or num_values > _MOST_VALUES:
        raise _MalformedError(f"claims {num_tensors:,} tensors and {num_values:,} values")
    metadata: dict[str, Value] = {}
    for _ in range(num_values):
        key = reader.text()
        if key in metadata:
            raise _MalformedError(f"has {key!r} twice")
        metadata[key] = reader.value()
    alignment = metadata.get("general.alignment", np.uint32(ALIGNMENT))
    if not isinstance(alignment, np.integer) or alignment != ALIGNMENT:
        raise _MalformedError(f"expected an alignment of {ALIGNMENT}, found {alignment!r}")
    described = [_described(reader) for _ in range(num_tensors)]
    tensors = tuple(tensor for tensor, _ in described)
    _require_unique(tensor.name for tensor in tensors)
    start = reader.position + -reader.position % ALIGNMENT
    offset = 0
    for tensor, found in described:
        if found != offset:
            raise _MalformedError(f"{tensor.name}: expected offset {offset:,}, found {found:,}")
        offset += tensor.padded_nbytes
    if start + offset != reader.nbytes:
        raise _MalformedError(f"expected {start + offset:,} bytes, found {reader.nbytes:,}")
    offsets = tuple(start + found for _, found in described)
    return Gguf(metadata=metadata, tensors=tensors, offsets=offsets, nbytes=reader.nbytes)


def _described(reader: _Reader) -> tuple[GgufTensor, int]:
    """A tensor's description, and its offset from the start of the data."""
    name = reader.text()
    count = reader.integer("I")
    if not 1 <= count <= _MOST_AXES:
        raise _MalformedError(f"{name}: expected 1 to {_MOST_AXES} axes, found {count}")
    shape = tuple(reader.integer("Q") for _ in range(count))[::-1]
    code, offset = reader.integer("I"), reader.integer("Q")
    if code not in set(TensorType):
        known = ", ".join(kind.name for kind in TensorType)
        raise _MalformedError(f"{name}: expected a tensor of {known}, found type {code}")
    kind = TensorType(code)
    values, _ = kind.block
    if not all(shape) or shape[-1] % values:
        raise _MalformedError(f"{name}: {kind.name} cannot have the shape {shape}")
    return GgufTensor(name, kind, shape), offset


def _require_unique(names: Iterable[str]) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise _MalformedError(f"has the tensor {name!r} twice")
        seen.add(name)
