"""Hints that know what was typed: the command again, its home, and a text that was piped."""

import os
import re
import shlex
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import Final

_typed: ContextVar[tuple[str, ...]] = ContextVar("typed", default=())
_COMMAND: Final = re.compile(
    r"(grokctl (?:fetch|verify|inspect|reshard|run|score|bench)\b[^#/…;&|]*?)(  #.*)?"
)
"""A hint of one command without a path, and its comment."""


def remember(arguments: Sequence[str]) -> None:
    """Keep the command line for hints."""
    _typed.set(tuple(arguments))


def again(*more: str) -> str:
    """The command as it was typed, with more arguments."""
    return shlex.join(["grokctl", *_typed.get(), *more])


def at_home(hint: str | None) -> str | None:
    """A hint with the `--home` that was typed, unless it names paths of its own."""
    home = _typed_home()
    match = _COMMAND.fullmatch(hint or "")
    if match is None or home is None or "--home" in match[1]:
        return hint
    return f"{match[1]} --home {shlex.quote(home)}{match[2] or ''}"


def _typed_home() -> str | None:
    home = None
    arguments = iter(_typed.get())
    for argument in arguments:
        name, is_joined, value = argument.partition("=")
        if name == "--home":
            home = value if is_joined else next(arguments, None)
    return home


def is_piped() -> bool:
    """Whether stdin may hold a text: it is a pipe, a file or a socket."""
    with suppress(OSError, ValueError, AttributeError):  # it is closed, or none at all
        mode = os.fstat(sys.stdin.fileno()).st_mode
        return any(is_type(mode) for is_type in (stat.S_ISFIFO, stat.S_ISREG, stat.S_ISSOCK))
    return False
