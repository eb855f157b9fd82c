"""The writer of pickled tensors: the same bytes as the C pickler of Python 3.8 to 3.13."""

import io
import pickle  # only its opcode table
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.pickle_objects import ArrayRef
from grokctl.checkpoint.pickles import (
    BFLOAT16,
    BFLOAT16_GLOBAL,
    NDARRAY,
    QUANTIZED,
    RECONSTRUCT,
    PickledTensor,
)

_FRAME_TARGET = 64 * 1024
"""The C pickler closes a frame at this size, and writes larger payloads outside of frames."""


@dataclass(frozen=True, slots=True)
class Hole:
    """Shape and dtype of an array that is skipped, not written: a hole in a sparse file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


Payload = NDArray[Any] | Hole


def write(file: BinaryIO, weight: Payload, scales: Payload | None = None) -> PickledTensor:
    """Write one tensor in exactly the released format.

    Args:
        file: Positioned at its start; seekable when there are holes.
        weight: float32 without scales, int8 with them.
        scales: bfloat16 `(*lead, groups, outputs)`.

    Returns:
        The offsets of the payloads.
    """
    out = _Framer(file)
    out.raw(pickle.PROTO + b"\x04")
    if scales is None:
        ref = _write_array(out, weight)
        out.op(pickle.STOP)
        out.close()
        return PickledTensor(weight=ref, scales=None)
    out.op(_text(QUANTIZED[0]), _text(QUANTIZED[1]), pickle.STACK_GLOBAL, pickle.MEMOIZE)
    out.op(pickle.EMPTY_TUPLE, pickle.NEWOBJ, pickle.MEMOIZE, pickle.EMPTY_DICT, pickle.MEMOIZE)
    out.op(pickle.MARK, _text("weight"))
    weight_ref = _write_array(out, weight, numpy_memo=9)
    out.op(_text("scales"))
    scales_ref = _write_array(out, scales, is_second=True)
    out.op(pickle.SETITEMS, pickle.BUILD, pickle.STOP)
    out.close()
    return PickledTensor(weight=weight_ref, scales=scales_ref)


@dataclass(frozen=True, slots=True)
class Outline:
    """A tensor's file without its payloads."""

    nbytes: int
    """Size of the file."""
    tensor: PickledTensor
    """Where the payloads lie."""
    parts: tuple[tuple[int, bytes], ...]
    """What was written, and at which offset: opcodes, and zeros for small payloads."""


def outline(weight: Hole, scales: Hole | None = None) -> Outline:
    """What `write` makes of a tensor, from shapes and dtypes alone."""
    recorder = _Recorder()
    tensor = write(recorder, weight, scales)
    return Outline(recorder.position, tensor, tuple(recorder.parts))


def measure(weight: Hole, scales: Hole | None = None) -> int:
    """Bytes of the file that `write` makes of a tensor of these shapes and dtypes."""
    return outline(weight, scales).nbytes


class _Recorder(io.BytesIO):
    """A file that records every write and its offset."""

    def __init__(self) -> None:
        super().__init__()
        self.position = 0
        self.parts: list[tuple[int, bytes]] = []

    def write(self, data: Any) -> int:
        self.parts.append((self.position, bytes(data)))
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (self.position if whence == io.SEEK_CUR else 0)
        return self.position


_BEGINS_OBJECT: Final = frozenset(
    {
        pickle.SHORT_BINUNICODE,
        pickle.BINGET,
        pickle.BININT1,
        pickle.BININT2,
        pickle.BININT,
        pickle.NONE,
        pickle.NEWTRUE,
        pickle.NEWFALSE,
        pickle.MARK,
        pickle.EMPTY_DICT,
    }
)


