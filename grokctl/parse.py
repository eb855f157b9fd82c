"""Parse what users type: text, sizes, and lists of numbers."""

import codecs
import re
import sys
from pathlib import Path
from typing import Final

from grokctl.errors import UsageError, invalid
from grokctl.os_errors import located, refusal

_LONGEST_TEXT: Final = 2**26
"""Bytes; far more than any context holds."""
_MARK: Final = "\ufeff"
_CONVERT: Final = "iconv -f UTF-16 -t UTF-8 FILE > utf8.txt"
_UNITS: Final = {"": 1} | {
    letter + suffix: base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("", 1000), ("i", 1024))
}


def require_utf8(text: str, name: str) -> str:
    """The same text, unless the shell passed bytes that are not UTF-8.

    Raises:
        UsageError: It did.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name}: not UTF-8 text") from error
    return text


def plain_text(text: str, name: str) -> str:
    """A text as every option and file gives it: one text has one result, whatever wrote it.

    Without a byte order mark, which some editors write, and with line ends as on Unix.

    Raises:
        UsageError: It is not UTF-8, or contains a zero byte.
    """
    text = require_utf8(text, name).removeprefix(_MARK)
    if "\0" in text:
        raise UsageError(f"{name}: contains a zero byte, expected text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_stdin() -> str:
    """All of stdin, as `read_text` reads a file.

    Raises:
        UsageError: It is closed, too long, or not UTF-8.
    """
    if sys.stdin is None:
        raise UsageError("stdin: closed, expected text")
    return _document(sys.stdin.buffer.read(_LONGEST_TEXT), "stdin")  # whatever the locale says


def read_text(path: Path) -> str:
    """All of a text file, without the line end of its last line.

    Raises:
        UsageError: It cannot be read, is too long, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            return _document(file.read(_LONGEST_TEXT), str(path))
    except OSError as error:
        raise refusal(located(error, path)) from error


def decode(data: bytes, name: str) -> str:
    """Decode UTF-8.

    Raises:
        UsageError: It is something else.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UsageError(f"{name}: expected UTF-8 text, found UTF-16", _CONVERT) from error
        raise UsageError(f"{name}: not UTF-8 text (byte {error.start + 1:,})") from error


def _document(data: bytes, name: str) -> str:
    """The text of a whole file: its last line ends like the others, and the text does not."""
    if len(data) == _LONGEST_TEXT:
        raise UsageError(f"{name}: longer than {_LONGEST_TEXT:,} bytes")
    return plain_text(decode(data, name), name).removesuffix("\n")


def read_token_ids(text: str, name: str) -> tuple[int, ...]:
    """Parse `1,2,3`; an empty text is no ids.

    Raises:
        InvalidValueError: It is something else.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        raise invalid(name, text, "expected token ids, such as 1,2,3")
    return tuple(map(int, parts))


def read_counts(text: str, name: str) -> tuple[int, ...]:
    """Parse `64,512`: numbers from 1 to 9,999,999; a repeated one counts once.

    Raises:
        InvalidValueError: It is something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("0*[1-9][0-9]{0,6}", part) for part in parts):
        raise invalid(name, text, "expected numbers from 1 to 9,999,999", f"{name} 1,4")
    return tuple(dict.fromkeys(map(int, parts)))


def read_ranges(text: str | None, name: str, example: str) -> frozenset[int] | None:
    """Parse `0-3,7`: numbers and ranges of numbers; None remains None.

    Raises:
        InvalidValueError: It is something else.
    """
    if text is None:
        return None
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})(?:-([0-9]{1,4}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise invalid(name, text, "expected numbers or ranges", f"{name} {example}")
        numbers.update(range(first, last + 1))
    return frozenset(numbers)


def read_size(text: str | None, name: str, *, unit: str) -> int | None:
    """Parse `500kB`, `20MB`, `1.5GiB` or a number of bytes; None remains None.

    Args:
        text: What was typed.
        name: The option.
        unit: The unit that people mean, such as `GB`: of fewer bytes than a thousandth of it, a
            number without a unit is a mistake.

    Raises:
        InvalidValueError: It is something else, not positive, or lacks its unit.
    """
    if text is None:
        return None
    lowered = text.strip().lower().removesuffix("/s").removesuffix("b")
    number = lowered.rstrip("kmgti")
    # float takes more: other digits, signs, underscores
    is_plain = re.fullmatch(r"[0-9.]+(?:e[0-9]{1,2})?", number) is not None
    try:
        size = float(number) * _UNITS[lowered[len(number) :]] if is_plain else 0.0
    except (ValueError, KeyError):
        size = 0.0
    if not 1 <= size < 2**63:
        raise invalid(name, text, "expected a size such as 500kB or 20MB")
    if number == lowered and not text.strip().lower().endswith("b") and size < _least(unit):
        likely = number.strip() + unit
        raise invalid(name, text, f"expected a unit, such as {likely}", f"{name} {likely}")
    return int(size)


def _least(unit: str) -> int:
    return int(_UNITS[unit.lower().removesuffix("b")]) // 1000
