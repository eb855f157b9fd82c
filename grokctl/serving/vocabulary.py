"""Every token as a string of its own, and where the tokens of a text begin in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import sentencepiece

from grokctl.errors import Reason, corrupt
from grokctl.model.tokenizer import Tokenizer
from grokctl.paths import LARGEST_TOKENIZER, read_limited

_SPACE: Final = "\u2581"
"""How sentencepiece writes a space in a piece."""
_ASCII: Final = 0x80
_BROKEN: Final = "\ufffd"
_LONGEST_OPEN: Final = 3
"""Bytes of UTF-8 that may still become a character."""


class Vocabulary:
    """The pieces of a tokenizer.

    Args:
        path: The sentencepiece model.
        tokenizer: The same, for texts.
        size: Of the model's vocabulary; ids without a piece are names, too.

    Raises:
        CorruptCheckpointError: The file is another one than the tokenizer's.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, *, size: int) -> None:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.load_from_serialized_proto(read_limited(path, LARGEST_TOKENIZER))
        except RuntimeError as error:
            raise corrupt(path.name, Reason.ALTERED, "changed while it was read") from error
        self.tokenizer = tokenizer
        self.size = size
        self._count = processor.vocab_size()
        self._pieces = [processor.id_to_piece(token) for token in range(self._count)]
        self._bytes: dict[int, int] = {}
        self.controls: dict[str, int] = {}
        """Ids of the pieces that no text has, by their names."""
        for token, piece in enumerate(self._pieces):
            if processor.is_byte(token):
                self._bytes[token] = int(piece[1:-1], 16)
            elif processor.is_control(token) or processor.is_unknown(token):
                self.controls[piece] = token
        self.longest = max((len(piece) for piece in self._pieces), default=1)
        """Characters of the longest piece."""
        self._names = [self._name(token) for token in range(self._count)]

    def _name(self, token: int) -> str:
        piece = self._pieces[token]
        if token in self._bytes:
            value = self._bytes[token]
            return chr(value) if value < _ASCII else f"bytes:\\x{value:02x}"
        return piece if piece in self.controls else piece.replace(_SPACE, " ")

    def name(self, token: int) -> str:
        r"""A token as a string.

        A space stays one, unlike in the text of a single token. A byte that is no character is
        `bytes:\xe2`, a control token has its own name, and an id without a piece is `token_id:42`.
        """
        return self._names[token] if 0 <= token < self._count else placeholder(token)

    def bytes_of(self, token: int) -> list[int]:
        """The bytes that a token adds to a text: none for a control token."""
        if token in self._bytes:
            return [self._bytes[token]]
        if token >= self._count or self._pieces[token] in self.controls:
            return list(self.tokenizer.decode([token]).encode())
        return list(self._names[token].encode())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; the name of a control token alone is that token."""
        control = self.controls.get(text)
        return self.tokenizer.encode(text) if control is None else [control]

    def certain_text(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without bytes at its end that later tokens may make a character."""
        text = self.tokenizer.decode(tokens)
        broken = len(text) - len(text.rstrip(_BROKEN))
        return text[: len(text) - min(broken, _LONGEST_OPEN)]

    def offsets(self, tokens: Sequence[int], text: str) -> list[int]:
        """Where each token begins in a text that it was made of, in characters.

        Tokens inside of one character share its offset.

        Args:
            tokens: Of the text.
            text: May have spaces, and other characters, that the tokens have lost or changed.
        """
        stream = self.tokenizer.stream(())
        places, decoded = [], ""
        for token in tokens:
            places.append(len(decoded))
            decoded += stream.push(token)
        decoded += stream.finish()
        if decoded == text:
            return places
        moved = aligned(decoded, text)
        return [moved[place] for place in places]


def placeholder(token: int) -> str:
    """A token as its number."""
    return f"token_id:{token}"


def aligned(decoded: str, text: str) -> list[int]:
    """For each character of what was decoded, and its end, the place in the text it comes from."""
    places, place = [], 0
    for character in decoded:
        while place < len(text) and text[place] != character and text[place].isspace():
            place += 1
        places.append(min(place, len(text)))
        place += 1
    return [*places, len(text)]
