"""Render events and results for people (rich) or programs (JSON lines).

Results go to stdout; progress, notes, hints and errors to stderr.
"""

import json
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any, Final

from rich import box
from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from grokctl.errors import GrokctlError
from grokctl.events import (
    Advanced,
    Event,
    Finished,
    Noted,
    Observer,
    Stage,
    Started,
    Unit,
    ignore,
    throttled,
)

_TITLES: Final = {
    Stage.METADATA: "find the torrent",
    Stage.FETCH: "fetch",
    Stage.SEED: "seed",
    Stage.VERIFY: "verify",
    Stage.STRUCTURE: "look at files",
    Stage.RESHARD: "reshard",
    Stage.LOAD: "load",
    Stage.COMPILE: "compile",
    Stage.PREFILL: "read prompt",
    Stage.DECODE: "write",
    Stage.SCORE: "score",
    Stage.MINIATURE: "write miniature",
}
_FLEETING: Final = frozenset({Stage.METADATA, Stage.STRUCTURE, Stage.PREFILL, Stage.COMPILE})
"""Stages whose bar goes when they are over."""
_MINUTE, _SMALL = 60, 10
_PIPE_WIDTH: Final = 200
_UNITS: Final = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def _harmless(text: str) -> str:
    """Text without control codes, which a terminal would obey."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def format_bytes(count: float) -> str:
    """Decimal units, as disks and networks are sold."""
    for size, unit in _UNITS:
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def format_count(count: float, unit: Unit) -> str:
    """A number with its unit."""
    return format_bytes(count) if unit is Unit.BYTES else f"{count:,.0f} {unit}"


def format_seconds(seconds: float) -> str:
    """`0.42 s`, `12 s`, `3:20` or `2:03:20`."""
    if seconds < _MINUTE:
        return f"{seconds:.2g} s" if seconds < _SMALL else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Rich(RichConsole):
    """A console whose reader may go away: then there is nobody left to tell."""

    def on_broken_pipe(self) -> None:
        """Do not end the process, as rich would."""


class Console:
    """What people or programs see of one command."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        # without a terminal nobody reads columns: let no cell break over lines
        width = None if sys.stdout is not None and sys.stdout.isatty() else _PIPE_WIDTH
        self.out = _Rich(highlight=False, width=width)
        self.err = _Rich(stderr=True, highlight=False)
        self._live: _Bars | None = None

    @contextmanager
    def observing(self) -> Iterator[Observer]:
        """An observer that shows progress while the block runs."""
        if self.quiet:
            yield ignore
        elif self.as_json:
            yield throttled(self._json_line, every=1.0)
        elif self.err.is_terminal:
            self._live = _Bars(self.err)
            try:
                yield throttled(self._live.observe, every=0.1)
            finally:
                self._live.stop()
                self._live = None
        else:
            yield throttled(_Lines(self.note).observe, every=5.0)

    def emit(self, values: dict[str, Any]) -> None:
        """Print the result object of `--json`."""
        self.write(json.dumps(values) + "\n")

    def write(self, text: str) -> None:
        """Print text to stdout at once; a terminal gets no control codes from a model."""
        if sys.stdout is None:
            return
        sys.stdout.write(_harmless(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    def note(self, message: str) -> None:
        """Say something to people, on stderr."""
        if self.quiet:
            return
        if self.as_json:
            self._json_line(Noted(message=message))
        else:
            self.err.print(Text(_harmless(message)), soft_wrap=not self.err.is_terminal)

    def failure(self, error: GrokctlError, *, has_result: bool = False) -> None:
        """Say what went wrong, and what to do about it.

        Args:
            error: What was raised.
            has_result: Whether the object of `--json` was printed already.
        """
        if self.as_json and not has_result:
            values = {"ok": False, "error": str(error), "hint": error.hint}
            with suppress(OSError):  # stdout may be what failed
                self.emit({**values, "exit_code": error.exit_code})
        for name, style, text in (("error", "bold red", str(error)), ("hint", "bold", error.hint)):
            if text:
                line = Text.assemble((f"{name}: ", style), _harmless(text).replace("\n", " "))
                self.err.print(line, soft_wrap=True)

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        right: Sequence[str] = (),
    ) -> None:
        """Print a table to stdout.

        Args:
            title: Above it.
            columns: Headings.
            rows: Cells.
            right: Headings of the columns to align right.
        """
        if self.quiet:
            return
        table = Table(
            title=escape(title),
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            show_edge=False,
        )
        for name in columns:
            table.add_column(name, justify="right" if name in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        self._print(Padding(table, (0, 0, 1, 0)))

    def facts(self, title: str, facts: Sequence[tuple[str, str]]) -> None:
        """Print names and values to stdout."""
        if self.quiet:
            return
        grid = Table.grid(Column(style="dim"), Column(overflow="fold"), padding=(0, 2))
        for name, value in facts:
            grid.add_row(escape(name), escape(value))
        self._print(Group(Text(title, style="bold"), Padding(grid, (0, 0, 1, 1))))

    def _print(self, renderable: RenderableType) -> None:
        """Print to stdout; without a terminal, without blanks at the ends of lines."""
        if self.out.is_terminal:
            self.out.print(renderable)
            return
        with self.out.capture() as captured:
            self.out.print(renderable)
        self.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))

    def ask(self, prompt: str) -> str | None:
        """Read a line; None at the end of the input."""
        try:
            return input(prompt)
        except (EOFError, ValueError):  # ValueError: stdin was closed
            return None

    def _json_line(self, event: Event) -> None:
        values = {"event": type(event).__name__.lower(), **asdict(event)}
        if sys.stderr is not None:
            with suppress(OSError):  # nobody has to listen
                sys.stderr.write(json.dumps(values) + "\n")
                sys.stderr.flush()


