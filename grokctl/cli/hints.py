"""Hints that know what was typed: the command again with a change, and its home.

An error of the library advises in one of four forms, and `to_paste` makes a command of each:

- options, such as `--devices 4 --mesh model=4`: the typed command with these instead of its own;
- `CHECKPOINT NAME`: the typed command on this checkpoint;
- `VARIABLE=x grokctl run …`: the typed command with the variable;
- another command of grokctl: the same with the `--home` that was typed, and `--dry-run` if it is of
  the same name.
"""

import os
import re
import shlex
import stat
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

_KEPT: Final = re.compile(
    r"grokctl (up|list|remove|fetch|verify|inspect|reshard|export|run|serve|score|bench)\b"
)
"""A command that works below a home."""
_SAME: Final = "grokctl run …"
"""Stands for the typed command in a hint of the library."""
_CHECKPOINT: Final = "CHECKPOINT"
_END: Final = "--"
"""Of the options; arguments follow."""
_HOME: Final = "--home"
_DRY_RUN: Final = "--dry-run"
_OF_A_MESH: Final = frozenset({"--devices", "--mesh"})
"""A new value of one makes the other's old one wrong."""
_OF_A_SHELL: Final = re.compile(r"[();<>|&]+|.*….*")


@dataclass(frozen=True, slots=True)
class _Word:
    """An option with its value, the verb, or an argument, as typed."""

    tokens: tuple[str, ...]
    option: str = ""
    """The longest name of an option; empty for anything else."""
    is_multiple: bool = False
    is_argument: bool = False


@dataclass(frozen=True, slots=True)
class _Typed:
    """The command line, and the options of all commands."""

    arguments: tuple[str, ...]
    commands: Mapping[str, Any]


_NOTHING: Final = _Typed((), MappingProxyType({}))
_typed: ContextVar[_Typed] = ContextVar("typed", default=_NOTHING)


def remember(arguments: Sequence[str], commands: Mapping[str, Any] | None = None) -> None:
    """Keep the command line for hints.

    Args:
        arguments: What was typed after `grokctl`.
        commands: Typer's commands by name, which know their options.
    """
    _typed.set(_Typed(tuple(arguments), commands or {}))


def again(
    *changes: str, without: Collection[str] = (), instead_of: Collection[str] | None = None
) -> str:
    """The command as it was typed, with changes.

    Args:
        changes: Options with their values, which replace those of the same name.
        without: Options to leave out, by their longest name.
        instead_of: Arguments whose place the changes take; None puts the changes at the end.
    """
    words, options = list(_words(_typed.get().arguments)), list(_words(changes, is_verb_known=True))
    changed = {word.option for word in options if word.option and not word.is_multiple}
    dropped = changed | set(without)
    if len(changed & _OF_A_MESH) == 1:
        dropped |= _OF_A_MESH
    kept: list[_Word] = []
    place = None
    for word in words:
        is_replaced = word.is_argument and instead_of is not None and word.tokens[0] in instead_of
        if is_replaced and place is None:
            place = len(kept)
        if not is_replaced and word.option not in dropped - {""}:
            kept.append(word)
    if place is None:  # arguments may follow `--`
        place = next((at for at, word in enumerate(kept) if word.tokens == (_END,)), len(kept))
    elif any(word.tokens == (_END,) for word in kept[:place]):
        kept = [word for word in kept if word.tokens != (_END,)]
        place -= 1
    kept[place:place] = options
    return shlex.join(["grokctl", *(token for word in kept for token in word.tokens)])


def arguments_typed() -> list[str]:
    """The arguments that are no options, after the verb."""
    return [word.tokens[0] for word in _words(_typed.get().arguments) if word.is_argument]


