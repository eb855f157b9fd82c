"""The pieces of a sentencepiece model: texts, scores and types, read from untrusted bytes.

Source: sentencepiece's `sentencepiece_model.proto`. A message consists of fields; a field begins
with `number << 3 | wire type`. Of the wire types, 0 is an integer, 2 bytes with their length, and 5
four bytes.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from grokctl.errors import Reason, corrupt
from grokctl.paths import TOKENIZER

_LONGEST_INTEGER: Final = 10
"""Bytes."""
_MOST_PIECES: Final = 2**20
_LONGEST_PIECE: Final = 512
"""Characters: sentencepiece makes no longer ones. Halves of pieces are looked up, so that a long
piece would take the square of its length in time."""
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_UNKNOWN_ID, _BEGIN_ID, _END_ID, _PAD_ID = 40, 41, 42, 43
_DUMMY_PREFIX: Final = 3
_NO_ID: Final = 2**63


class PieceType(IntEnum):
    """The types of pieces; GGUF has the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """One piece of the vocabulary."""

    text: str
    """Spaces are `▁`."""
    score: float
    type: PieceType


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """The vocabulary of a sentencepiece model; a piece's place is its id."""

    pieces: tuple[TokenPiece, ...]
    unknown_id: int
    begin_id: int | None
    end_id: int | None
    pad_id: int | None
    has_dummy_prefix: bool
    """Whether a space is put before every text."""


def parse_pieces(data: bytes) -> Pieces:
    """Read a serialized sentencepiece model.

    Raises:
        CorruptCheckpointError: It is none.
    """
    try:
        return _parse(data)
    except (ValueError, struct.error) as error:
        detail = "is no sentencepiece model"
        raise corrupt(TOKENIZER, Reason.MALFORMED, detail) from error


def _parse(data: bytes) -> Pieces:
    pieces, ids, has_dummy_prefix = [], dict[int, int](), True
    for number, value in _fields(data):
        if number == _PIECES and isinstance(value, bytes):
            pieces.append(_piece(value))
            if len(pieces) > _MOST_PIECES:
                raise ValueError(number)
        elif number == _TRAINER and isinstance(value, bytes):
            ids = {key: one for key, one in _fields(value) if isinstance(one, int)}
        elif number == _NORMALIZER and isinstance(value, bytes):
            has_dummy_prefix = bool(dict(_fields(value)).get(_DUMMY_PREFIX, 1))
    if not pieces:
        raise ValueError(data[:8])

    def known(key: int, default: int) -> int | None:
        found = ids.get(key, default)
        return found if found < len(pieces) else None  # -1 is a very large number here

    return Pieces(
        pieces=tuple(pieces),
        unknown_id=known(_UNKNOWN_ID, 0) or 0,
        begin_id=known(_BEGIN_ID, 1),
        end_id=known(_END_ID, 2),
        pad_id=known(_PAD_ID, _NO_ID),
        has_dummy_prefix=has_dummy_prefix,
    )


def _piece(data: bytes) -> TokenPiece:
    values = dict(_fields(data))
    text, kind = values.get(_TEXT, b""), values.get(_TYPE, PieceType.NORMAL)
    score = values.get(_SCORE, bytes(4))
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise ValueError(data[:8])  # noqa: TRY004 (the type is that of untrusted bytes)
    decoded = text.decode()
    if len(decoded) > _LONGEST_PIECE:
        raise ValueError(len(decoded))
    return TokenPiece(decoded, struct.unpack("<f", score)[0], PieceType(kind))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: integers, and bytes of others."""
    place = 0
    while place < len(data):
        key, place = _integer(data, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _integer(data, place)
            yield number, value
            continue
        if wire == 2:  # noqa: PLR2004 (the wire types are in the module's docstring)
            length, place = _integer(data, place)
        else:
            length = {1: 8, 5: 4}.get(wire, len(data) + 1)
        if length > len(data) - place:
            raise ValueError(place)
        yield number, data[place : place + length]
        place += length


def _integer(data: bytes, place: int) -> tuple[int, int]:
    """A variable-length integer, and where the next field begins."""
    value = 0
    for shift, byte in enumerate(data[place : place + _LONGEST_INTEGER]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:  # noqa: PLR2004
            return value, place + shift + 1
    raise ValueError(place)
