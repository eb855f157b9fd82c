"""Show the progress of stages on stderr: how far, how fast, and the time left."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from grokctl.events import Advanced, Answered, Event, Finished, Noted, Stage, Started, Unit
from grokctl.text import format_bytes, format_clock, format_count, format_seconds, harmless

_TITLES: Final = {
    Stage.LOOK: "examine machine",
    Stage.METADATA: "get the torrent",
    Stage.FETCH: "fetch",
    Stage.SEED: "seed",
    Stage.VERIFY: "verify",
    Stage.STRUCTURE: "check structure",
    Stage.VALUES: "read values",
    Stage.RESHARD: "reshard",
    Stage.EXPORT: "export",
    Stage.LOAD: "load",
    Stage.COMPILE: "compile",
    Stage.PREFILL: "prefill",
    Stage.DECODE: "decode",
    Stage.STREAM: "read experts",
    Stage.SCORE: "score",
    Stage.BENCH: "bench",
    Stage.MINIATURE: "write miniature",
    Stage.SERVE: "serve",
}
_FLEETING: Final = frozenset(
    {Stage.LOOK, Stage.METADATA, Stage.STRUCTURE, Stage.PREFILL, Stage.COMPILE, Stage.STREAM}
)
"""Stages whose bar disappears at their end."""
_UNSAID: Final = _FLEETING | {Stage.LOAD}
"""Stages whose end takes no line: the closing line of a run has their times."""
_WINDOW_S: Final = 20.0
"""Seconds over which a rate is measured."""
_BAR_WIDTH: Final = 16
_TITLE_WIDTH: Final = max(map(len, _TITLES.values()))
_WIDE: Final = 100
"""Columns from which all titles have the same width, and bars grow."""
_ECHO_ROOM: Final = 3
"""Columns left free: a terminal echoes Ctrl-C, and that must not begin a new line."""
_GROWTH: Final = 1.5
_LONGEST_GAP_S: Final = 600.0
"""Seconds between two lines of a stage, at most."""
_CELLS: Final = "·░▒▓█"
"""From nothing to all of a part."""
_ASCII_CELLS: Final = ".-=%#"


class _StageProgress:
    """How far a stage is, how fast, and the time left."""

    def __init__(self, started: Started) -> None:
        self.total = started.total
        self.unit = started.unit
        # prompts differ in length, and the detail of seeding has rates with names
        self._has_rate = started.unit is not Unit.PROMPTS and started.stage is not Stage.SEED
        self._is_open = started.stage in {Stage.SEED, Stage.SERVE}
        self.before = started.done
        self.done = started.done
        self.began = time.monotonic()
        self._window = deque([(self.began, started.done)])

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def advance(self, done: int) -> None:
        """Record how much is done."""
        self.done = done
        self._window.append((time.monotonic(), done))
        while self._window[-1][0] - self._window[1][0] > _WINDOW_S:
            self._window.popleft()

    @property
    def rate(self) -> float:
        """Units a second: recently while the stage runs, on average at its end."""
        then, before = self._window[0]
        if self.total and self.done >= self.total:
            then, before = self.began, self.before
        elapsed = time.monotonic() - then
        return (self.done - before) / elapsed if elapsed > 0 else 0.0

    @property
    def summary(self) -> str:
        """What was done, the time it took, and what was done before."""
        took = format_seconds(self.elapsed)
        if self.unit is Unit.NOTHING:
            return took
        if not self.before and self.done < self.total:
            return f"{format_count(self.done, self.unit)} in {took}"
        if not self.before:
            return f"{self} in {took}"
        before = f"{format_count(self.before, self.unit)} before"
        if self.done <= self.before:
            return f"nothing in {took}, {before}"
        return f"{format_count(self.done - self.before, self.unit)} in {took}, {before}"

    def finish(self) -> None:
        """All of the work is done; seeding ends whenever the user wants."""
        if not self._is_open:
            self.done = self.total or self.done

    def __str__(self) -> str:
        if self.unit is Unit.NOTHING:
            return format_clock(self.elapsed)
        parts = [format_count(self.done, self.unit)]
        if self.total and self.done < self.total:
            done = format_bytes(self.done) if self.unit is Unit.BYTES else f"{self.done:,}"
            parts = [
                f"{done} of {format_count(self.total, self.unit)}",
                f"{100 * self.done / self.total:.0f}%",
            ]
        rate = self.rate
        if rate and self._has_rate:
            parts.append(f"{format_count(rate, self.unit)}/s")
        if rate and 0 < self.done < self.total:
            parts.append(f"{format_seconds((self.total - self.done) / rate)} left")
        return " · ".join(parts)


class _ProgressColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(str(task.fields["progress"]))


class _Narrowed:
    """Something that leaves the last columns free."""

    def __init__(self, block: RenderableType) -> None:
        self._block = block

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width - _ECHO_ROOM)
        yield from console.render(self._block, options.update_width(width))


class _Panel(Progress):
    """Bars, with details below them."""

    below: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        blocks = [*super().get_renderables(), *([] if self.below is None else [self.below])]
        yield from map(_Narrowed, blocks)


def _line(event: Answered) -> str:
    """An answered request, without its texts."""
    tokens = f" · {event.prompt_tokens:,} + {event.tokens:,} tokens" if event.prompt_tokens else ""
    seconds = format_seconds(event.seconds)
    return f"{event.route} · {event.status}{tokens} · {seconds} · {event.id}"


class Bars:
    """Live bars on a terminal."""

    def __init__(self, console: Console, note: Callable[[str], None]) -> None:
        self._console = console
        self._note = note
        self._progress: _Panel | None = None
        self._stages: dict[Stage, tuple[Any, _StageProgress]] = {}

    def observe(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Started(stage=stage):
                self._start(stage, event)
            case Advanced(stage=stage) if stage in self._stages:
                self._advance(stage, event)
            case Finished(stage=stage) if stage in self._stages:
                self._finish(stage)
            case Noted(message=message):
                self._note(message)
            case Answered():
                self._note(_line(event))
            case _:
                pass

    def stop(self) -> None:
        """Leave the bars as they are; the next stage begins new ones."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    @contextmanager
    def away(self) -> Iterator[None]:
        """Hide the bars while something else is printed."""
        progress = self._progress
        if progress is None:
            yield
            return
        progress.live.transient = True
        progress.stop()
        try:
            yield
        finally:
            progress.live.transient = False
            progress.start()

    def _start(self, stage: Stage, event: Started) -> None:
        if self._progress is None:
            self._progress = _Panel(
                SpinnerColumn(finished_text="[green]✓[/green]"),
                TextColumn("{task.description}", table_column=self._title_column()),
                BarColumn(bar_width=max(_BAR_WIDTH, (self._console.width - _WIDE) // 2)),
                _ProgressColumn(table_column=Column(no_wrap=True)),
                TextColumn(
                    "[dim]{task.fields[detail]}[/dim]",
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
                ),
                console=self._console,
                expand=True,
                redirect_stdout=False,  # results go to stdout, bars to stderr
            )
            self._progress.start()
        progress = _StageProgress(event)
        is_clock = progress.unit is Unit.NOTHING  # runs by itself, without events
        task = self._progress.add_task(
            _TITLES[stage],
            total=event.total or None,
            completed=event.done,
            progress=progress if is_clock else str(progress),
            detail="",
        )
        self._stages[stage] = (task, progress)

    def _title_column(self) -> Column:
        """As wide for every stage, if that leaves room for the bar."""
        is_wide = self._console.width >= _WIDE
        return Column(width=_TITLE_WIDTH) if is_wide else Column(no_wrap=True)

    def _advance(self, stage: Stage, event: Advanced) -> None:
        assert self._progress is not None
        task, progress = self._stages[stage]
        progress.advance(event.done)
        detail = "" if event.facts else escape(event.detail)
        self._progress.update(task, completed=event.done, detail=detail)
        if progress.unit is not Unit.NOTHING:
            self._progress.update(task, progress=str(progress))
        self._progress.below = self._below(event)

    def _below(self, event: Advanced) -> RenderableType | None:
        """The map and the facts of a stage that reports more than fits into a line."""
        if not event.facts:
            return None
        grid = Table.grid(
            Column(style="dim", no_wrap=True),
            Column(no_wrap=True, overflow="ellipsis", ratio=1),
            padding=(0, 2),
            expand=True,
        )
        if event.parts:
            grid.add_row("pieces", self._map(event.parts))
        for name, value in event.facts:
            grid.add_row(escape(harmless(name)), escape(harmless(value)))
        return Padding(grid, (0, 0, 0, 2))

    def _map(self, parts: Sequence[float]) -> Text:
        cells = _CELLS if self._console.encoding.startswith("utf") else _ASCII_CELLS
        return Text("".join(cells[int(part * (len(cells) - 1))] for part in parts), style="green")

    def _finish(self, stage: Stage) -> None:
        assert self._progress is not None
        task, progress = self._stages.pop(stage)
        self._progress.below = None
        if stage in _FLEETING:
            self._progress.remove_task(task)
        else:
            progress.finish()
            self._progress.update(
                task,
                total=max(progress.total, 1),
                completed=max(progress.total, 1),
                progress=progress.summary,
                detail="",
            )
        if not self._stages:
            self.stop()


class Lines:
    """Plain lines, without a terminal: the longer a stage takes, the fewer."""

    def __init__(self, note: Callable[[str], None], *, every: float = 5.0) -> None:
        self._note = note
        self._every = every
        self._stages: dict[Stage, _StageProgress] = {}
        self._layer: str | None = ""
        """Of the first token, if that reads experts: the layer of the latest line."""
        self._due: dict[Stage, tuple[float, float]] = {}
        """Seconds since the stage began when its next line is due, and the gap after it."""

    def observe(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Started(stage=stage):
                self._stages[stage] = _StageProgress(event)
                self._due[stage] = (self._every, self._every)
            case Advanced(stage=stage, done=done, detail=detail) if stage in self._stages:
                progress = self._stages[stage]
                progress.advance(done)
                if self._is_layer(stage, detail) or self._is_due(stage, progress.elapsed):
                    self._note(f"{_TITLES[stage]}: {progress}" + (f" · {detail}" if detail else ""))
            case Finished(stage=stage) if stage in self._stages:
                progress = self._stages.pop(stage)
                if stage is Stage.STREAM:
                    self._layer = None
                has_line = self._due.pop(stage)[0] > self._every
                if has_line or stage not in _UNSAID:
                    progress.finish()
                    self._note(f"{_TITLES[stage]}: {progress.summary}")
            case Noted(message=message):
                self._note(message)
            case Answered():
                self._note(_line(event))
            case _:
                pass

    def _is_layer(self, stage: Stage, detail: str) -> bool:
        """Whether a layer of the first token has read its experts: each is worth a line."""
        if stage is not Stage.STREAM or self._layer is None or detail == self._layer:
            return False
        self._layer = detail
        return True

    def _is_due(self, stage: Stage, elapsed: float) -> bool:
        """Whether a line of a stage is due; the next is, after a gap that grows."""
        due, gap = self._due[stage]
        if elapsed < due:
            return False
        gap = min(gap * _GROWTH, _LONGEST_GAP_S)
        self._due[stage] = (elapsed + gap, gap)
        return True
