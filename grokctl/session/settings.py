"""The settings of a generation by name: parsed from JSON or a typed line, checked, and applied."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from grokctl.errors import InvalidValueError
from grokctl.inference.generation import Request
from grokctl.model.sampling import Sampling

_LARGEST: Final = 2**64
_MOST_STOPS: Final = 64
_LONGEST_STOP: Final = 1000
"""Characters. Every new text is searched for every stop string."""
MOST_IDS: Final = 1024
"""Token ids that a setting can name."""
_LONGEST_ID: Final = 10
"""Digits."""
_OF_SAMPLING: Final = frozenset(field.name for field in fields(Sampling))
_SWITCHES: Final = {
    "on": True,
    "true": True,
    "yes": True,
    "off": False,
    "false": False,
    "no": False,
}
_LONGEST_VALUE: Final = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The type of a setting."""

    expected: str
    """What to type for it, for errors."""
    parse: Callable[[str], object]
    """The value of a typed text, as JSON would give it. A `ValueError` refuses the text."""
    check: Callable[[str, object], Any]
    """The value for a request, from a name and what JSON gives; an `InvalidValueError` refuses."""


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _invalid(name, value, "a number")
    if abs(value) >= _LARGEST:
        raise _invalid(name, value, "a number below 2^64")
    return float(value)


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _invalid(name, value, "an integer")
    if abs(value) >= _LARGEST:
        raise _invalid(name, value, "an integer below 2^64")
    return value


def _count(name: str, value: object) -> int:
    count = _integer(name, value)
    if count < 0:
        raise _invalid(name, value, "at least 0")
    return count


def _switch(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _invalid(name, value, "true or false")
    return value


def _texts(name: str, value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise _invalid(name, value, "a text or a list of texts")
    if len(texts) > _MOST_STOPS:
        raise _mismatch(name, f"at most {_MOST_STOPS} texts", f"{len(texts):,}")
    for text in texts:
        if not isinstance(text, str):
            raise _mismatch(name, "a list of texts", f"{brief(text)} in it")
        if len(text) > _LONGEST_STOP:
            raise _mismatch(name, f"at most {_LONGEST_STOP:,} characters", f"{len(text):,}")
        check_text(name, text)
    return tuple(filter(None, texts))


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise _invalid(name, value, "a list of token ids")
    if len(value) > MOST_IDS:
        raise _mismatch(name, f"at most {MOST_IDS:,} token ids", f"{len(value):,}")
    return tuple(_count(name, token) for token in value)


def _bias(name: str, value: object) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise _invalid(name, value, 'an object such as {"42": -100}')
    if len(value) > MOST_IDS:
        raise _mismatch(name, f"at most {MOST_IDS:,} token ids", f"{len(value):,}")
    for key in value:
        if not (key.isascii() and key.isdecimal() and len(key) <= _LONGEST_ID):
            raise _mismatch(name, "token ids as keys", brief(key))
    return tuple(sorted((int(key), _number(name, bias)) for key, bias in value.items()))


def _parse_switch(text: str) -> object:
    try:
        return _SWITCHES[text.lower()]
    except KeyError as error:
        raise ValueError(text) from error


def _parse_texts(text: str) -> object:
    return _parse_json(text) if text[:1] in {'"', "["} else text


def _parse_json(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError(text) from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(pairs)
    return values


def _parse_ids(text: str) -> object:
    return _parse_json(text if text[:1] == "[" else f"[{text}]")


_NUMBER: Final = Setting(expected="a number", parse=float, check=_number)
_INTEGER: Final = Setting(expected="an integer", parse=int, check=_integer)
_COUNT: Final = Setting(expected="an integer", parse=int, check=_count)
_SWITCH: Final = Setting(expected="on or off", parse=_parse_switch, check=_switch)
_TEXTS: Final = Setting(expected="a text, or JSON", parse=_parse_texts, check=_texts)
_IDS: Final = Setting(expected="token ids, 1,2,3", parse=_parse_ids, check=_token_ids)
_BIAS: Final = Setting(expected='JSON such as {"42": -100}', parse=_parse_json, check=_bias)
SETTINGS: Final[Mapping[str, Setting]] = {
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _COUNT,
    "min_p": _NUMBER,
    "frequency_penalty": _NUMBER,
    "presence_penalty": _NUMBER,
    "logit_bias": _BIAS,
    "seed": _INTEGER,
    "max_tokens": _COUNT,
    "min_tokens": _COUNT,
    "stop": _TEXTS,
    "stop_token_ids": _IDS,
    "ignore_eos": _SWITCH,
    "cache_prompt": _SWITCH,
}
"""By the names of the fields of `Request` and `Sampling`, which are the keys of JSON, too."""


def change(request: Request, name: str, value: object) -> Request:
    """Change one setting.

    Args:
        request: What to change.
        name: A key of `SETTINGS`.
        value: As JSON gives it.

    Raises:
        InvalidValueError: The value has another type, or lies outside its range.
    """
    checked = SETTINGS[name].check(name, value)
    if name in _OF_SAMPLING:
        return replace(request, sampling=replace(request.sampling, **{name: checked}))
    return replace(request, **{name: checked})


def parse(name: str, text: str) -> object:
    """The value of a typed text, as JSON would give it.

    Raises:
        InvalidValueError: The text has another type than the setting.
    """
    setting = SETTINGS[name]
    try:
        return setting.parse(text)
    except ValueError:
        raise _invalid(name, text, setting.expected) from None


def get(request: Request, name: str) -> object:
    """The value of a setting."""
    value: object = getattr(request.sampling if name in _OF_SAMPLING else request, name)
    return value


def check_text(name: str, text: str) -> str:
    """Refuse a lone surrogate, which JSON can write and no text contains.

    Raises:
        InvalidValueError: There is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _mismatch(name, "text", "half a character") from None
    return text


def brief(value: object) -> str:
    """A stranger's value in a few characters, for an error."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str() | int() | float():
            text = repr(value[: _LONGEST_VALUE + 1] if isinstance(value, str) else value)
            return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"
        case list():
            return "a list"
        case _:
            return "an object"


def _invalid(name: str, value: object, expected: str) -> InvalidValueError:
    return InvalidValueError(f"expected {expected}", None, name, brief(value))


def _mismatch(name: str, expected: str, found: str) -> InvalidValueError:
    return InvalidValueError(f"expected {expected}, found {found}", None, name)
