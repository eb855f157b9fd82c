"""Pickled tensors, read without unpickling: a scan of opcodes that builds nothing, and a writer.

The release stores every tensor as a protocol-4 pickle. Unpickling executes any code that a file
names, so nothing here unpickles. `scan` interprets the opcodes with a machine that knows only the
two forms of a tensor (a float32 array, or a `QuantizedWeight8bit` of int8 weight and bfloat16
scales), and returns the offsets of the payloads. It refuses every other opcode, global, argument
and attribute before any object exists. `write` produces the same bytes as the C pickler of Python
3.8 to 3.13.
"""

import io
import pickle  # only its opcode table
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, BinaryIO, Final, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.pickle_damage import Finding, flipped_bit, other_file, zero_tail
from grokctl.checkpoint.pickle_names import foreign_name
from grokctl.errors import CorruptCheckpointError, Damage, Reason, corrupt

BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)

_RECONSTRUCT = ("numpy.core.multiarray", "_reconstruct")
_NDARRAY = ("numpy", "ndarray")
_DTYPE = ("numpy", "dtype")
_QUANTIZED = ("__main__", "QuantizedWeight8bit")
_BFLOAT16 = ("ml_dtypes", "bfloat16")
_ALLOWED: Final = frozenset({_RECONSTRUCT, _NDARRAY, _DTYPE, _QUANTIZED, _BFLOAT16})
"""The five globals in the released files. Nothing else exists."""

_SCALAR_FLAGS = 0x70
"""Flags that versions of ml_dtypes set: none of them makes a reader take bytes for objects."""
_MOST_OPCODES = 256
"""The longest released pickle has 148."""
_LARGEST_RANK = 3
_FRAME_TARGET = 64 * 1024
"""The C pickler closes a frame at this size, and writes larger payloads outside of frames."""

_NOT_EXECUTED: Final = "nothing in the file was executed"
_SIZES: Final = frozenset({Reason.SHORT, Reason.LONG})

