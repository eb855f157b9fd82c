"""Pickled tensors, read without unpickling: a scan of opcodes that builds nothing.

The release stores every tensor as a protocol-4 pickle. Unpickling executes any code that a file
names, so nothing here unpickles. `scan` interprets the opcodes with a machine that knows only the
two forms of a tensor (a float32 array, or a `QuantizedWeight8bit` of int8 weight and bfloat16
scales), and returns the offsets of the payloads. It refuses every other opcode, global, argument
and attribute before any object exists.
"""

import pickle  # only its opcode table
import struct
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import ml_dtypes
import numpy as np

from grokctl.checkpoint.pickle_damage import Finding, flipped_bit, other_file, zero_tail
from grokctl.checkpoint.pickle_names import foreign_name
from grokctl.checkpoint.pickle_objects import (
    MARK,
    Array,
    ArrayRef,
    Dtype,
    Global,
    Payload,
    Quantized,
    twin_of,
)
from grokctl.errors import CorruptCheckpointError, Damage, Reason, corrupt

BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)

RECONSTRUCT = ("numpy.core.multiarray", "_reconstruct")
NDARRAY = ("numpy", "ndarray")
DTYPE = ("numpy", "dtype")
QUANTIZED = ("__main__", "QuantizedWeight8bit")
BFLOAT16_GLOBAL = ("ml_dtypes", "bfloat16")
_ALLOWED: Final = frozenset({RECONSTRUCT, NDARRAY, DTYPE, QUANTIZED, BFLOAT16_GLOBAL})
"""The five globals in the released files. Nothing else exists."""

_SCALAR_FLAGS = 0x70
"""Flags that versions of ml_dtypes set: none of them makes a reader take bytes for objects."""
_MOST_OPCODES = 256
"""The longest released pickle has 148."""
_LARGEST_RANK = 3

_NOT_EXECUTED: Final = "nothing in the file was executed"
_SIZES: Final = frozenset({Reason.SHORT, Reason.LONG})

_Buffer = bytes | memoryview
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PickledTensor:
    """The arrays of one released file."""

    weight: ArrayRef
    """float32, or int8 when there are scales."""
    scales: ArrayRef | None
    """bfloat16 `(*lead, groups, outputs)`; None for float32 tensors."""


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
    states = list(_before_each_opcode(machine.buffer))

    def is_tensor(place: int, mask: int) -> bool:
        before = bisect_right(states, place, key=lambda state: state.position) - 1
        try:
            states[before].copy(flip=(place, mask)).run()
        except CorruptCheckpointError:
            return False
        return True

    places = [place for low, high in machine.read for place in range(low, high)]
    return flipped_bit(places, is_tensor)