class _Framer:
    """The framing of the C pickler: payloads of 64 KiB and more are outside of frames."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.frame = bytearray()
        self.position = 0

    def raw(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.position += len(data)

    def op(self, *parts: bytes) -> None:
        for part in parts:
            if part[:1] in _BEGINS_OBJECT:
                self.boundary()
            self.frame += part

    def boundary(self) -> None:
        """Close a full frame; the C pickler checks before each object, and only there."""
        if len(self.frame) >= _FRAME_TARGET:
            self.close()

    def payload(self, header: bytes, array: Payload, nbytes: int) -> int:
        """Write one bytes object and its memo mark; return the offset of its content."""
        self.boundary()
        if nbytes < _FRAME_TARGET:
            frame_header = 9
            offset = self.position + frame_header + len(self.frame) + len(header)
            content = bytes(nbytes) if isinstance(array, Hole) else _bytes(array).tobytes()
            self.op(header + content, pickle.MEMOIZE)
            return offset
        self.close()
        self.raw(header)
        offset = self.position
        if isinstance(array, Hole):
            self.file.seek(nbytes, io.SEEK_CUR)
            self.position += nbytes
        else:
            self.raw(_bytes(array))
        self.op(pickle.MEMOIZE)
        return offset

    def close(self) -> None:
        if self.frame:
            self.raw(pickle.FRAME + struct.pack("<Q", len(self.frame)))
            self.raw(bytes(self.frame))
            self.frame.clear()


def _write_array(
    out: _Framer, array: Payload, *, numpy_memo: int = 3, is_second: bool = False
) -> ArrayRef:
    """Write one array; the second of a file recalls memo entries of the first."""
    m = pickle.MEMOIZE
    if is_second:
        out.op(_recall(8), _recall(11), _integer(0), pickle.TUPLE1, m, _recall(13))
    else:
        out.op(_text(RECONSTRUCT[0]), _text(RECONSTRUCT[1]), pickle.STACK_GLOBAL, m)
        out.op(_text(NDARRAY[0]), _text(NDARRAY[1]), pickle.STACK_GLOBAL, m)
        out.op(_integer(0), pickle.TUPLE1, m, pickle.SHORT_BINBYTES, b"\x01b", m)
    out.op(pickle.TUPLE3, m, pickle.REDUCE, m)
    out.op(pickle.MARK, _integer(1), *_shape(array.shape))
    if is_second:
        out.op(_recall(18))
    else:
        out.op(_recall(numpy_memo), _text("dtype"), pickle.STACK_GLOBAL, m)
    out.op(*_dtype(array.dtype), pickle.NEWFALSE)
    nbytes = prod(array.shape) * array.dtype.itemsize
    if nbytes < 1 << 8:
        header = pickle.SHORT_BINBYTES + struct.pack("<B", nbytes)
    else:
        header = pickle.BINBYTES + struct.pack("<I", nbytes)
    offset = out.payload(header, array, nbytes)
    out.op(pickle.TUPLE, m, pickle.BUILD)
    return ArrayRef(offset=offset, shape=array.shape, dtype=array.dtype)


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _dtype(dtype: np.dtype[Any]) -> Iterator[bytes]:
    """Arguments and state of a numpy dtype, which follow its class."""
    m = pickle.MEMOIZE
    if dtype == BFLOAT16:
        yield from (_text(BFLOAT16_GLOBAL[0]), _text(BFLOAT16_GLOBAL[1]), pickle.STACK_GLOBAL, m)
    else:
        yield _text({np.dtype("f4"): "f4", np.dtype("i1"): "i1"}[dtype])
    yield from (pickle.NEWFALSE, pickle.NEWTRUE, pickle.TUPLE3, m, pickle.REDUCE, m)
    yield from (pickle.MARK, _integer(3), _text("|" if dtype.itemsize == 1 else "<"))
    # Size, alignment and flags of bfloat16, or -1, -1, 0 for built-in types. The flags are those of
    # ml_dtypes 0.4 and before: numpy hashes them, so JAX of the reference code knows no others.
    state = (2, 2, 80) if dtype == BFLOAT16 else (-1, -1, 0)
    yield from (pickle.NONE, pickle.NONE, pickle.NONE, *map(_integer, state))
    yield from (pickle.TUPLE, m, pickle.BUILD)


def _shape(shape: tuple[int, ...]) -> Iterator[bytes]:
    short = {1: pickle.TUPLE1, 2: pickle.TUPLE2, 3: pickle.TUPLE3}
    yield from map(_integer, shape)
    yield short[len(shape)] + pickle.MEMOIZE


def _text(value: str) -> bytes:
    """A string and its memo mark."""
    data = value.encode("ascii")
    return pickle.SHORT_BINUNICODE + struct.pack("<B", len(data)) + data + pickle.MEMOIZE


def _recall(index: int) -> bytes:
    return pickle.BINGET + struct.pack("<B", index)


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return pickle.BININT1 + struct.pack("<B", value)
    if 0 <= value < 1 << 16:
        return pickle.BININT2 + struct.pack("<H", value)
    return pickle.BININT + struct.pack("<i", value)
