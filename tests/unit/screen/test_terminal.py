"""Bars are drawn where lines can be drawn again, and nowhere else."""

import io
import sys

import pytest

from grokctl.events import Advanced, Finished, Stage, Started
from grokctl.screen.console import Console
from grokctl.screen.terminal import is_terminal, moves_cursor

XTERM = {"TERM": "xterm-256color"}


class Stream(io.StringIO):
    """A stream that says what it is."""

    def __init__(self, *, is_tty: bool) -> None:
        super().__init__()
        self.is_tty = is_tty

    def isatty(self) -> bool:
        return self.is_tty


@pytest.mark.parametrize(
    ("changes", "is_drawn"),
    [
        ({}, True),
        ({"NO_COLOR": "1"}, True),
        ({"CI": "false"}, True),
        ({"CI": "true"}, False),
        ({"CI": "1", "FORCE_COLOR": "3"}, False),
        ({"TERM": "dumb"}, False),
        ({"TERM": "unknown"}, False),
    ],
)
def test_a_terminal_that_is_a_log_gets_no_bars(changes, is_drawn):
    assert moves_cursor(Stream(is_tty=True), XTERM | changes) is is_drawn
    assert not moves_cursor(Stream(is_tty=False), XTERM | changes)


def test_a_closed_stream_is_no_terminal():
    closed = Stream(is_tty=True)
    closed.isatty = io.StringIO.isatty.__get__(closed)
    closed.close()

    assert not is_terminal(closed)
    assert not is_terminal(None)


@pytest.mark.parametrize(
    ("variables", "is_tty"),
    [
        ({"FORCE_COLOR": "1"}, False),
        ({"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"}, False),
        ({"CLICOLOR_FORCE": "1", "COLORTERM": "truecolor"}, False),
        ({"TERM": "dumb"}, True),
        ({"CI": "true", "FORCE_COLOR": "1"}, True),
        ({"CI": "true", "NO_COLOR": "1"}, True),
    ],
)
def test_progress_in_a_log_moves_no_cursor(monkeypatch, variables, is_tty):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    err, out = Stream(is_tty=is_tty), Stream(is_tty=False)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "stdout", out)
    console = Console()

    with console.observing() as observe:
        observe(Started(stage=Stage.FETCH, total=100))
        for done in range(0, 100, 10):
            observe(Advanced(stage=Stage.FETCH, done=done))
        observe(Finished(stage=Stage.FETCH))
    console.note("x" * 300)
    console.asides([("a", "b")])
    console.facts("title", [("name", "value")])

    text = err.getvalue() + out.getvalue()
    for code in ("\x1b[?25", "\x1b[1A", "\x1b[2K", "\r"):
        assert code not in text
    assert len(text) < 1000
