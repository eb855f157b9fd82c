"""The loop for a person at the keyboard: texts are completed, lines with a slash are commands."""

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

from grokctl import interrupts
from grokctl.cluster.process_group import Cluster
from grokctl.errors import UsageError
from grokctl.events import Event, Observer, ignore
from grokctl.inference.engine import Engine
from grokctl.inference.generation import FinishReason, Generation, Request
from grokctl.parse import read_token_ids
from grokctl.paths import Home
from grokctl.screen import run as screen
from grokctl.screen.console import Console
from grokctl.session import settings
from grokctl.session.complete import write
from grokctl.session.history import History, edit_lines
from grokctl.session.job import Wanted, open_job

_NAMES: Final = {name.replace("_", "-"): name for name in settings.SETTINGS}
"""What people type, and what the setting is called."""
_QUIT: Final = "/quit"
_COMMANDS: Final = {
    "/more": "go on from the end of the last text",
    "/retry": "the last prompt again, with another seed",
    "/set": "all settings; /set temperature 0.5 changes one",
    "/stats": "how fast the last text was, and what the memory allows",
    "/help": "this; a text that begins with / is typed with two",
    _QUIT: "leave, as Ctrl-D does",
}


def converse(
    console: Console,
    home: Home,
    wanted: Wanted,
    request: Request,
    *,
    all_stats: bool,
    cluster: Cluster | None = None,
) -> None:
    """Load a checkpoint, and complete what a person types until they have enough.

    Args:
        console: Where they are.
        home: Where checkpoints are, and the history of what was typed.
        wanted: Which checkpoint, and how to run it.
        request: How to continue, to begin with; has no prompt.
        all_stats: Whether to say everything that was measured after every text.
        cluster: The processes that do it together, if there are several.

    Raises:
        KeyboardInterrupt: Ctrl-C twice, or SIGTERM.
    """
    observer = _Observer()
    with console.observing() as observer.to:
        engine = open_job(console, home, wanted, observer, cluster=cluster).start(observer)
    conversation = _Conversation(console, engine, observer, request, all_stats=all_stats)
    conversation.greet()
    kept, readline = History(home.root / "history"), _readline()
    if readline is not None:
        edit_lines(readline, kept, _completions)
    while (line := _ask(console, readline)) is not None and line.strip() != _QUIT:
        kept.add(line)
        try:
            conversation.obey(line)
        except UsageError as error:
            console.failure(error)
    if line is None:
        console.write("\n")


class _StoppedError(Exception):
    """Ctrl-C, noticed where the engine is between two steps."""


class _Observer:
    """Passes on to whoever shows the text of the moment, and ends a text that shall end."""

    def __init__(self) -> None:
        self.to: Observer = ignore
        self.asked = interrupts.Asked()

    def __call__(self, event: Event) -> None:
        if self.asked.to_end:
            raise _StoppedError
        self.to(event)