_Buffer = bytes | memoryview
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayRef:
    """The place of an array in its file: C order, little endian."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class PickledTensor:
    """The arrays of one released file."""

    weight: ArrayRef
    """float32, or int8 when there are scales."""
    scales: ArrayRef | None
    """bfloat16 `(*lead, groups, outputs)`; None for float32 tensors."""


@dataclass(frozen=True, slots=True)
class _Global:
    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class _Payload:
    offset: int
    length: int


@dataclass(slots=True, eq=False)
class _Dtype:
    code: str
    is_built: bool = False


@dataclass(slots=True, eq=False)
class _Array:
    ref: ArrayRef | None = None


@dataclass(slots=True, eq=False)
class _Quantized:
    parts: dict[str, ArrayRef] = field(default_factory=dict)


class _Mark:
    pass


_MARK: Final = _Mark()


def scan(buffer: _Buffer, *, file: str) -> PickledTensor:
    """Find the arrays of a pickled tensor; executes nothing.

    Args:
        buffer: The whole file, best as a view of its mapping: only the pages of the opcodes are
            read, whatever the size of the payloads.
        file: Name for errors.

    Raises:
        UnsafePickleError: It names a global that no released tensor names.
        CorruptCheckpointError: It is no tensor for another reason, which the error says.
    """
    machine = _Machine(buffer, file)
    try:
        return machine.run()
    except CorruptCheckpointError as error:
        finding = _diagnose(machine, error.damage[0])
        if finding is None:
            raise
        raise corrupt(
            file,
            finding.reason,
            finding.detail,
            _NOT_EXECUTED if finding.reason is Reason.UNSAFE else None,
            ranges=finding.ranges,
            advice=finding.advice,
        ) from error


def find_flip(buffer: _Buffer) -> Finding | None:
    """The one bit that makes a file a tensor, if there is one."""
    machine = _Machine(buffer, "")
    with suppress(CorruptCheckpointError):
        machine.run()
        return None
    return _flip(machine)


def _diagnose(machine: "_Machine", damage: Damage) -> Finding | None:
    """Why a file is no tensor, if there is more to say than what the machine refused."""
    buffer = machine.buffer
    name = foreign_name(buffer, _ALLOWED)
    if name is not None:
        return _flip(machine) or Finding(Reason.UNSAFE, f"names {name}")
    if damage.reason in _SIZES:
        return None
    other = None if machine.has_begun else other_file(buffer)
    if other is not None:
        return other
    zeros = zero_tail(buffer, machine.opcode_at)
    if zeros is not None:
        return zeros
    flip = _flip(machine)
    return None if flip is None else replace(flip, detail=f"{damage.detail}; {flip.detail}")


def _flip(machine: "_Machine") -> Finding | None:
    def is_tensor(place: int, mask: int) -> bool:
        try:
            _Machine(machine.buffer, "", flip=(place, mask)).run()
        except CorruptCheckpointError:
            return False
        return True

    places = [place for low, high in machine.read for place in range(low, high)]
    return flipped_bit(places, is_tensor)


class _Machine:
    """The part of the pickle machine that released tensors need; objects are symbols."""

    def __init__(self, buffer: _Buffer, file: str, *, flip: tuple[int, int] | None = None) -> None:
        """Begin with an empty stack.

        Args:
            buffer: The file.
            file: Name for errors.
            flip: Place of a byte, and the mask that it is read with.
        """
        self.buffer = buffer
        self.flip = flip
        self.size = len(buffer)
        self.file = file
        self.position = 0
        self.frame_end = 0
        self.stack: list[Any] = []
        self.memo: list[Any] = []
        self.used: set[int] = set()
        """Offsets of the payloads of all arrays so far."""
        self.read: list[tuple[int, int]] = []
        """Ranges of the opcodes and their arguments, without payloads."""
        self.opcode_at = 0
        """Place of the last opcode."""
        self.has_begun = False
        """Whether it begins as a protocol-4 pickle does."""

    def run(self) -> PickledTensor:
        if self.size == 0:
            raise self.bad(Reason.SHORT, "is empty")
        if bytes(self.take(2)) != pickle.PROTO + b"\x04":
            raise self.malformed("is not a protocol-4 pickle")
        self.has_begun = True
        for _ in range(_MOST_OPCODES):
            self.opcode_at = self.position
            opcode = bytes(self.take(1))
            if opcode == pickle.STOP:
                return self.finish()
            self.step(opcode)
        raise self.malformed(f"has more than {_MOST_OPCODES} opcodes")

    def finish(self) -> PickledTensor:
        if self.position != self.size:
            raise self.bad(Reason.LONG, f"{self.size - self.position} bytes after the pickle's end")
        match self.stack:
            case [_Array(ref=ArrayRef() as ref)] if ref.dtype == np.float32:
                return PickledTensor(weight=ref, scales=None)
            case [
                _Quantized(parts={"weight": ArrayRef() as weight, "scales": ArrayRef() as scales})
            ]:
                if weight.dtype != np.int8 or scales.dtype != BFLOAT16:
                    raise self.bad(
                        Reason.MALFORMED,
                        "expected int8 weight and bfloat16 scales, "
                        f"found {weight.dtype} and {scales.dtype}",
                    )
                return PickledTensor(weight=weight, scales=scales)
            case _:
                raise self.malformed("is neither a float32 array nor a QuantizedWeight8bit")

    def step(self, opcode: bytes) -> None:  # noqa: C901, PLR0912, PLR0915 (a table)
        push, pop = self.stack.append, self.pop
        match opcode:
            case pickle.FRAME:
                self.begin_frame()
            case pickle.SHORT_BINUNICODE:
                push(self.text(self.unpack("<B")[0]))
            case pickle.MEMOIZE:
                self.memo.append(self.peek())
            case pickle.BINGET:
                push(self.recall(self.unpack("<B")[0]))
            case pickle.LONG_BINGET:
                push(self.recall(self.unpack("<I")[0]))
            case pickle.STACK_GLOBAL:
                name, module = pop(str), pop(str)
                if (module, name) not in _ALLOWED:
                    raise self.unsafe(module, name)
                push(_Global(module, name))
            case pickle.NONE:
                push(None)
            case pickle.NEWTRUE:
                push(True)
            case pickle.NEWFALSE:
                push(False)
            case pickle.BININT1:
                push(self.unpack("<B")[0])
            case pickle.BININT2:
                push(self.unpack("<H")[0])
            case pickle.BININT:
                push(self.unpack("<i")[0])
            case pickle.SHORT_BINBYTES:
                push(self.payload(self.unpack("<B")[0]))
            case pickle.BINBYTES:
                push(self.payload(self.unpack("<I")[0]))
            case pickle.MARK:
                push(_MARK)
            case pickle.EMPTY_TUPLE:
                push(())
            case pickle.TUPLE1 | pickle.TUPLE2 | pickle.TUPLE3:
                count = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}[opcode]
                push(tuple(reversed([self.pop() for _ in range(count)])))
            case pickle.TUPLE:
                push(tuple(self.pop_to_mark()))
            case pickle.EMPTY_DICT:
                push({})
            case pickle.SETITEMS:
                self.set_items()
            case pickle.REDUCE:
                arguments, function = pop(tuple), pop(_Global)
                push(self.call(function, arguments))
            case pickle.NEWOBJ:
                arguments, cls = pop(tuple), pop(_Global)
                if (cls.module, cls.name) != _QUANTIZED or arguments != ():
                    raise self.malformed(f"constructs {cls}")
                push(_Quantized())
            case pickle.BUILD:
                state: Any = pop()
                self.build(self.peek(), state)
            case _:
                raise self.malformed(f"has opcode 0x{opcode.hex()} at byte {self.position - 1}")

    def call(self, function: _Global, arguments: tuple[Any, ...]) -> object:
        match (function.module, function.name), arguments:
            case (module_name, [_Global() as cls, [0], _Payload(offset=at, length=1)]) if (
                module_name == _RECONSTRUCT
                and (cls.module, cls.name) == _NDARRAY
                and self.byte(at) == ord("b")
            ):
                return _Array()
            case (module_name, ["f4" | "i1" as code, False, True]) if module_name == _DTYPE:
                return _Dtype(str(code))
            case (module_name, [_Global() as scalar, False, True]) if (
                module_name == _DTYPE and (scalar.module, scalar.name) == _BFLOAT16
            ):
                return _Dtype("bfloat16")
        raise self.malformed(f"calls {function} with arguments that numpy never writes")

    def build(self, target: object, state: Any) -> None:
        match target, state:
            case (
                _Dtype(is_built=False, code="f4" | "i1"),
                [3, "<" | "|", None, None, None, -1, -1, 0],
            ):
                target.is_built = True
            case (
                _Dtype(is_built=False, code="bfloat16"),
                [3, "<" | "|", None, None, None, 2, 2, int() as flags],
            ) if flags | _SCALAR_FLAGS == _SCALAR_FLAGS:
                target.is_built = True
            case (
                _Array(ref=None),
                [1, tuple() as shape, _Dtype(is_built=True) as dtype, False, _Payload() as payload],
            ):
                target.ref = self.array(shape, dtype, payload)
            case (
                _Quantized(parts={}),
                {"weight": _Array(ref=ArrayRef() as weight), "scales": _Array(ref=ArrayRef() as s)},
            ) if not target.parts and list(state) == ["weight", "scales"]:
                target.parts = {"weight": weight, "scales": s}
            case _:
                raise self.malformed("sets state that no released tensor has")

    def array(self, shape: tuple[Any, ...], dtype: _Dtype, payload: _Payload) -> ArrayRef:
        # a message shows a shape only once it is known to be a few numbers
        if not 1 <= len(shape) <= _LARGEST_RANK or not all(type(n) is int for n in shape):
            raise self.bad(Reason.MALFORMED, "has an array whose shape is not 1 to 3 numbers")
        if min(shape) < 1:
            raise self.bad(Reason.MALFORMED, f"has an array of shape {shape}")
        known = {"f4": np.dtype("<f4"), "i1": np.dtype("i1"), "bfloat16": BFLOAT16}[dtype.code]
        ref = ArrayRef(offset=payload.offset, shape=shape, dtype=known)
        if ref.nbytes != payload.length:
            raise self.bad(
                Reason.MALFORMED,
                f"expected {ref.nbytes} bytes for {known} {shape}, found {payload.length}",
            )
        if ref.offset in self.used:
            raise self.malformed("has two arrays with the same bytes")
        self.used.add(ref.offset)
        return ref

    def set_items(self) -> None:
        items = self.pop_to_mark()
        target = self.peek()
        if not isinstance(target, dict) or len(items) % 2:
            raise self.malformed("sets items of something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) or key in target:
                raise self.malformed("sets a key that is a duplicate or not text")
            target[key] = value

    def begin_frame(self) -> None:
        if self.position <= self.frame_end:
            raise self.malformed("has a frame inside a frame")
        (length,) = self.unpack("<Q")
        if length > self.size - self.position:
            raise self.bad(
                Reason.SHORT, f"has a frame of {length} bytes that extends beyond the end"
            )
        self.frame_end = self.position + length

    def take(self, count: int) -> _Buffer:
        if count > self.size - self.position:
            raise self.bad(
                Reason.SHORT,
                f"expected at least {self.position + count} bytes, found {self.size}",
            )
        if self.position < self.frame_end < self.position + count:
            # unpicklers read frames separately, and would take different bytes
            raise self.malformed("has a value that extends beyond its frame")
        start = self.position
        self.position += count
        self.read.append((start, self.position))
        taken = self.buffer[start : self.position]
        if self.flip is None or not start <= self.flip[0] < self.position:
            return taken
        flipped = bytearray(taken)
        flipped[self.flip[0] - start] ^= self.flip[1]
        return bytes(flipped)

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def text(self, length: int) -> str:
        name = bytes(self.take(length)).decode("latin-1")
        if not (name.isascii() and name.isprintable()):
            raise self.malformed("has a name that is not printable ASCII")
        return name

    def payload(self, length: int) -> _Payload:
        offset = self.position
        self.take(length)
        if length > 1:
            self.read.pop()  # not of the pickle's own bytes
        return _Payload(offset, length)

    def byte(self, place: int) -> int:
        mask = self.flip[1] if self.flip is not None and self.flip[0] == place else 0
        return int(self.buffer[place]) ^ mask

    def recall(self, index: int) -> object:
        if index >= len(self.memo):
            raise self.malformed(f"recalls memo entry {index} of {len(self.memo)}")
        return self.memo[index]

    def peek(self) -> object:
        if not self.stack or self.stack[-1] is _MARK:
            raise self.malformed("pops from an empty stack")
        return self.stack[-1]

    def pop(self, kind: type[_T] | None = None) -> _T:
        value = self.peek()
        self.stack.pop()
        if kind is not None and not isinstance(value, kind):
            raise self.malformed(
                f"uses a {type(value).__name__.lstrip('_')} as {kind.__name__.lstrip('_')}"
            )
        return value  # type: ignore[return-value]  # kind None means any

    def pop_to_mark(self) -> list[object]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise self.malformed("closes a tuple or dictionary that it never opened")

    def unsafe(self, module: str, name: str) -> CorruptCheckpointError:
        return corrupt(self.file, Reason.UNSAFE, f"names {module}.{name}", _NOT_EXECUTED)

    def malformed(self, detail: str) -> CorruptCheckpointError:
        return self.bad(Reason.MALFORMED, detail)

    def bad(self, reason: Reason, detail: str) -> CorruptCheckpointError:
        return corrupt(self.file, reason, detail)


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
    out.op(_text(_QUANTIZED[0]), _text(_QUANTIZED[1]), pickle.STACK_GLOBAL, pickle.MEMOIZE)
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
        out.op(_text(_RECONSTRUCT[0]), _text(_RECONSTRUCT[1]), pickle.STACK_GLOBAL, m)
        out.op(_text(_NDARRAY[0]), _text(_NDARRAY[1]), pickle.STACK_GLOBAL, m)
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
        yield from (_text(_BFLOAT16[0]), _text(_BFLOAT16[1]), pickle.STACK_GLOBAL, m)
    else:
        yield _text({np.dtype("f4"): "f4", np.dtype("i1"): "i1"}[dtype])
    yield from (pickle.NEWFALSE, pickle.NEWTRUE, pickle.TUPLE3, m, pickle.REDUCE, m)
    yield from (pickle.MARK, _integer(3), _text("|" if dtype.itemsize == 1 else "<"))
    # size, alignment and flags of ml_dtypes' bfloat16; -1, -1, 0 for built-in types
    state = (2, 2, 64) if dtype == BFLOAT16 else (-1, -1, 0)
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
