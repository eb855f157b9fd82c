"""What is printed on a narrow terminal: a line to copy stays one line."""

import io

import pytest
from rich.console import Console as RichConsole

from grokctl.errors import UsageError
from grokctl.screen import console as module
from grokctl.screen.console import Console

LONG = "/scratch/" + "x" * 60 + "/bb"


@pytest.fixture
def narrow(monkeypatch):
    """A console on a terminal of 40 columns, and what it prints."""
    monkeypatch.setattr(module, "is_terminal", lambda _: True)
    console, text = Console(), io.StringIO()
    console.out = RichConsole(file=text, width=40, highlight=False)
    console.err = RichConsole(file=text, width=40, highlight=False)
    return console, text


@pytest.mark.parametrize("value", [f"grokctl verify {LONG}", LONG, "9" * 64])
def test_a_value_to_copy_is_one_line(narrow, value):
    console, text = narrow

    console.facts("fetched bb", [("release", "short"), ("next", value)])
    console.asides([("next", value)])

    assert text.getvalue().splitlines() == [
        "fetched bb",
        " release  short",
        f" next     {value}",
        "",
        f"next  {value}",
    ]


def test_a_note_that_ends_with_a_command_is_one_line(narrow):
    console, text = narrow

    console.note(f"bb: its content is not proven (grokctl verify {LONG})")

    assert text.getvalue() == f"bb: its content is not proven (grokctl verify {LONG})\n"


def test_prose_is_folded_beside_its_name(narrow):
    console, text = narrow

    console.facts("bb", [("proven before", "40 files, unchanged since, the first on a day")])

    lines = text.getvalue().splitlines()
    assert lines[1].startswith(" proven before  40 files")
    assert all(len(line) <= 40 for line in lines)
    assert lines[2].startswith(" " * 16)


def test_notes_and_hints_keep_names_with_invisible_characters_right(capsys):
    console, command = Console(), "rm -r '.out.\u202e.partial'"

    console.note(f"to delete it: {command}")
    console.failure(UsageError("x\u202ey: exists", command))

    shown = r"rm -r $'.out.\342\200\256.partial'"
    assert capsys.readouterr().err.splitlines() == [
        f"to delete it: {shown}",
        "error: xy: exists",
        f"hint: {shown}",
    ]
