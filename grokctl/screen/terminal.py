"""What a stream can show: colours are one thing, a cursor that moves is another."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from grokctl.os_errors import StdoutError

_DUMB: Final = frozenset({"dumb", "unknown", "emacs"})
"""Terminals, by `TERM`, that print what they get from left to right."""
_NO: Final = frozenset({"", "0", "false", "no"})


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal, whatever variables such as `FORCE_COLOR` say."""
    try:
        return stream is not None and bool(stream.isatty())
    except (AttributeError, OSError, ValueError):  # ValueError: it is closed
        return False


def moves_cursor(stream: Any, environ: Mapping[str, str] | None = None) -> bool:
    """Whether lines on a stream can be drawn again: on a terminal that somebody looks at.

    A job of continuous integration may have a terminal, which is a log for all that.
    """
    variables = os.environ if environ is None else environ
    is_log = variables.get("CI", "").lower() not in _NO
    return is_terminal(stream) and not is_log and variables.get("TERM", "").lower() not in _DUMB


@contextmanager
def to_stdout() -> Iterator[None]:
    """Errors in here are those of stdout, which the errors themselves do not tell."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StdoutError(error) from error
