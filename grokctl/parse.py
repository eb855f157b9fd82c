"""Parse what users type: text, sizes, and lists of numbers."""

import re
import sys
from pathlib import Path
from typing import Final

from grokctl.errors import UsageError, invalid

_LONGEST_TEXT: Final = 2**24
"""Characters; far more than any context holds."""
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


def read_stdin() -> str:
    """All of stdin.

    Raises:
        UsageError: It is closed, too long, or not UTF-8.
    """
    if sys.stdin is None:
        raise UsageError("stdin: closed, expected text")
    try:
        return _bounded(sys.stdin.read(_LONGEST_TEXT), "stdin")
    except UnicodeDecodeError as error:
        raise UsageError("stdin: not UTF-8 text") from error


def read_text(path: Path) -> str:
    """All of a text file.

    Raises:
        UsageError: It cannot be read, is too long, or not UTF-8.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return _bounded(file.read(_LONGEST_TEXT), str(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text") from error


def _bounded(text: str, name: str) -> str:
    if len(text) == _LONGEST_TEXT:
        raise UsageError(f"{name}: longer than {_LONGEST_TEXT:,} characters")
    return text


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
    try:
        size = float(number) * _UNITS[lowered[len(number) :]]
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