class _Pace:
    """How far a stage is, how fast, and how long it will still take."""

    def __init__(self, started: Started) -> None:
        self.total = started.total
        self.unit = started.unit
        self.before = started.done
        self.done = started.done
        self.began = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def __str__(self) -> str:
        if self.unit is Unit.NOTHING:
            return format_seconds(self.elapsed)
        parts = [format_count(self.done, self.unit)]
        if self.total and self.done < self.total:
            done = format_bytes(self.done) if self.unit is Unit.BYTES else f"{self.done:,}"
            parts = [
                f"{done} of {format_count(self.total, self.unit)}",
                f"{100 * self.done / self.total:.0f}%",
            ]
        rate = (self.done - self.before) / self.elapsed if self.elapsed > 0 else 0
        if rate:
            parts.append(f"{format_count(rate, self.unit)}/s")
        if rate and 0 < self.done < self.total:
            parts.append(f"{format_seconds((self.total - self.done) / rate)} left")
        return " · ".join(parts)


class _PaceColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["pace"])


class _Bars:
    """Live bars for a terminal."""

    def __init__(self, console: RichConsole) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._stages: dict[Stage, tuple[Any, _Pace]] = {}

    def observe(self, event: Event) -> None:
        match event:
            case Started(stage=stage):
                self._start(stage, event)
            case Advanced(stage=stage) if stage in self._stages:
                self._advance(stage, event)
            case Finished(stage=stage) if stage in self._stages:
                self._finish(stage)
            case Noted(message=message):
                self._console.print(Text(message, style="dim"))
            case _:
                pass

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _start(self, stage: Stage, event: Started) -> None:
        if self._progress is None:
            self._progress = Progress(
                SpinnerColumn(finished_text="[green]✓[/green]"),
                TextColumn("{task.description}", table_column=Column(width=16)),
                BarColumn(bar_width=16),
                _PaceColumn(table_column=Column(no_wrap=True)),
                TextColumn(
                    "[dim]{task.fields[detail]}[/dim]",
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
                ),
                console=self._console,
                expand=True,
            )
            self._progress.start()
        pace = _Pace(event)
        task = self._progress.add_task(
            _TITLES[stage],
            total=event.total or None,
            completed=event.done,
            pace=str(pace),
            detail="",
        )
        self._stages[stage] = (task, pace)

    def _advance(self, stage: Stage, event: Advanced) -> None:
        assert self._progress is not None
        task, pace = self._stages[stage]
        pace.done = event.done
        self._progress.update(
            task, completed=event.done, pace=str(pace), detail=escape(event.detail)
        )

    def _finish(self, stage: Stage) -> None:
        assert self._progress is not None
        task, pace = self._stages.pop(stage)
        if stage in _FLEETING:
            self._progress.remove_task(task)
        else:
            pace.done = pace.total or pace.done
            self._progress.update(
                task,
                total=max(pace.total, 1),
                completed=max(pace.total, 1),
                pace=f"{pace} in {format_seconds(pace.elapsed)}",
                detail="",
            )
        if not self._stages:
            self.stop()


class _Lines:
    """Plain lines, where there is no terminal."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._stages: dict[Stage, _Pace] = {}

    def observe(self, event: Event) -> None:
        match event:
            case Started(stage=stage):
                self._stages[stage] = _Pace(event)
            case Advanced(stage=stage, done=done, detail=detail) if stage in self._stages:
                pace = self._stages[stage]
                pace.done = done
                if pace.elapsed >= 1:
                    self._say(f"{_TITLES[stage]}: {pace}" + (f" · {detail}" if detail else ""))
            case Finished(stage=stage) if stage in self._stages:
                pace = self._stages.pop(stage)
                if stage not in _FLEETING or pace.elapsed >= 1:
                    pace.done = pace.total or pace.done
                    self._say(f"{_TITLES[stage]}: {pace} in {format_seconds(pace.elapsed)}")
            case Noted(message=message):
                self._say(message)
            case _:
                pass