class _Conversation:
    def __init__(
        self,
        console: Console,
        engine: Engine,
        observer: _Observer,
        request: Request,
        *,
        all_stats: bool,
    ) -> None:
        self._console = console
        self._engine = engine
        self._observer = observer
        self._request = request
        """How to continue; its prompt is the last one, its seed the next one."""
        self._all_stats = all_stats
        self._echo: str | None = None
        self._last: Generation | None = None

    def greet(self) -> None:
        """Say what this is."""
        what = "a text" if self._engine.tokenizer else "a text as token ids, 1,2,3"
        self._console.note(f"Type the beginning of {what}. A base model completes, no chat.")
        self._console.note("Ctrl-C stops a text, Ctrl-D ends, /help says more.")

    def obey(self, line: str) -> None:
        """Complete a line, or do what it commands.

        Raises:
            UsageError: It is neither.
        """
        if not line.strip():
            return
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line.strip().partition(" ")
            self._command(name, rest.strip())
            return
        text = line[1:] if line.startswith("//") else line
        plan = self._engine.plan
        tokens = plan.encode(text) if plan.tokenizer else read_token_ids(text)
        self._complete(tuple(tokens), text if plan.tokenizer else None)

    def _command(self, name: str, rest: str) -> None:
        match name:
            case "/more":
                self._complete((*self._request.prompt, *self._finished().ids), None)
            case "/retry":
                self._retry()
            case "/set":
                self._set(rest)
            case "/stats":
                self._stats()
            case "/help":
                self._console.asides(list(_COMMANDS.items()))
            case _:
                raise UsageError(f"{name[:40]}: no such command", ", ".join(_COMMANDS))

    def _complete(self, prompt: tuple[int, ...], echo: str | None) -> None:
        request = self._request
        with (
            interrupts.deferred() as asked,
            self._console.observing() as self._observer.to,
        ):
            self._observer.asked = asked
            generation = self._engine.fulfil(replace(request, prompt=prompt))
            try:
                write(
                    self._console,
                    self._engine,
                    generation,
                    echo=echo,
                    stream=True,
                    asked=asked,
                )
            except _StoppedError:  # before its first token
                generation.finish_reason = FinishReason.INTERRUPTED
            finally:
                self._observer.asked = interrupts.Asked()
        seed = (request.sampling.seed + 1) % 2**64
        self._request = replace(
            request, prompt=prompt, sampling=replace(request.sampling, seed=seed)
        )
        self._last, self._echo = generation, echo
        if self._all_stats:
            self._stats()
        else:
            is_drawn = request.sampling.temperature > 0
            screen.closing(self._console, generation, has_loaded=False, is_drawn=is_drawn)

    def _retry(self) -> None:
        self._finished()
        if self._request.sampling.temperature == 0:
            self._console.note("the temperature is 0, so it is the same text again")
        else:
            self._console.note(f"with seed {self._request.sampling.seed}")
        self._complete(self._request.prompt, self._echo)

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not name:
            self._console.asides([(name, self._shown(name)) for name in _NAMES])
            return
        name = name.replace("_", "-")
        if name not in _NAMES:
            (nearest,) = difflib.get_close_matches(name[:40], _NAMES, n=1, cutoff=0.0)
            raise UsageError(
                f"{name[:40]!r} is no setting, the nearest is {nearest}",
                "/set shows them all",
            )
        if value.strip():
            parsed = settings.parse(_NAMES[name], value.strip())
            self._request = settings.change(self._request, _NAMES[name], parsed)
        self._console.asides([(name, self._shown(name))])

    def _shown(self, name: str) -> str:
        match settings.get(self._request, _NAMES[name]):
            case bool() as switch:
                return "on" if switch else "off"
            case tuple() as texts:
                return " ".join(map(repr, texts)) or "nothing"
            case value:
                return f"{value}, of the next text" if name == "seed" else str(value)

    def _stats(self) -> None:
        last = self._finished()
        self._engine.measure_bandwidth(last.stats)
        screen.stats(self._console, last)

    def _finished(self) -> Generation:
        if self._last is None:
            raise UsageError("there is no text yet: type the beginning of one")
        return self._last


def _ask(console: Console, readline: Any) -> str | None:
    """A line; None at the end of the input. Ctrl-C throws away what was typed.

    Raises:
        KeyboardInterrupt: Ctrl-C twice where nothing was typed, or SIGTERM.
    """
    is_leaving = False
    while True:
        try:
            return console.ask("> ")
        except UsageError as error:
            console.failure(error)
        except KeyboardInterrupt:
            interrupts.forgive()
            console.write("\n")
            if readline is not None and readline.get_line_buffer():
                is_leaving = False
                continue
            if is_leaving:
                raise
            console.note("Ctrl-C again, or Ctrl-D, ends")
            is_leaving = True


def _readline() -> Any:
    """The module for editing lines, which some builds of Python lack."""
    try:
        return importlib.import_module("readline")  # not before: it writes to some terminals
    except ImportError:
        return None


def _completions(line: str, word: str) -> list[str]:
    """What Tab offers: commands, and after /set the settings."""
    known: Iterable[str] = ()
    if line.startswith("/set "):
        known = _NAMES
    elif line.startswith("/"):
        known = _COMMANDS
    return [f"{name} " for name in known if name.startswith(word)]
