"""Text to token ids and back, also while tokens are still arriving."""

from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from grokctl.errors import GrokctlError, Reason, corrupt
from grokctl.os_errors import TooLargeError, is_absence, located, refusal
from grokctl.paths import LARGEST_TOKENIZER, read_limited

_BROKEN = "\ufffd"
_LONGEST_CHARACTER = 4
"""Bytes of UTF-8: fewer broken ones at the end may still become a character."""
_WINDOW = 8
"""Tokens before the new ones that are decoded with them: spaces and bytes depend on neighbours."""


class Tokenizer:
    """A sentencepiece model.

    Args:
        path: The file.
        vocab_size: Vocabulary of the model, at least as large as the tokenizer's.
        data: Content of the file, if it was read before.

    Raises:
        CorruptCheckpointError: The file is no sentencepiece model, or belongs to another model.
    """

    def __init__(self, path: Path, *, vocab_size: int, data: bytes | None = None) -> None:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            if data is None:
                data = read_limited(path, LARGEST_TOKENIZER)
            processor.load_from_serialized_proto(data)
            for piece in range(processor.vocab_size()):
                processor.id_to_piece(piece)  # is it UTF-8?
        except TooLargeError as error:
            raise _bad(path, f"{error.strerror}") from error
        except OSError as error:
            if is_absence(error) or path.is_dir():
                raise _bad(path, "is no sentencepiece model") from error
            raise refusal(located(error, path)) from error
        except (RuntimeError, UnicodeDecodeError) as error:
            raise _bad(path, "is no sentencepiece model") from error
        if processor.vocab_size() > vocab_size:
            detail = f"has {processor.vocab_size()} pieces, the model has {vocab_size}"
            raise _bad(path, detail)
        self._processor = processor

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without begin or end marks, as the reference code does it."""
        return list(self._processor.encode(text))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; ids without a piece give no text."""
        known = self._processor.vocab_size()
        return str(self._processor.decode([token for token in tokens if token < known]))

    def stream(self, prompt: Sequence[int]) -> "TextStream":
        """A stream that turns the tokens after a prompt into text."""
        return TextStream(self, prompt)


class TextStream:
    """Incremental detokenising: never half a character, and spaces as in the whole text."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt)
        self._certain_length = 0
        self._forget()
        self._certain_length = self._length_of_certain(tokenizer.decode(self._tokens))

    def push(self, token: int) -> str:
        """Add a token; return the text that it makes certain, which may be empty."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        certain = max(self._certain_length, self._length_of_certain(text))
        new = text[self._certain_length : certain]
        self._certain_length = certain
        if certain == len(text):
            self._forget()
        return new

    @staticmethod
    def _length_of_certain(text: str) -> int:
        """Length of a text without the bytes at its end that may still become a character."""
        broken = len(text) - len(text.rstrip(_BROKEN))
        return len(text) - min(broken, _LONGEST_CHARACTER - 1)

    def _forget(self) -> None:
        """Drop tokens that later ones do not depend on; keep some that have text."""
        window = _WINDOW
        while window < len(self._tokens):
            text = self._tokenizer.decode(self._tokens[-window:])
            if text.strip():
                self._tokens = self._tokens[-window:]
                self._certain_length = len(text)
                return
            window *= 2

    def finish(self) -> str:
        """The rest, with a replacement character for bytes that never became one."""
        return self._tokenizer.decode(self._tokens)[self._certain_length :]


def _bad(path: Path, detail: str) -> GrokctlError:
    return corrupt(path.name, Reason.MALFORMED, detail)