def _before_each_opcode(buffer: _Buffer) -> Iterator["_Machine"]:
    """The machine in each state that a flip in a later byte does not change."""
    machine = _Machine(buffer, "")
    yield machine.copy()
    with suppress(CorruptCheckpointError):
        machine.begin()
        yield machine.copy()
        while machine.advance() is None:
            yield machine.copy()


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
        self.opcodes = 0
        self.has_begun = False
        """Whether it begins as a protocol-4 pickle does."""

    def copy(self, *, flip: tuple[int, int] | None = None) -> "_Machine":
        """The machine in its state, to go on with another flip."""
        twin = _Machine(self.buffer, self.file, flip=flip)
        twins: dict[int, Any] = {}
        twin.stack = [twin_of(value, twins) for value in self.stack]
        twin.memo = [twin_of(value, twins) for value in self.memo]
        twin.used = set(self.used)
        twin.position, twin.frame_end = self.position, self.frame_end
        twin.opcodes, twin.has_begun = self.opcodes, self.has_begun
        return twin

    def run(self) -> PickledTensor:
        if not self.has_begun:
            self.begin()
        while (tensor := self.advance()) is None:
            pass
        return tensor

    def begin(self) -> None:
        if self.size == 0:
            raise self.bad(Reason.SHORT, "is empty")
        if bytes(self.take(2)) != pickle.PROTO + b"\x04":
            raise self.malformed("is not a protocol-4 pickle")
        self.has_begun = True

    def advance(self) -> PickledTensor | None:
        """Read one opcode; the last one gives the tensor."""
        if self.opcodes == _MOST_OPCODES:
            raise self.malformed(f"has more than {_MOST_OPCODES} opcodes")
        self.opcodes += 1
        self.opcode_at = self.position
        opcode = bytes(self.take(1))
        if opcode == pickle.STOP:
            return self.finish()
        self.step(opcode)
        return None

    def finish(self) -> PickledTensor:
        if self.position != self.size:
            raise self.bad(
                Reason.LONG, f"{self.size - self.position:,} bytes after the pickle's end"
            )
        match self.stack:
            case [Array(ref=ArrayRef() as ref)] if ref.dtype == np.float32:
                return PickledTensor(weight=ref, scales=None)
            case [
                Quantized(parts={"weight": ArrayRef() as weight, "scales": ArrayRef() as scales})
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
                push(Global(module, name))
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
                push(MARK)
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
                arguments, function = pop(tuple), pop(Global)
                push(self.call(function, arguments))
            case pickle.NEWOBJ:
                arguments, cls = pop(tuple), pop(Global)
                if (cls.module, cls.name) != QUANTIZED or arguments != ():
                    raise self.malformed(f"constructs {cls}")
                push(Quantized())
            case pickle.BUILD:
                state: Any = pop()
                self.build(self.peek(), state)
            case _:
                raise self.malformed(f"has opcode 0x{opcode.hex()} at byte {self.position - 1}")

    def call(self, function: Global, arguments: tuple[Any, ...]) -> object:
        match (function.module, function.name), arguments:
            case (module_name, [Global() as cls, [0], Payload(offset=at, length=1)]) if (
                module_name == RECONSTRUCT
                and (cls.module, cls.name) == NDARRAY
                and self.byte(at) == ord("b")
            ):
                return Array()
            case (module_name, ["f4" | "i1" as code, False, True]) if module_name == DTYPE:
                return Dtype(str(code))
            case (module_name, [Global() as scalar, False, True]) if (
                module_name == DTYPE and (scalar.module, scalar.name) == BFLOAT16_GLOBAL
            ):
                return Dtype("bfloat16")
        raise self.malformed(f"calls {function} with arguments that numpy never writes")

    def build(self, target: object, state: Any) -> None:
        match target, state:
            case (
                Dtype(is_built=False, code="f4" | "i1"),
                [3, "<" | "|", None, None, None, -1, -1, 0],
            ):
                target.is_built = True
            case (
                Dtype(is_built=False, code="bfloat16"),
                [3, "<" | "|", None, None, None, 2, 2, int() as flags],
            ) if flags | _SCALAR_FLAGS == _SCALAR_FLAGS:
                target.is_built = True
            case (
                Array(ref=None),
                [1, tuple() as shape, Dtype(is_built=True) as dtype, False, Payload() as payload],
            ):
                target.ref = self.array(shape, dtype, payload)
            case (
                Quantized(parts={}),
                {"weight": Array(ref=ArrayRef() as weight), "scales": Array(ref=ArrayRef() as s)},
            ) if not target.parts and list(state) == ["weight", "scales"]:
                target.parts = {"weight": weight, "scales": s}
            case _:
                raise self.malformed("sets state that no released tensor has")

    def array(self, shape: tuple[Any, ...], dtype: Dtype, payload: Payload) -> ArrayRef:
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
                f"expected {ref.nbytes:,} bytes for {known} {shape}, found {payload.length:,}",
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
                Reason.SHORT, f"has a frame of {length:,} bytes that extends beyond the end"
            )
        self.frame_end = self.position + length

    def take(self, count: int) -> _Buffer:
        if count > self.size - self.position:
            raise self.bad(
                Reason.SHORT,
                f"expected at least {self.position + count:,} bytes, found {self.size:,}",
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

    def payload(self, length: int) -> Payload:
        offset = self.position
        self.take(length)
        if length > 1:
            self.read.pop()  # not of the pickle's own bytes
        return Payload(offset, length)

    def byte(self, place: int) -> int:
        mask = self.flip[1] if self.flip is not None and self.flip[0] == place else 0
        return int(self.buffer[place]) ^ mask

    def recall(self, index: int) -> object:
        if index >= len(self.memo):
            raise self.malformed(f"recalls memo entry {index} of {len(self.memo)}")
        return self.memo[index]

    def peek(self) -> object:
        if not self.stack or self.stack[-1] is MARK:
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
            if self.stack[index] is MARK:
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
