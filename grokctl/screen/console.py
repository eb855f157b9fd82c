"""Print results and events for people, or as JSON for programs.

Results go to stdout; progress, notes, errors and hints go to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from typing import Any, Final

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from grokctl.checks import Check, Status
from grokctl.errors import GrokctlError, UsageError
from grokctl.events import Event, Noted, Observer, ignore, throttled
from grokctl.screen.known_places import KnownPlaces
from grokctl.screen.progress import Bars, Lines
from grokctl.screen.tables import Facts, StackedBar, StatusCell, one_line, rows_of, table_of
from grokctl.screen.terminal import is_terminal, moves_cursor, to_stdout
from grokctl.text import harmless, to_copy, to_json

_PIPE_WIDTH: Final = 200
_ENDLESS: Final = 10_000
_BARS: Final = " ▁▂▃▄▅▆▇█"
_PLAIN_BARS: Final = " .:-=+*#@"
_SYMBOLS: Final = {Status.OK: "✓", Status.WARN: "!", Status.FAIL: "✗", Status.SKIP: "-"}
_ASCII_SYMBOLS: Final = {Status.OK: "+", Status.WARN: "!", Status.FAIL: "x", Status.SKIP: "-"}
_STYLES: Final = {
    Status.OK: "bold color(28)",
    Status.WARN: "bold color(130)",
    Status.FAIL: "bold color(160)",
    Status.SKIP: "default",
}
"""Colours with a contrast of at least 3.9 on both a light and a dark background."""
_LAYERS: Final = "█▓▒░"
_ASCII_LAYERS: Final = "#=+~"
_LAYER_STYLES: Final = ("color(33)", "color(165)", "color(130)", "color(28)")
_NAME_WIDTH: Final = 22
"""Widest column for the names of checks; a longer name takes a second line."""
_STACK_WIDTH: Final = range(8, 41)
"""Narrowest and widest bar, in cells."""


class _Rich(RichConsole):
    """A console that ignores a closed pipe."""

    def on_broken_pipe(self) -> None:
        """Continue; rich would exit."""


class Console:
    """The output of one command."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        # a pipe has no width: wide enough that no cell breaks over lines
        width = None if is_terminal(sys.stdout) else _PIPE_WIDTH
        self.out = _Rich(highlight=False, width=width)
        self.err = _Rich(stderr=True, highlight=False)
        self._live: Bars | None = None
        self._prefix = ""
        self.places = KnownPlaces()
        """Folders that notes, errors and hints name as the user knows them."""

    def step_back(self, name: str, *, verbose: bool) -> None:
        """Print neither results nor notes, because another process prints them.

        Args:
            name: Of this process, for its errors and notes.
            verbose: Print notes all the same.
        """
        self.as_json = False
        self.quiet = not verbose
        self._prefix = f"{name}: "

    @contextmanager
    def observing(self) -> Iterator[Observer]:
        """An observer that prints progress while the block runs."""
        if self.quiet:
            yield ignore
        elif self.as_json:
            yield throttled(self._json_line, every=1.0)
        elif moves_cursor(self.err.file):
            self._live = Bars(self.err, self.note)
            try:
                yield throttled(self._live.observe, every=0.1)
            finally:
                self._live.stop()
                self._live = None
        else:
            yield Lines(self.note).observe

    def emit(self, values: dict[str, Any]) -> None:
        """Print the result object of `--json`."""
        self.write(to_json(values) + "\n")

    def write(self, text: str) -> None:
        """Print text to stdout at once, on a terminal without control codes."""
        if sys.stdout is None:
            return
        is_shown = is_terminal(sys.stdout)
        live = self._live if is_shown else None
        with live.away() if live is not None else nullcontext(), to_stdout():
            sys.stdout.write(harmless(text) if is_shown else text)
            sys.stdout.flush()

    def note(self, message: str, *, always: bool = False) -> None:
        """Print a line on stderr, also if quiet where it must be read."""
        if self.quiet and not always:
            return
        if self.as_json:
            self._json_line(Noted(message=message))
        else:
            text = Text(to_copy(self._prefix + self.places.named(message)))
            self.err.print(text, soft_wrap=True)  # it may end with a command to copy

    def note_fitting(self, forms: Sequence[str]) -> None:
        """Print the first form that fits into a line; without a terminal, every form does."""
        room = self.err.width if is_terminal(self.err.file) else _ENDLESS
        self.note(next((form for form in forms if len(form) <= room), forms[-1]))

    def failure(self, error: GrokctlError, *, has_result: bool = False) -> None:
        """Print an error and its hint.

        Args:
            error: Ended the command.
            has_result: Whether the object of `--json` was printed already.
        """
        message = self.places.named(str(error))
        hint = error.hint and self.places.named(error.hint, is_command=True)
        if self.as_json and not has_result:
            values = {"ok": False, "error": message, "hint": hint}
            with suppress(OSError):  # stdout itself may have failed
                self.emit({**values, "exit_code": error.exit_code})
        for name, style, text in (("error", "bold red", message), ("hint", "bold", hint)):
            if text:
                shown = to_copy(text) if name == "hint" else harmless(text)
                line = Text.assemble((f"{name}: ", style), shown.replace("\n", " "))
                self.err.print(line, soft_wrap=True)

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str | StatusCell]],
        *,
        right: Sequence[str] = (),
        optional: Sequence[str] = (),
    ) -> None:
        """Print a table to stdout.

        Args:
            title: Above the table.
            columns: Headings.
            rows: Cells.
            right: Headings of the columns to align right.
            optional: Headings of the columns to omit on a narrow terminal, in this order.
        """
        shown, is_split = list(columns), False

        def render() -> Table:
            cells = [[self._cell(cell, is_split=is_split) for cell in row] for row in rows]
            return table_of(columns, cells, shown=shown, right=right)

        if self._width_of(render()) > self.out.width:
            is_split = True
        for name in optional:
            if self._width_of(render()) <= self.out.width:
                break
            shown.remove(name)
        self._print(Text(one_line(title), style="bold"))
        self._print(Padding(render(), (0, 0, 1, 0), expand=False))

    def _cell(self, cell: str | StatusCell, *, is_split: bool) -> Text:
        if isinstance(cell, str):
            return Text(harmless(cell))
        between = "\n" if is_split else " "
        text = Text(harmless(cell.first) + between if cell.first else "")
        words = f"{self._symbol(cell.status)} {harmless(cell.text)}"
        return text.append(words, _STYLES[cell.status])

    def _width_of(self, table: Table) -> int:
        """The width of a table on an endless terminal."""
        columns = self.out.options.update(max_width=_ENDLESS)
        return self.out.measure(table, options=columns).maximum

    @property
    def bars(self) -> str:
        """Nine characters from empty to full, in stdout's encoding."""
        try:
            _BARS.encode(self.out.encoding)
        except (LookupError, UnicodeEncodeError):
            return _PLAIN_BARS
        return _BARS

    @property
    def _is_plain(self) -> bool:
        """Whether stdout takes ASCII only."""
        return self.bars != _BARS

    def _symbol(self, status: Status) -> str:
        return (_ASCII_SYMBOLS if self._is_plain else _SYMBOLS)[status]

    def checks(
        self,
        groups: Sequence[tuple[str, Sequence[Check]]],
        *,
        words: Mapping[Status, str] | None = None,
    ) -> None:
        """Print groups of checks to stdout: symbol, word, name, detail, and a fix to copy.

        Args:
            groups: Titles and checks; groups without checks are omitted.
            words: For a status, instead of its own name.
        """
        filled = [(title, checks) for title, checks in groups if checks]
        names = [check.name for _, checks in filled for check in checks]
        width = min(max(map(len, names), default=0), _NAME_WIDTH)
        for title, checks in filled:
            self._print(Text(harmless(title), style="bold"))
            for check in checks:
                word = (words or {}).get(check.status, check.status)
                self._check(check, word, width)
            self._print(Text())

    def _check(self, check: Check, word: str, width: int) -> None:
        """A check; its fix has a line of its own, which is never wrapped."""
        style = _STYLES[check.status]
        is_dim = check.status in {Status.OK, Status.SKIP}
        grid = Table.grid(
            Column(width=6, no_wrap=True),
            Column(width=width, overflow="fold"),
            Column(overflow="fold", style="dim" if is_dim else ""),
            padding=(0, 2, 0, 0),
        )
        sign = Text(f"{self._symbol(check.status)} {word}", style=style)
        grid.add_row(sign, Text(one_line(check.name)), Text(one_line(check.detail)))
        self._print(Padding(grid, (0, 0, 0, 2), expand=False))
        if check.fix:
            arrow = "->" if self._is_plain else "→"
            self._print(Text(f"          {arrow} {one_line(check.fix)}"), is_whole=True)

    def stacked(
        self, title: str, names: Sequence[str], rest: str, stacks: Sequence[StackedBar]
    ) -> None:
        """Print stacked bars to stdout, with a legend below.

        Args:
            title: Above the bars.
            names: Of the parts, in the order of each bar's.
            rest: Name of the space between the parts and the limit.
            stacks: The bars; if the parts exceed the limit, a line marks it.
        """
        label, text = (max(len(getattr(s, name)) for s in stacks) for name in ("label", "text"))
        available = self.out.width - label - text - 7
        width = min(max(available, _STACK_WIDTH[0]), _STACK_WIDTH[-1])
        grid = Table.grid(
            Column(no_wrap=True),
            Column(no_wrap=True),
            Column(overflow="fold"),
            padding=(0, 2, 0, 0),
        )
        for stack in stacks:
            bar = self._stack(stack, width)
            grid.add_row(Text(one_line(stack.label)), bar, Text(one_line(stack.text)))
        legend = Text()
        for cell, style, name in zip(self._layers, _LAYER_STYLES, names, strict=False):
            legend.append(cell, style).append(f" {name}   ")
        legend.append(f"{self._empty} {rest}")
        if any(sum(stack.parts) > stack.limit for stack in stacks):
            legend.append(f"   {self._end} limit")
        self._print(Text(one_line(title), style="bold"))
        self._print(Padding(Group(grid, legend), (0, 0, 1, 2), expand=False))

    def _stack(self, stack: StackedBar, width: int) -> Text:
        """The cells of a bar; every part that is not 0 has at least one."""
        scale = max(stack.limit, sum(stack.parts)) / width
        bar, done, left = Text(), 0.0, sum(part > 0 for part in stack.parts)
        for part, cell, style in zip(stack.parts, self._layers, _LAYER_STYLES, strict=False):
            if part > 0:
                done, left = done + part, left - 1
                cells = round(done / scale) - len(bar)
                bar.append(cell * min(max(cells, 1), width - left - len(bar)), style)
        bar.append(self._empty * (width - len(bar)))
        end = round(stack.limit / scale)
        return bar if end >= width else bar[:end].append(self._end, "bold").append(bar[end + 1 :])

    @property
    def _layers(self) -> str:
        return _ASCII_LAYERS if self._is_plain else _LAYERS

    @property
    def _empty(self) -> str:
        return "." if self._is_plain else "·"

    @property
    def _end(self) -> str:
        return "|" if self._is_plain else "┃"

    def gauge(self, share: float, width: int = 16) -> str:
        """A bar that is full at a share of 1."""
        done = round(min(max(share, 0.0), 1.0) * width)
        full, rest = ("#", ".") if self._is_plain else ("█", "░")
        return full * done + rest * (width - done)

    def facts(self, title: str, facts: Sequence[tuple[str, str]]) -> None:
        """Print names and values to stdout."""
        self._print(Text(one_line(title), style="bold"))
        for row, is_whole in rows_of(facts, indent=1):
            self._print(row, is_whole=is_whole)
        self._print(Text())

    def asides(self, facts: Sequence[tuple[str, str]]) -> None:
        """Print names and values on stderr: they are not the result."""
        if self.quiet:
            return
        if self.as_json or not is_terminal(self.err.file):
            for name, value in facts:
                self.note(f"{name}: {value}")
        else:
            for row, is_whole in rows_of(facts):
                self.err.print(row, soft_wrap=is_whole)

    def _print(self, renderable: RenderableType, *, is_whole: bool = False) -> None:
        """Print to stdout; to a pipe, without trailing blanks.

        `is_whole` leaves wrapping to the terminal, so that the line is copied as one.
        """
        if is_terminal(self.out.file):
            with to_stdout():
                self.out.print(renderable, soft_wrap=is_whole)
            return
        with self.out.capture() as captured:
            self.out.print(renderable, soft_wrap=is_whole)
        self.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))

    def ask(self, prompt: str) -> str | None:
        """Read a line; None at the end of the input.

        Raises:
            UsageError: It is not UTF-8.
        """
        is_shown = is_terminal(sys.stdout)
        if not is_shown and sys.stderr is not None:  # the prompt is not a result
            sys.stderr.write(prompt)
            sys.stderr.flush()
        try:
            line = input(prompt if is_shown else "")
            line.encode()
        except UnicodeError as error:
            raise UsageError("line: not UTF-8 text") from error
        except (EOFError, ValueError):  # ValueError: stdin was closed
            return None
        return line

    def _json_line(self, event: Event) -> None:
        values = {"event": type(event).__name__.lower(), **asdict(event)}
        if isinstance(event, Noted):
            values["message"] = self.places.named(event.message)
        if sys.stderr is not None:
            with suppress(OSError):  # nobody has to read it
                sys.stderr.write(to_json(values) + "\n")
                sys.stderr.flush()


def show(
    console: Console, values: dict[str, Any], title: str, facts: Facts, *, brief: str = ""
) -> None:
    """Print a result: as the JSON object that programs rely on, or for people.

    Args:
        console: Prints it.
        values: The object.
        title: Above the facts.
        facts: Names and values.
        brief: All that `--quiet` leaves of it.
    """
    if console.as_json:
        console.emit(values)
    elif console.quiet and brief:
        console.write(f"{brief}\n")
    else:
        console.facts(title, facts)