def to_paste(hint: str | None) -> str | None:
    """A hint as a command that does what it advises; what is none stays as it is."""
    if hint is None or not _typed.get().arguments:
        return hint
    command, mark, comment = hint.partition("  #")
    if command.endswith(_SAME):
        return command.removesuffix(_SAME) + again() + mark + comment
    try:
        words = list(shlex.shlex(command, posix=True, punctuation_chars="();<>|&"))
        tokens = shlex.split(command)
    except ValueError:
        return hint
    first = tokens[0] if tokens else ""
    if any(_OF_A_SHELL.fullmatch(word) for word in words):
        made = command
    elif first == _CHECKPOINT:
        made = _on_checkpoint(tokens[1])
    elif first in _options_of(_verb()):
        made = again(*tokens)
    else:
        made = _kept(command, tokens)
    return made + mark + comment


def _on_checkpoint(name: str) -> str:
    """The typed command on a checkpoint, which follows the verb, instead of the typed one."""
    typed = _typed.get()
    words = [
        word for word in _words(typed.arguments) if not word.is_argument and word.tokens != (_END,)
    ]
    at = next((at + 1 for at, word in enumerate(words) if _is_verb(word.tokens[0])), len(words))
    words.insert(at, _Word((name,)))
    return shlex.join(["grokctl", *(token for word in words for token in word.tokens)])


def _kept(command: str, tokens: Sequence[str]) -> str:
    """Another command with the home that was typed, and as much of a plan as the typed one."""
    match = _KEPT.match(command)
    if match is None:
        return command
    more = []
    if match[1] == _verb() and _is_typed(_DRY_RUN) and _DRY_RUN not in tokens:
        more.append(_DRY_RUN)
    home = _typed_home()
    if home is not None and _HOME not in tokens:
        more += [_HOME, home]
    return " ".join([command, *map(shlex.quote, more)]) if more else command


def _words(arguments: Sequence[str], *, is_verb_known: bool = False) -> Iterator[_Word]:
    """Join options with their values."""
    options = _options_of(_verb())
    has_verb, left = is_verb_known, iter(arguments)
    for token in left:
        name, is_joined, _ = token.partition("=")
        if token == _END:
            yield _Word((token,))
            yield from (_Word((rest,), is_argument=True) for rest in left)
        elif token.startswith("-") and len(token) > 1:
            name = name if token.startswith("--") else token[:2]
            option = options.get(name)
            longest = max(option.opts, key=len) if option is not None else name
            takes_next = not (is_joined if token.startswith("--") else len(token) > len(name))
            has_value = name == _HOME if option is None else not option.is_flag
            value = [next(left, None)] if has_value and takes_next else []
            tokens = (token, *(each for each in value if each is not None))
            yield _Word(tokens, longest, is_multiple=bool(option and option.multiple))
        elif not has_verb:
            has_verb = True
            yield _Word((token,))
        else:
            yield _Word((token,), is_argument=True)


def _options_of(verb: str) -> dict[str, Any]:
    """The options of a command by each of their names."""
    commands = _typed.get().commands
    if verb not in commands:
        return {}
    options = (each for each in commands[verb].params if each.param_type_name == "option")
    return {name: option for option in options for name in option.opts}


def _is_verb(token: str) -> bool:
    return token in _typed.get().commands


def _verb() -> str:
    """The command that was typed."""
    return next(filter(_is_verb, _typed.get().arguments), "")


def _is_typed(option: str) -> bool:
    return any(word.option == option for word in _words(_typed.get().arguments))


def _typed_home() -> str | None:
    home = None
    for word in _words(_typed.get().arguments):
        if word.option == _HOME:
            _, is_joined, value = word.tokens[0].partition("=")
            home = value if is_joined else word.tokens[-1]
    return home


def is_piped() -> bool:
    """Whether stdin may hold a text: it is a pipe, a file or a socket."""
    with suppress(OSError, ValueError, AttributeError):  # it is closed, or none at all
        mode = os.fstat(sys.stdin.fileno()).st_mode
        return any(is_type(mode) for is_type in (stat.S_ISFIFO, stat.S_ISREG, stat.S_ISSOCK))
    return False
