"""Read one JSON object from strangers' bytes: no key twice, no endless number, no deep nest."""

import json
from typing import Final, NoReturn

from grokctl.errors import UsageError
from grokctl.parse import decode
from grokctl.session import settings

_LONGEST_NUMBER: Final = 20
"""Digits of an integer below 2^64."""
_LONGEST_KEY: Final = 40


def read_object(data: bytes, name: str, *, example: str | None = None) -> dict[str, object]:
    """Parse one object.

    Args:
        data: JSON in UTF-8.
        name: Of the data, for errors.
        example: Of such an object, for hints.

    Raises:
        UsageError: It is not JSON or no object, a key appears twice, a number is too long, or
            objects are nested too deeply.
    """
    text = decode(data, name)
    try:
        values = json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_constant=_constant
        )
    except RecursionError as error:
        raise UsageError("nested too deeply") from error
    except json.JSONDecodeError as error:
        problem = f"{error.msg[:1].lower()}{error.msg[1:]}, column {error.colno}"
        raise UsageError(f"not JSON ({problem})", example) from error
    if not isinstance(values, dict):
        raise UsageError(f"expected an object, found {settings.brief(values)}", example)
    return values


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in pairs:
        if key in values:
            raise UsageError(f"key {key[:_LONGEST_KEY]!r} appears twice")
        values[key] = value
    return values


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise UsageError(f"a number of {len(digits)} digits, expected at most {_LONGEST_NUMBER}")
    return int(digits)


def _constant(name: str) -> NoReturn:
    raise UsageError(f"not JSON ({name})")
