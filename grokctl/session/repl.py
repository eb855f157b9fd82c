"""The interactive loop: completes typed texts, and runs lines with a slash as commands."""

import difflib
import importlib
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

from grokctl import interrupts
from grokctl.cluster.process_group import Cluster
from grokctl.errors import InvalidValueError, UsageError
from grokctl.events import Event, Observer, ignore
from grokctl.inference.engine import Engine
from grokctl.inference.generation import FinishReason, Generation, Request
from grokctl.parse import plain_text, read_token_ids
from grokctl.screen import run as screen
from grokctl.screen.console import Console
from grokctl.session import settings
from grokctl.session.complete import write
from grokctl.session.history import History, edit_lines
from grokctl.session.job import JobRequest, open_job
from grokctl.session.prompts import check_settings

_NAMES: Final = {name.replace("_", "-"): name for name in settings.SETTINGS}
"""Settings by the names that people type."""
_QUIT: Final = "/quit"
_LEAVES: Final = (_QUIT, "/exit")
_COMMANDS: Final = {
    "/more": "continue the last text",
    "/retry": "repeat the last prompt with another seed",
    "/set": "show the settings; /set temperature 0.5 changes one",
    "/stats": "speed of the last text, compared with the memory bandwidth",
    "/help": "show the commands; begin a text with // for one slash",
    _QUIT: "leave, as Ctrl-D does",
}


def converse(
    console: Console,
    request: JobRequest,
    defaults: Request,
    *,
    all_stats: bool,
    cluster: Cluster | None = None,
) -> None:
    """Load a checkpoint, and complete typed texts until the user leaves.

    Args:
        console: At the user's terminal.
        request: Which checkpoint, and how to run it; its home has the history of typed lines.
        defaults: How to continue at first; its prompt is empty.
        all_stats: Print all measurements after every text.
        cluster: The processes that run it together, if there are several.

    Raises:
        KeyboardInterrupt: Ctrl-C twice, or SIGTERM.
    """
    observer = _Observer()
    with console.observing() as observer.to:
        engine = open_job(request, cluster=cluster, observe=observer).start(observer)
    conversation = _Conversation(console, engine, observer, defaults, all_stats=all_stats)
    conversation.greet()
    history, readline = History(request.home.root / "history"), _readline()
    if readline is not None:
        edit_lines(readline, history, _completions)
    while (line := _ask(console, readline)) is not None and line.strip() not in _LEAVES:
        history.add(line)
        try:
            conversation.obey(line)
        except InvalidValueError as error:
            console.failure(error.renamed(error.name.replace("_", "-")))
        except UsageError as error:
            console.failure(error)
    if line is None:
        console.write("\n")


class _Observer:
    """Passes the engine's events to the observer of the current text."""

    def __init__(self) -> None:
        self.to: Observer = ignore

    def __call__(self, event: Event) -> None:
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
        """The settings, with the last prompt and the next seed."""
        self._all_stats = all_stats
        self._echo: str | None = None
        self._last: Generation | None = None

    def greet(self) -> None:
        """Print the introduction."""
        kind = "a text" if self._engine.tokenizer else "a text as token ids, 1,2,3"
        self._console.note(f"Type the beginning of {kind}. A base model completes, no chat.")
        self._console.note("Ctrl-C stops a text, Ctrl-D leaves, /help shows the commands.")

    def obey(self, line: str) -> None:
        """Complete a text, or run a command.

        Raises:
            UsageError: The text cannot be completed, or there is no such command.
        """
        if not line.strip():
            return
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line.strip().partition(" ")
            self._command(name, rest.strip())
            return
        text = plain_text(line[1:] if line.startswith("//") else line, "line")
        plan = self._engine.plan
        tokens = plan.encode(text) if plan.tokenizer else read_token_ids(text, "line")
        self._complete(tuple(tokens), text if plan.tokenizer else None)

    def _command(self, name: str, rest: str) -> None:
        match name:
            case "/more":
                self._more()
            case "/retry":
                self._retry()
            case "/set":
                self._set(rest)
            case "/stats":
                self._stats()
            case "/help":
                self._console.asides(list(_COMMANDS.items()))
            case _:
                raise UsageError(f"unknown command {name[:40]}", ", ".join(_COMMANDS))

    def _complete(self, prompt: tuple[int, ...], echo: str | None) -> None:
        request = self._request
        with (
            interrupts.deferred() as stop,
            self._console.observing() as self._observer.to,
        ):
            generation = write(
                self._console,
                self._engine,
                self._engine.fulfil(replace(request, prompt=prompt)),
                echo=echo,
                is_streamed=True,
                stop=stop,
            )
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

    def _more(self) -> None:
        last = self._finished()
        ids, eos = last.ids, self._engine.config.eos_token
        ends = {last.ended_by} if self._request.ignore_eos else {last.ended_by, eos}
        if last.finish_reason is FinishReason.STOP and ids and ids[-1] in ends:
            ids = ids[:-1]  # the text goes on as if it had not ended
        self._complete((*self._request.prompt, *ids), None)

    def _retry(self) -> None:
        self._finished()
        if self._request.sampling.temperature == 0:
            self._console.note("the temperature is 0: the same text again")
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
                f"unknown setting {name[:40]!r}, the nearest is {nearest}", "/set shows all"
            )
        if value.strip():
            parsed = settings.parse(_NAMES[name], value.strip())
            changed = settings.change(self._request, _NAMES[name], parsed)
            check_settings(changed, self._engine.plan)
            self._request = changed
        self._console.asides([(name, self._shown(name))])

    def _shown(self, name: str) -> str:
        if name == "logit-bias" and (bias := self._request.sampling.logit_bias):
            return json.dumps({str(token): value for token, value in bias})  # as it is typed
        match settings.get(self._request, _NAMES[name]):
            case bool() as switch:
                return "on" if switch else "off"
            case tuple() as several:
                return " ".join(map(repr, several)) or "nothing"
            case value:
                return f"{value}, for the next text" if name == "seed" else str(value)

    def _stats(self) -> None:
        self._last = self._engine.measured(self._finished())
        screen.stats(self._console, self._last)

    def _finished(self) -> Generation:
        if self._last is None:
            raise UsageError("there is no text yet", "type the beginning of one")
        return self._last


def _ask(console: Console, readline: Any) -> str | None:
    """The next line; None at the end of the input. Ctrl-C drops a line that was not entered.

    Raises:
        KeyboardInterrupt: Ctrl-C twice at an empty line, or SIGTERM.
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
            console.note("press Ctrl-C again, or Ctrl-D, to leave")
            is_leaving = True


def _readline() -> Any:
    """The module for line editing; None in a Python built without it."""
    try:
        return importlib.import_module("readline")  # not earlier: it writes to some terminals
    except ImportError:
        return None


def _completions(line: str, word: str) -> list[str]:
    """Completions for Tab: commands, or settings after /set."""
    known: Iterable[str] = ()
    if line.startswith("/set "):
        known = _NAMES
    elif line.startswith("/"):
        known = _COMMANDS
    return [f"{name} " for name in known if name.startswith(word)]
