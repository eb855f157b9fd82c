"""The settings of a generation by name: what JSON or a person says, checked, into a `Request`."""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Final, TypeVar

from grokctl.errors import UsageError
from grokctl.inference.generation import Request
from grokctl.model.sampling import Sampling

_Number = TypeVar("_Number", int, float)

_LARGEST: Final = 2**64
_MOST_STOPS: Final = 64
_LONGEST_STOP: Final = 1000
"""Characters. Every new text is searched for every stop string."""
_OF_SAMPLING: Final = frozenset(field.name for field in fields(Sampling))
_SWITCHES: Final = {
    "on": True,
    "true": True,
    "yes": True,
    "off": False,
    "false": False,
    "no": False,
}
_SHORT: Final = 40


def change(request: Request, name: str, value: object) -> Request:
    """Change one setting.

    Args:
        request: What to change.
        name: One of `SETTINGS`.
        value: As JSON gives it.

    Raises:
        UsageError: The value is of another type, or outside its range.
    """
    checked = SETTINGS[name](name, value)
    if name in _OF_SAMPLING:
        return replace(request, sampling=replace(request.sampling, **{name: checked}))
    return replace(request, **{name: checked})


def parse(name: str, text: str) -> object:
    """What a person typed for a setting, as JSON would give it.

    Raises:
        UsageError: It is nothing of that setting's type.
    """
    check = SETTINGS[name]
    try:
        if check is _stops:
            return json.loads(text) if text[:1] in {'"', "["} else text
        if check is _switch:
            return _SWITCHES[text.lower()]
        return float(text) if check is _number else int(text)
    except (ValueError, KeyError, RecursionError):
        wanted = {_stops: "JSON text", _switch: "on or off", _number: "a number"}
        rule = next((rule for kind, rule in wanted.items() if kind is check), "an integer")
        raise UsageError(f"{name} is {rule}, not {said(text)}") from None


def get(request: Request, name: str) -> object:
    """What a setting is now."""
    found: object = getattr(request.sampling if name in _OF_SAMPLING else request, name)
    return found


def check_text(name: str, text: str) -> str:
    """Refuse half characters, which JSON can write and no text holds.

    Raises:
        UsageError: There is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{name} holds half a character, so it is no text") from None
    return text


def said(value: object) -> str:
    """A stranger's value in a few characters, for an error."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str() | int() | float():
            text = repr(value)
            return text if len(text) <= _SHORT else f"{text[:_SHORT]}…"
        case list():
            return "a list"
        case _:
            return "an object"


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name} is a number, not {said(value)}")
    return float(_bounded(name, value))


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} is an integer, not {said(value)}")
    return _bounded(name, value)


def _bounded(name: str, value: _Number) -> _Number:
    if abs(value) >= _LARGEST:
        raise UsageError(f"{name} is a smaller number than {said(value)}")
    return value


def _count(name: str, value: object) -> int:
    count = _integer(name, value)
    if count < 0:
        raise UsageError(f"{name} is at least 0, not {count}")
    return count


def _switch(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name} is true or false, not {said(value)}")
    return value


def _stops(name: str, value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise UsageError(f"{name} is a text or a list of texts, not {said(value)}")
    if len(texts) > _MOST_STOPS:
        raise UsageError(f"{name} is at most {_MOST_STOPS} texts, not {len(texts):,}")
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(f"{name} is a list of texts, not of {said(text)}")
        if len(text) > _LONGEST_STOP:
            raise UsageError(f"{name} is at most {_LONGEST_STOP:,} characters, not {len(text):,}")
        check_text(name, text)
    return tuple(filter(None, texts))


SETTINGS: Final[Mapping[str, Callable[[str, object], Any]]] = {
    "temperature": _number,
    "top_p": _number,
    "top_k": _count,
    "min_p": _number,
    "seed": _integer,
    "max_tokens": _count,
    "stop": _stops,
    "ignore_eos": _switch,
}
"""Every setting, and what checks its value."""
