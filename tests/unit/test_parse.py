"""Every door reads text in the same way, and paths as people type them."""

import contextlib
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
from typer.testing import CliRunner

from grokctl.cli.app import app
from grokctl.cli.hints import remember, to_paste
from grokctl.cli.options import path_of
from grokctl.cli.run import read_prompt
from grokctl.cli.score import read_content
from grokctl.errors import UsageError
from grokctl.inference.generation import Request
from grokctl.model.sampling import Sampling
from grokctl.session.prompts import read_prompts

TEXT = "One line,\n\nand Gr\u00fc\u00dfe"
DOORS = ("--prompt-file", "-p -", "-p", "--text", "--text -", "--prompts-file")


def through(door, data, tmp_path, monkeypatch):
    """A text as one of the options gives it to the tokenizer."""
    file = tmp_path / "file"
    file.write_bytes(data)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data), isatty=bool))
    match door:
        case "--prompt-file":
            return read_prompt(None, file, None)
        case "-p -":
            return read_prompt("-", None, None)
        case "-p":
            return read_prompt(data.decode("utf-8", "surrogateescape"), None, None)
        case "--text":
            return read_content(str(file), None)
        case "--text -":
            return read_content("-", None)
    text = json.dumps({"prompt": data.decode("utf-8", "surrogateescape")})
    file.write_text(text, "utf-8")
    (prompt,) = read_prompts(str(file), Request(prompt=(), sampling=Sampling(seed=0), max_tokens=1))
    return prompt.content


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(TEXT.encode(), id="plain"),
        pytest.param(TEXT.encode("utf-8-sig"), id="byte-order-mark"),
        pytest.param(TEXT.replace("\n", "\r\n").encode(), id="windows-lines"),
        pytest.param(TEXT.replace("\n", "\r").encode("utf-8-sig"), id="old-mac-lines"),
    ],
)
def test_one_text_is_the_same_through_every_door(door, data, tmp_path, monkeypatch):
    assert through(door, data, tmp_path, monkeypatch) == TEXT


@pytest.mark.parametrize("door", ["--prompt-file", "-p -", "--text", "--text -"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_last_line_of_a_file_ends_like_the_others(door, end, tmp_path, monkeypatch):
    assert through(door, (TEXT + end).encode(), tmp_path, monkeypatch) == TEXT
    assert through(door, (TEXT + end * 2).encode(), tmp_path, monkeypatch) == TEXT + "\n"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(b"caf\xe9", "UTF-8|half a character", id="latin-1"),
        pytest.param(b"a\0b", "zero byte", id="nul"),
    ],
)
def test_what_is_no_text_is_refused_at_every_door(door, data, words, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=words):
        through(door, data, tmp_path, monkeypatch)


@pytest.mark.parametrize("door", ["--prompt-file", "-p -", "--text", "--text -"])
def test_utf_16_is_called_so_with_the_command_that_converts_it(door, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="found UTF-16") as caught:
        through(door, TEXT.encode("utf-16"), tmp_path, monkeypatch)

    assert "iconv" in caught.value.hint


def test_a_mark_inside_of_a_text_belongs_to_it(tmp_path, monkeypatch):
    text = "a\ufeffb"

    assert through("--prompt-file", text.encode(), tmp_path, monkeypatch) == text


def test_every_option_for_a_path_reads_it_as_people_type_it():
    options = {
        name: next(item for item in hint.__metadata__ if hasattr(item, "parser"))
        for command in app.registered_commands
        for name, hint in get_type_hints(command.callback, include_extras=True).items()
        if hasattr(hint, "__metadata__") and Path in get_args(hint.__origin__)
    }

    assert set(options) >= {"to", "home", "out", "logits", "keep", "prompt_file", "tokenizer"}
    assert {name for name, option in options.items() if option.parser is not path_of} == set()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["fetch", "--to", "r/Andr\udce9"], "--to: expected UTF-8", id="folder"),
        pytest.param(["fetch", "--to=r/Andr\udce9"], "--to: expected UTF-8", id="one-word"),
        pytest.param(["verify", "Andr\udce9"], "argument: expected UTF-8", id="checkpoint"),
        pytest.param(["fetch", "--only", "\udce9*"], "--only: expected UTF-8", id="glob"),
        pytest.param(["run", "--stop", "\udce9"], "--stop: expected UTF-8", id="stop"),
        pytest.param(["fetch", "--to", ""], "--to: expected a path", id="empty-folder"),
        pytest.param(["score", "--logits="], "--logits: expected a path", id="empty-file"),
    ],
)
def test_an_argument_that_is_not_utf8_is_named_before_anything_happens(
    arguments, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    outcome = CliRunner().invoke(app, arguments)

    assert outcome.exit_code == 2
    assert f"error: {words}" in outcome.stderr
    assert list(tmp_path.iterdir()) == []


# --- hints


@pytest.fixture
def piped(monkeypatch):
    """A stdin of some kind."""
    with contextlib.ExitStack() as stack:

        def set_up(kind, tmp_path):
            if kind == "pipe":
                reading, writing = os.pipe()
                stack.callback(os.close, writing)
                file = stack.enter_context(os.fdopen(reading, encoding="utf-8"))
            else:
                path = Path("/dev/null") if kind == "nothing" else tmp_path / "text"
                path.touch() if kind == "file" else None
                file = stack.enter_context(path.open(encoding="utf-8"))
            monkeypatch.setattr("sys.stdin", file)

        yield set_up


@pytest.mark.parametrize(
    ("kind", "prompt", "text"),
    [
        ("pipe", "-p -", "--text -"),
        ("file", "-p -", "--text -"),
        ("nothing", "-p 'Once upon a time'", "--text essay.txt"),
    ],
)
def test_a_missing_text_has_a_hint_that_knows_what_was_piped(kind, prompt, text, piped, tmp_path):
    piped(kind, tmp_path)
    remember(["run", "a checkpoint", "-n", "4", "--json"])
    with pytest.raises(UsageError, match="a prompt is required") as run:
        read_prompt(None, None, None)
    remember(["score", "grok-1"])
    with pytest.raises(UsageError, match="found neither") as score:
        read_content(None, None)

    assert run.value.hint == f"grokctl run 'a checkpoint' -n 4 --json {prompt}"
    assert score.value.hint == f"grokctl score grok-1 {text}"


@pytest.mark.parametrize("typed", [["--home", "/a b"], ["--home=/a b"]])
def test_a_hint_keeps_the_home_that_was_typed(typed):
    remember(["verify", *typed])

    assert to_paste("grokctl fetch") == "grokctl fetch --home '/a b'"
    assert (
        to_paste("grokctl verify --quick  # fast") == "grokctl verify --quick --home '/a b'  # fast"
    )
    assert to_paste("grokctl run -p 'a/b; c # d'") == "grokctl run -p 'a/b; c # d' --home '/a b'"
    assert to_paste("grokctl verify /x") == "grokctl verify /x --home '/a b'"
    for hint in ("grokctl run -p | cat", "ls -l", None, "grokctl fetch --home DIR"):
        assert to_paste(hint) == hint


def test_a_hint_has_no_home_where_none_was_typed():
    remember(["verify"])

    assert to_paste("grokctl fetch") == "grokctl fetch"


def test_a_command_prints_the_hint_with_its_home(tmp_path):
    outcome = CliRunner().invoke(app, ["inspect", "--home", str(tmp_path)])

    assert f"hint: grokctl fetch --home {tmp_path}" in outcome.stderr
