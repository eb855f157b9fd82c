"""The globals that a pickle names: found by walking its opcodes, without building or importing."""

import struct
from typing import Final

_Buffer = bytes | memoryview
Name = tuple[str, str]
"""Module and name."""

_MOST_OPCODES: Final = 500_000
"""A longer walk would take seconds."""
_LONGEST_LINE: Final = 4096

_FIXED: Final[dict[bytes, int]] = {
    **dict.fromkeys((b"K", b"h", b"q", b"\x80", b"\x82"), 1),
    **dict.fromkeys((b"M", b"\x83"), 2),
    **dict.fromkeys((b"J", b"j", b"r", b"\x84"), 4),
    **dict.fromkeys((b"G", b"\x95"), 8),
}
"""Opcode -> bytes of its argument."""
_COUNTED: Final[dict[bytes, str]] = {
    **dict.fromkeys((b"U", b"C", b"\x8c", b"\x8a"), "<B"),
    **dict.fromkeys((b"T", b"X", b"B", b"\x8b"), "<I"),
    **dict.fromkeys((b"\x8d", b"\x8e", b"\x96"), "<Q"),
}
"""Opcode -> layout of the length before its argument."""
_LINES: Final = frozenset((b"F", b"I", b"L", b"P", b"S", b"V", b"c", b"g", b"i", b"p"))
_TEXTS: Final = frozenset((b"\x8c", b"X", b"\x8d", b"U", b"T", b"S", b"V"))
_PUSHES: Final = frozenset((*b"FILNGJKMBC]})", 0x8A, 0x8B, 0x8E, 0x8F, 0x96, 0x97, 0x88, 0x89))
_EXTENSIONS: Final = frozenset((b"\x82", b"\x83", b"\x84"))
_POPS: Final[dict[bytes, tuple[int, int]]] = {
    **dict.fromkeys((b"R", b"\x81", b"\x86"), (2, 1)),
    **dict.fromkeys((b"\x92", b"\x87"), (3, 1)),
    **dict.fromkeys((b"\x85", b"\x98", b"Q"), (1, 1)),
    b"s": (3, 1),
    **dict.fromkeys((b"a", b"b"), (2, 1)),
}
"""Opcode -> items that it takes off the stack, and puts on it."""
_TO_MARK: Final[dict[bytes, int]] = {
    **dict.fromkeys((b"t", b"l", b"d", b"\x91", b"o"), 1),
    **dict.fromkeys((b"u", b"e", b"\x90", b"1"), 0),
}
"""Opcode that takes everything above a mark -> items that it puts there."""


class _Other:
    """Any object that is not text."""


class _Mark:
    """A mark on the stack."""


_OTHER: Final = _Other()
_MARK: Final = _Mark()


def foreign_name(buffer: _Buffer, allowed: frozenset[Name]) -> str | None:
    """The first global, other than the allowed ones, that an unpickler would look up in a file.

    Follows every protocol to the opcode at which an unpickler would stop or fail.

    Returns:
        Printable, such as `posix.system`; None if every name is allowed.
    """
    walk = _Walk(buffer)
    try:
        for _ in range(_MOST_OPCODES):
            name = walk.step()
            if name is not None and name not in allowed:
                return ascii(".".join(name))[1:-1][:200]
    except (_EndError, struct.error, IndexError, KeyError, ValueError):
        pass  # an unpickler fails here, too
    return None


class _EndError(Exception):
    """The pickle ends, or an unpickler would refuse the rest."""


class _Walk:
    """The stack and the memo of an unpickler, with texts and without objects."""

    def __init__(self, buffer: _Buffer) -> None:
        self.buffer = buffer
        self.position = 0
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}

    def step(self) -> Name | None:
        """Follow one opcode; returns the global that it names, if any."""
        opcode = self.take(1)
        if opcode == b".":
            raise _EndError
        if opcode in _LINES:
            return self.line(opcode)
        if opcode in _COUNTED:
            self.counted(opcode)
            return None
        argument = self.take(_FIXED.get(opcode, 0))
        if opcode in _EXTENSIONS:
            return "extension", str(int.from_bytes(argument, "little"))
        if opcode == b"\x93":
            name, module = self.pop(), self.pop()
            if not isinstance(name, str) or not isinstance(module, str):
                raise _EndError
            self.stack.append(_OTHER)
            return module, name
        self.move(opcode, argument)
        return None

    def line(self, opcode: bytes) -> Name | None:
        text = self.text_line()
        if opcode in b"ci":
            if opcode == b"i":
                self.pop_to_mark()
            self.stack.append(_OTHER)
            return text, self.text_line()
        if opcode == b"g":
            self.stack.append(self.memo[int(text)])
        elif opcode == b"p":
            self.memo[int(text)] = self.stack[-1]
        elif opcode == b"S":
            self.stack.append(text[1:-1])
        else:
            self.stack.append(text if opcode == b"V" else _OTHER)
        return None

    def counted(self, opcode: bytes) -> None:
        layout = _COUNTED[opcode]
        (length,) = struct.unpack(layout, self.take(struct.calcsize(layout)))
        if length > len(self.buffer) - self.position:
            raise _EndError
        if opcode in _TEXTS and length <= _LONGEST_LINE:
            encoding = "latin-1" if opcode in b"UT" else "utf-8"
            self.stack.append(self.take(length).decode(encoding, "surrogatepass"))
        else:
            self.position += length
            self.stack.append("…" if opcode in _TEXTS else _OTHER)

    def move(self, opcode: bytes, argument: bytes) -> None:  # noqa: C901 (a table)
        index = int.from_bytes(argument, "little")
        if opcode in b"hj":
            self.stack.append(self.memo[index])
        elif opcode in b"qr":
            self.memo[index] = self.stack[-1]
        elif opcode == b"\x94":
            self.memo[len(self.memo)] = self.stack[-1]
        elif opcode == b"(":
            self.stack.append(_MARK)
        elif opcode == b"0":
            self.stack.pop()
        elif opcode == b"2":
            self.stack.append(self.stack[-1])
        elif opcode in _TO_MARK:
            self.pop_to_mark()
            self.stack += [_OTHER] * _TO_MARK[opcode]
        elif opcode in _POPS:
            taken, put = _POPS[opcode]
            for _ in range(taken):
                self.pop()
            self.stack += [_OTHER] * put
        elif opcode[0] in _PUSHES:
            self.stack.append(_OTHER)
        elif opcode not in b"\x80\x95":
            raise _EndError

    def take(self, count: int) -> bytes:
        if count > len(self.buffer) - self.position:
            raise _EndError
        self.position += count
        return bytes(self.buffer[self.position - count : self.position])

    def text_line(self) -> str:
        ahead = bytes(self.buffer[self.position : self.position + _LONGEST_LINE])
        line, end, _ = ahead.partition(b"\n")
        if not end:
            raise _EndError
        self.position += len(line) + 1
        return line.decode("utf-8", "surrogatepass")

    def pop(self) -> object:
        item = self.stack.pop()
        if item is _MARK:
            raise _EndError
        return item

    def pop_to_mark(self) -> None:
        while self.stack.pop() is not _MARK:
            pass
