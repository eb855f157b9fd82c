"""How far long steps are, how fast they go and how long they will still take: on stderr."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from grokctl.events import Advanced, Event, Finished, Noted, Stage, Started, Unit
from grokctl.text import format_bytes, format_clock, format_count, format_seconds, harmless

_TITLES: Final = {
    Stage.LOOK: "look at machine",
    Stage.METADATA: "find the torrent",
    Stage.FETCH: "fetch",
    Stage.SEED: "seed",
    Stage.VERIFY: "verify",
    Stage.STRUCTURE: "look at files",
    Stage.VALUES: "look at values",
    Stage.RESHARD: "reshard",
    Stage.LOAD: "load",
    Stage.COMPILE: "compile",
    Stage.PREFILL: "read prompt",
    Stage.DECODE: "write",
    Stage.SCORE: "score",
    Stage.BENCH: "bench",
    Stage.MINIATURE: "write miniature",
}
_FLEETING: Final = frozenset(
    {Stage.LOOK, Stage.METADATA, Stage.STRUCTURE, Stage.PREFILL, Stage.COMPILE}
)
"""Stages whose bar goes when they are over."""
_LATELY_S: Final = 20.0
"""Seconds that a rate looks back on."""
_CELLS: Final = "·░▒▓█"
"""Nothing to all of it."""
_ASCII_CELLS: Final = ".-=%#"


class _Pace:
    """How far a stage is, how fast, and how long it will still take."""

    def __init__(self, started: Started) -> None:
        self.total = started.total
        self.unit = started.unit
        self.before = started.done
        self.done = started.done
        self.began = time.monotonic()
        self._lately = deque([(self.began, started.done)])

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def advance(self, done: int) -> None:
        """Take over how much is done."""
        self.done = done
        self._lately.append((time.monotonic(), done))
        while self._lately[-1][0] - self._lately[1][0] > _LATELY_S:
            self._lately.popleft()

    @property
    def rate(self) -> float:
        """A second: of late while it goes on, over all when it is over."""
        then, before = self._lately[0]
        if self.total and self.done >= self.total:
            then, before = self.began, self.before
        elapsed = time.monotonic() - then
        return (self.done - before) / elapsed if elapsed > 0 else 0.0

    @property
    def at_the_end(self) -> str:
        """How much it was, and how long it took."""
        took = format_seconds(self.elapsed)
        return took if self.unit is Unit.NOTHING else f"{self} in {took}"

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
        if rate and self.unit is not Unit.PROMPTS:  # of different lengths
            parts.append(f"{format_count(rate, self.unit)}/s")
        if rate and 0 < self.done < self.total:
            parts.append(f"{format_seconds((self.total - self.done) / rate)} left")
        return " · ".join(parts)


class _PaceColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(str(task.fields["pace"]))


class _Panel(Progress):
    """Bars, and what is to be said below them."""

    below: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below is not None:
            yield self.below


class Bars:
    """Live bars for a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: _Panel | None = None
        self._stages: dict[Stage, tuple[Any, _Pace]] = {}

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
                self._console.print(Text(message, style="dim"))
            case _:
                pass

    def stop(self) -> None:
        """Leave them as they are, and begin others with the next stage."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    @contextmanager
    def away(self) -> Iterator[None]:
        """Take the bars off the screen while something else is written there."""
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
                TextColumn("{task.description}", table_column=Column(width=16)),
                BarColumn(bar_width=16),
                _PaceColumn(table_column=Column(no_wrap=True)),
                TextColumn(
                    "[dim]{task.fields[detail]}[/dim]",
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
                ),
                console=self._console,
                expand=True,
                redirect_stdout=False,  # results are for stdout, whatever is shown on stderr
            )
            self._progress.start()
        pace = _Pace(event)
        task = self._progress.add_task(
            _TITLES[stage],
            total=event.total or None,
            completed=event.done,
            pace=pace if pace.unit is Unit.NOTHING else str(pace),  # time passes by itself
            detail="",
        )
        self._stages[stage] = (task, pace)

    def _advance(self, stage: Stage, event: Advanced) -> None:
        assert self._progress is not None
        task, pace = self._stages[stage]
        pace.advance(event.done)
        detail = "" if event.facts else escape(event.detail)
        self._progress.update(task, completed=event.done, detail=detail)
        if pace.unit is not Unit.NOTHING:
            self._progress.update(task, pace=str(pace))
        self._progress.below = self._below(event)

    def _below(self, event: Advanced) -> RenderableType | None:
        """The map and the facts of a stage that has more to say than a line holds."""
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
        task, pace = self._stages.pop(stage)
        self._progress.below = None
        if stage in _FLEETING:
            self._progress.remove_task(task)
        else:
            pace.done = pace.total or pace.done
            self._progress.update(
                task,
                total=max(pace.total, 1),
                completed=max(pace.total, 1),
                pace=pace.at_the_end,
                detail="",
            )
        if not self._stages:
            self.stop()


class Lines:
    """Plain lines, where there is no terminal."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._stages: dict[Stage, _Pace] = {}

    def observe(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Started(stage=stage):
                self._stages[stage] = _Pace(event)
            case Advanced(stage=stage, done=done, detail=detail) if stage in self._stages:
                pace = self._stages[stage]
                pace.advance(done)
                if pace.elapsed >= 1:
                    self._say(f"{_TITLES[stage]}: {pace}" + (f" · {detail}" if detail else ""))
            case Finished(stage=stage) if stage in self._stages:
                pace = self._stages.pop(stage)
                if stage not in _FLEETING or pace.elapsed >= 1:
                    pace.done = pace.total or pace.done
                    self._say(f"{_TITLES[stage]}: {pace.at_the_end}")
            case Noted(message=message):
                self._say(message)
            case _:
                pass
