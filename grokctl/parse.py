"""What people type, as values: texts, sizes, lists of numbers."""

import re
import sys
from pathlib import Path
from typing import Final

from grokctl.errors import UsageError

_MOST_TEXT: Final = 2**24
"""Characters, far more than any context holds."""


def utf8(text: str | None, name: str) -> str | None:
    """Refuse what the shell handed over as bytes that are no text."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name}: is no UTF-8 text") from error
    return text


def _limited(text: str, name: str) -> str:
    if len(text) == _MOST_TEXT:
        raise UsageError(f"{name}: is longer than {_MOST_TEXT:,} characters")
    return text


def read_stdin() -> str:
    """All of stdin, of bounded length."""
    if sys.stdin is None:
        raise UsageError("stdin is closed, so there is no text to read")
    try:
        return _limited(sys.stdin.read(_MOST_TEXT), "stdin")
    except UnicodeDecodeError as error:
        raise UsageError("stdin: is no UTF-8 text") from error


def read_text(path: Path) -> str:
    """A text file, of bounded length."""
    try:
        with path.open(encoding="utf-8") as file:
            return _limited(file.read(_MOST_TEXT), str(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is no UTF-8 text") from error


def read_token_ids(text: str) -> list[int]:
    """Read `1,2,3`; nothing is no ids."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        raise UsageError(f"token ids {text[:60]!r} are no numbers", "--token-ids 1,2,3")
    return list(map(int, parts))


def read_counts(text: str, name: str) -> tuple[int, ...]:
    """Read `64,512`: numbers from 1 to 9,999,999, each of them once.

    Raises:
        UsageError: It is something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("0*[1-9][0-9]{0,6}", part) for part in parts):
        raise UsageError(f"{name} {text[:60]!r} are no numbers from 1 to 9,999,999", f"{name} 1,4")
    return tuple(dict.fromkeys(map(int, parts)))


def read_layers(text: str | None) -> frozenset[int] | None:
    """Read `0-3,7`; None if nothing was said.

    Raises:
        UsageError: It is something else.
    """
    return _read_numbers(text, "layers", "--layers 0-3,7")


def _read_numbers(text: str | None, name: str, example: str) -> frozenset[int] | None:
    """Numbers and ranges of numbers; None if nothing was said."""
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})(?:-([0-9]{1,4}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UsageError(f"{name} {text[:60]!r} are no numbers or ranges", example)
        found.update(range(first, last + 1))
    return frozenset(found)


def read_devices(text: str | None) -> frozenset[int] | None:
    """Read `0-7` or `0,1,4-7`; None if nothing was said.

    Raises:
        UsageError: It is something else.
    """
    return _read_numbers(text, "devices", "--only-devices 0-7")


def read_size(text: str | None) -> int | None:
    """Read `500kB`, `20MB`, `1.5GiB` or plain bytes.

    Raises:
        UsageError: It is something else, or not positive.
    """
    if text is None:
        return None
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    units |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
    lowered = text.strip().lower().removesuffix("/s").removesuffix("b")
    number = lowered.rstrip("kmgti")
    try:
        size = float(number) * units[lowered[len(number) :]]
    except (ValueError, KeyError):
        size = 0.0
    if not 1 <= size < 2**63:
        raise UsageError(f"size {text!r} is not one such as 500kB or 20MB")
    return int(size)
