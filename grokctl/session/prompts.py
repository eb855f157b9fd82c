"""Read a file of prompts, one JSON object a line, into requests."""

import codecs
import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, BinaryIO, Final

from grokctl.errors import UsageError, invalid
from grokctl.inference.generation import Request
from grokctl.os_errors import located, refusal
from grokctl.parse import plain_text
from grokctl.paths import expanded, quoted
from grokctl.session import settings
from grokctl.session.json_object import read_object

if TYPE_CHECKING:  # a malformed file is reported before JAX is loaded
    from grokctl.inference.plan import RunPlan

_LONGEST_LINE: Final = 2**20
"""Bytes; several times what any context holds."""
_MOST_PROMPTS: Final = 100_000
_MOST_BYTES: Final = 2**27
"""Bytes of all lines, which take five times as many in memory."""
_LONGEST_KEY: Final = 40
_KEYS: Final = ("prompt", "token_ids", "id", *settings.SETTINGS)
_EXAMPLE: Final = '{"prompt": "Once upon a time", "max_tokens": 16}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What to continue and how, before a checkpoint is known."""

    content: str | tuple[int, ...]
    """Text, or token ids."""
    settings: Request
    """How to continue it; its prompt is empty."""
    where: str = ""
    """File and line, for errors."""
    id: str | int | None = None
    """The name that a line gives itself."""


def read_prompts(file: str, defaults: Request) -> list[Prompt]:
    """Read all lines of a file.

    Args:
        file: A path, or `-` for stdin.
        defaults: Settings that a line leaves out; prompt n has this seed plus n.

    Returns:
        The prompts in the order of the lines, without empty lines.

    Raises:
        UsageError: A line is malformed, or there is none.
    """
    name = "stdin" if file == "-" else file
    prompts: list[Prompt] = []
    with _opened(file) as lines:
        for number, line in _lines(lines, name):
            if len(prompts) == _MOST_PROMPTS:
                raise UsageError(f"{name}: more than {_MOST_PROMPTS:,} prompts")
            seed = (defaults.sampling.seed + len(prompts)) % 2**64
            seeded = replace(defaults, sampling=replace(defaults.sampling, seed=seed))
            where = f"{name}, line {number}"
            with _errors_at(where):
                prompts.append(_prompt(where, read_object(line, "line", example=_EXAMPLE), seeded))
    if not prompts:
        raise UsageError(f"{name}: no prompts, expected lines such as {_EXAMPLE}")
    return prompts


def to_requests(prompts: list[Prompt], plan: "RunPlan") -> list[Request]:
    """The requests for an engine.

    Raises:
        UsageError: A prompt is empty, longer than the context, or no text for this model.
    """
    requests = []
    for prompt in prompts:
        with _errors_at(prompt.where):
            requests.append(_request(prompt, plan))
    return requests


def check_settings(request: Request, plan: "RunPlan") -> None:
    """Refuse settings that a checkpoint cannot follow.

    Raises:
        InvalidValueError: Stop texts need a tokenizer, or a token id lies outside the vocabulary.
    """
    if request.stop and plan.tokenizer is None:
        problem = "needs a tokenizer.model, this checkpoint has none"
        raise invalid("stop", request.stop[0], problem)
    request.check_vocabulary(plan.config.vocab_size)


def _request(prompt: Prompt, plan: "RunPlan") -> Request:
    content = prompt.content
    if plan.tokenizer is None and isinstance(content, str):
        hint = '{"token_ids": [1, 2, 3]}'
        raise UsageError("a text needs a tokenizer.model, this checkpoint has none", hint)
    check_settings(prompt.settings, plan)
    tokens = plan.encode(content) if isinstance(content, str) else content
    if not tokens:
        raise UsageError("the prompt is empty", _EXAMPLE)
    plan.check(tokens)
    return replace(prompt.settings, prompt=tuple(tokens))


@contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
    if file == "-":
        if sys.stdin is None:
            raise UsageError("stdin: closed, expected prompts")
        yield sys.stdin.buffer
        return
    try:
        with expanded(file).open("rb") as opened:
            yield opened
    except OSError as error:
        raise refusal(located(error, expanded(file))) from error


def _lines(lines: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, and their numbers."""
    number = nbytes = 0
    while line := lines.readline(_LONGEST_LINE + 1):
        number += 1
        nbytes += len(line)
        if nbytes > _MOST_BYTES:
            raise UsageError(
                f"{name}: longer than {_MOST_BYTES:,} bytes", f"split -C 100M {quoted(name)}"
            )
        if len(line) > _LONGEST_LINE:
            raise UsageError(f"{name}, line {number}: longer than {_LONGEST_LINE:,} bytes")
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line


@contextmanager
def _errors_at(where: str) -> Iterator[None]:
    """Put the place in front of errors."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}", error.hint) from error


def _prompt(where: str, values: dict[str, object], request: Request) -> Prompt:
    given = {key: value for key, value in values.items() if value is not None}
    for key in values:
        if key not in _KEYS:
            short = key[:_LONGEST_KEY]
            (nearest,) = difflib.get_close_matches(short, _KEYS, n=1, cutoff=0.0)
            raise UsageError(
                f"unknown key {short!r}, the nearest is {nearest!r}", f"keys: {', '.join(_KEYS)}"
            )
    if ("prompt" in given) == ("token_ids" in given):
        found = "both" if "prompt" in given else "neither"
        raise UsageError(f'expected "prompt" or "token_ids", found {found}', _EXAMPLE)
    for name in settings.SETTINGS:
        if name in given:
            request = settings.change(request, name, given[name])
    return Prompt(where=where, id=_id(given.get("id")), content=_content(given), settings=request)


def _id(value: object) -> str | int | None:
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise UsageError(f"id: expected a text or an integer, found {settings.brief(value)}")
    return value


def _content(given: dict[str, object]) -> str | tuple[int, ...]:
    match given:
        case {"prompt": str() as text}:
            return plain_text(settings.check_text("prompt", text), "prompt")
        case {"prompt": value}:
            raise UsageError(f"prompt: expected a text, found {settings.brief(value)}")
        case {"token_ids": list() as ids}:
            for token in ids:
                if isinstance(token, bool) or not isinstance(token, int):
                    raise UsageError(f"token_ids: expected integers, found {settings.brief(token)}")
            return tuple(ids)
        case _:
            raise UsageError(
                f"token_ids: expected a list, found {settings.brief(given['token_ids'])}"
            )
