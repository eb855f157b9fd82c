"""One field of a request's body: a value of the right type, or an error that names it."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from grokctl.serving.wire_errors import WireError, bad_request, unsupported
from grokctl.session import settings

Value = TypeVar("Value")


def take(
    given: Mapping[str, object], name: str, read: Callable[[str, object], Value], default: Value
) -> Value:
    """A field, as `read` checks it, or the default if it is absent."""
    return read(name, given[name]) if name in given else default


def switch(name: str, value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise mismatch(name, "true or false", value)
    return value


def text(name: str, value: object) -> str:
    """A text."""
    if not isinstance(value, str):
        raise mismatch(name, "a text", value)
    return value


def integer(name: str, value: object) -> int:
    """An integer, which true and false are not."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise mismatch(name, "an integer", value)
    return value


def mismatch(name: str, expected: str, found: object) -> WireError:
    """The error of a field that has another type, or lies outside its range."""
    message = f"{name}: expected {expected}, found {settings.brief(found)}"
    return bad_request(message, param=name)


def refuse(given: Mapping[str, object], neutral: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse fields that would change an answer, and have no effect here.

    Args:
        given: The body.
        neutral: Names of such fields, and the values with which each changes nothing.

    Raises:
        WireError: A field has another value.
    """
    for name, values in neutral.items():
        if name in given and not any(_is_same(given[name], value) for value in values):
            one = " or ".join(["null", *map(settings.brief, values)])
            raise unsupported(name, settings.brief(given[name]), one)


def _is_same(value: object, neutral: object) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
