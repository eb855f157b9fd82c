"""Read a file of prompts, an object a line, into requests that are known to be possible."""

import difflib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, NoReturn

from grokctl.errors import UsageError
from grokctl.inference.generation import Request
from grokctl.session import settings

if TYPE_CHECKING:  # what is wrong with a file is said before JAX is loaded
    from grokctl.inference.plan import RunPlan

_LONGEST_LINE: Final = 2**20
"""Bytes, several times what any context holds."""
_MOST_PROMPTS: Final = 100_000
_LONGEST_NUMBER: Final = 20
"""Digits of an integer below 2^64."""
_LONGEST_NAME: Final = 40
_KEYS: Final = ("prompt", "token_ids", "id", *settings.SETTINGS)
_EXAMPLE: Final = '{"prompt": "Once upon a time", "max_tokens": 16}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One line, as far as it can be understood without a checkpoint."""

    where: str
    """File and line, for errors."""
    id: str | int | None
    """What the line calls itself."""
    content: str | tuple[int, ...]
    """Text, or token ids."""
    settings: Request
    """How to continue it; has no prompt yet."""


def read_prompts(file: str, defaults: Request) -> list[Prompt]:
    """Read every line, before anything else is done.

    Args:
        file: A path, or `-` for stdin.
        defaults: How to continue where a line says nothing; prompt n has this seed and n more.

    Returns:
        The prompts in the order of the lines; empty lines are none.

    Raises:
        UsageError: A line is not what it should be, or there is none.
    """
    name = "stdin" if file == "-" else file
    prompts: list[Prompt] = []
    with _opened(file) as lines:
        for number, line in _lines(lines, name):
            if len(prompts) == _MOST_PROMPTS:
                raise UsageError(f"{name}: holds more than {_MOST_PROMPTS:,} prompts")
            seed = (defaults.sampling.seed + len(prompts)) % 2**64
            started = replace(defaults, sampling=replace(defaults.sampling, seed=seed))
            where = f"{name}, line {number}"
            with _said_of(where):
                prompts.append(_prompt(where, _parse(line), started))
    if not prompts:
        raise UsageError(f"{name}: holds no prompts, which are lines such as {_EXAMPLE}")
    return prompts


def to_requests(prompts: list[Prompt], plan: "RunPlan") -> list[Request]:
    """What the engine is asked for.

    Raises:
        UsageError: A prompt is empty, too long or no text that this model knows.
    """
    requests = []
    for prompt in prompts:
        with _said_of(prompt.where):
            requests.append(_request(prompt, plan))
    return requests


def _request(prompt: Prompt, plan: "RunPlan") -> Request:
    content = prompt.content
    if plan.tokenizer is None and isinstance(content, str):
        hint = '{"token_ids": [1, 2, 3]}'
        raise UsageError("text needs a tokenizer.model, this checkpoint has none", hint)
    if plan.tokenizer is None and prompt.settings.stop:
        raise UsageError("stop needs a tokenizer.model, this checkpoint has none")
    tokens = plan.encode(content) if isinstance(content, str) else content
    if not tokens:
        raise UsageError("the prompt is empty: there is nothing to continue", _EXAMPLE)
    plan.check(tokens)
    return replace(prompt.settings, prompt=tuple(tokens))


@contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
    if file == "-":
        if sys.stdin is None:
            raise UsageError("stdin is closed, so there are no prompts to read")
        yield sys.stdin.buffer
        return
    try:
        with Path(file).open("rb") as opened:
            yield opened
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from error


def _lines(lines: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """Lines that hold something, and their numbers."""
    number = 0
    while line := lines.readline(_LONGEST_LINE + 1):
        number += 1
        if len(line) > _LONGEST_LINE:
            raise UsageError(f"{name}, line {number}: is longer than {_LONGEST_LINE:,} bytes")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # some editors leave it there
        if line.strip():
            yield number, line


@contextmanager
def _said_of(where: str) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}", error.hint) from error


def _parse(line: bytes) -> dict[str, object]:
    try:
        values = json.loads(
            line.decode(), object_pairs_hook=_unique, parse_int=_integer, parse_constant=_constant
        )
    except UnicodeDecodeError as error:
        raise UsageError(f"is no UTF-8 text (byte {error.start + 1})") from error
    except RecursionError as error:
        raise UsageError("is nested too deeply") from error
    except json.JSONDecodeError as error:
        found = f"{error.msg[:1].lower()}{error.msg[1:]}, column {error.colno}"
        raise UsageError(f"is no JSON ({found})", _EXAMPLE) from error
    if not isinstance(values, dict):
        raise UsageError(f"is no object, but {settings.said(values)}", _EXAMPLE)
    return values


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in pairs:
        if key in values:
            raise UsageError(f"says {key[:_LONGEST_NAME]!r} twice")
        values[key] = value
    return values


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise UsageError(f"holds a number of {len(digits)} digits")
    return int(digits)


def _constant(name: str) -> NoReturn:
    raise UsageError(f"holds {name}, which is no number of JSON")


def _prompt(where: str, values: dict[str, object], request: Request) -> Prompt:
    given = {key: value for key, value in values.items() if value is not None}
    for key in values:
        if key not in _KEYS:
            short = key[:_LONGEST_NAME]
            (nearest,) = difflib.get_close_matches(short, _KEYS, n=1, cutoff=0.0)
            raise UsageError(
                f"{short!r} is no key, the nearest is {nearest!r}", f"keys: {', '.join(_KEYS)}"
            )
    if ("prompt" in given) == ("token_ids" in given):
        many = "both" if "prompt" in given else "neither"
        raise UsageError(f'expected "prompt" or "token_ids", found {many}', _EXAMPLE)
    for name in settings.SETTINGS:
        if name in given:
            request = settings.change(request, name, given[name])
    return Prompt(where=where, id=_id(given.get("id")), content=_content(given), settings=request)


def _id(value: object) -> str | int | None:
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise UsageError(f"id is a text or an integer, not {settings.said(value)}")
    return value


def _content(given: dict[str, object]) -> str | tuple[int, ...]:
    match given:
        case {"prompt": str() as text}:
            return settings.check_text("prompt", text)
        case {"prompt": value}:
            raise UsageError(f"prompt is a text, not {settings.said(value)}")
        case {"token_ids": list() as ids}:
            for token in ids:
                if isinstance(token, bool) or not isinstance(token, int):
                    raise UsageError(f"token_ids holds integers, not {settings.said(token)}")
            return tuple(ids)
        case _:
            raise UsageError(f"token_ids is a list, not {settings.said(given['token_ids'])}")
