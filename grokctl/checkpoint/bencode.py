"""Bencoding, decoded strictly: untrusted data is refused before it can take long."""

import re
from collections.abc import Iterator
from typing import Any

_MOST_VALUES = 100_000
"""A torrent of Grok-1 of both versions, with a pad for each file, has 25,000."""
_MOST_NESTED = 2 * 2**20
"""Bytes of texts in lists of lists and deeper: names of files, roots of their hash trees, trackers;
that torrent has 150,000."""
_NESTED = 3
"""The depth of these: the top level has 0, the info dictionary 1, its file list or tree 2."""
_INTEGER = re.compile(rb"i(0|-?[1-9][0-9]{0,18})e")
_LENGTH = re.compile(rb"(0|[1-9][0-9]{0,9}):")


class MalformedError(Exception):
    """Invalid bencoding; the message is the end of a sentence, such as `has a duplicate key`."""


def decode(
    data: bytes, *, most_depth: int, most_nested: int = _MOST_NESTED
) -> tuple[dict[bytes, Any], dict[bytes, tuple[int, int]]]:
    """Decode a dictionary.

    Args:
        data: Untrusted.
        most_depth: How deep lists and dictionaries may be nested.
        most_nested: Bytes that the texts in lists of lists, and deeper, may have together.

    Returns:
        The dictionary, and the byte range of each of its own values.

    Raises:
        MalformedError: It is something else, or larger than any torrent.
    """
    decoder = _Decoder(data, most_depth, most_nested)
    top = decoder.value(0)
    if not isinstance(top, dict) or decoder.position != len(data):
        raise MalformedError("is not a bencoded dictionary")
    return top, decoder.top_spans


def encode(value: object) -> bytes:
    """Encode bytes, numbers, lists and dictionaries, whose keys are sorted."""
    return b"".join(_encoded(value))


def _encoded(value: object) -> Iterator[bytes]:
    match value:
        case bytes():
            yield b"%d:%s" % (len(value), value)
        case int():
            yield b"i%de" % value
        case list():
            yield b"l"
            for item in value:
                yield from _encoded(item)
            yield b"e"
        case dict():
            yield b"d"
            for key in sorted(value):
                yield from _encoded(key)
                yield from _encoded(value[key])
            yield b"e"
        case _:
            raise TypeError(value)


class _Decoder:
    def __init__(self, data: bytes, most_depth: int, most_nested: int) -> None:
        self.data = data
        self.most_depth = most_depth
        self.most_nested = most_nested
        self.position = 0
        self.values = 0
        self.nested = 0
        self.top_spans: dict[bytes, tuple[int, int]] = {}

    def value(self, depth: int) -> Any:
        self.values += 1
        if self.values > _MOST_VALUES:
            raise MalformedError(f"has more than {_MOST_VALUES:,} values")
        if depth > self.most_depth:
            raise MalformedError("is nested too deeply")
        match self.data[self.position : self.position + 1]:
            case b"i":
                return self.integer()
            case b"l":
                return self.list(depth)
            case b"d":
                return self.dictionary(depth)
            case _:
                return self.string(depth)

    def integer(self) -> int:
        match = _INTEGER.match(self.data, self.position)
        if match is None:
            raise MalformedError(f"has a bad number at byte {self.position}")
        self.position = match.end()
        return int(match[1])

    def string(self, depth: int) -> bytes:
        match = _LENGTH.match(self.data, self.position)
        if match is None or match.end() + int(match[1]) > len(self.data):
            raise MalformedError(f"has a bad string at byte {self.position}")
        self.position = match.end() + int(match[1])
        if depth >= _NESTED:
            self.nested += int(match[1])
            if self.nested > self.most_nested:
                raise MalformedError(
                    f"has more than {self.most_nested:,} bytes of names of files and trackers"
                )
        return self.data[match.end() : self.position]

    def list(self, depth: int) -> list[Any]:
        self.position += 1
        items = []
        while not self.at_end():
            items.append(self.value(depth + 1))
        return items

    def dictionary(self, depth: int) -> dict[bytes, Any]:
        self.position += 1
        values: dict[bytes, Any] = {}
        while not self.at_end():
            key = self.string(depth + 1)
            if key in values:
                raise MalformedError("has a duplicate key")
            start = self.position
            values[key] = self.value(depth + 1)
            if depth == 0:
                self.top_spans[key] = (start, self.position)
        return values

    def at_end(self) -> bool:
        if self.position >= len(self.data):
            raise MalformedError("ends early")
        if self.data[self.position : self.position + 1] == b"e":
            self.position += 1
            return True
        return False
