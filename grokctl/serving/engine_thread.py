"""The one thread that uses the engine: it loads, takes the scheduler's turns, and tells the loop.

The loop of asyncio runs in the main thread, which gets the signals, and never waits for a step.
After every turn, all events of it go to the loop at once.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

from grokctl.errors import PeerError
from grokctl.events import Event, Finished, Observer, Stage, Started
from grokctl.inference.active import Ticket
from grokctl.inference.engine import Engine
from grokctl.inference.generation import Failed, Request, RequestEvent

_IDLE_S: Final = 1.0
"""A wait for work; the end of the server is noticed after it, at the latest."""
Sink = Callable[[list[RequestEvent]], object]
"""Gets the events of a request's turn, in the loop."""


class EngineThread:
    """Runs an engine, and carries requests to it and events back.

    Args:
        start: Loads the engine; runs in the thread.
        observe: Receives progress, from the thread.
        on_ready: Called in the loop with the engine, once.
        on_failure: Called in the loop with what ended the thread, once; no event follows.
        on_turn: Called in the loop after a turn with the number of its tokens, those of prompts
            included, unless there are none.
    """

    def __init__(
        self,
        start: Callable[[Observer], Engine],
        *,
        observe: Observer,
        on_ready: Callable[[Engine], object],
        on_failure: Callable[[BaseException], object],
        on_turn: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._start = start
        self._observe = observe
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._on_turn = on_turn
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None
        self._events: list[tuple[Sink, RequestEvent]] = []
        self._lost: PeerError | None = None
        self._has_ended = threading.Event()
        self._must_end = False
        self._turn_began: float | None = None
        self._is_compiling = False
        self.turns = 0

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; events go to the loop."""
        self._loop = loop
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    # --- in the loop

    @property
    def engine(self) -> Engine:
        """The loaded engine."""
        assert self._engine is not None
        return self._engine

    def submit(self, request: Request, sink: Sink) -> Ticket:
        """Give a request to the scheduler.

        Raises:
            UsageError: As `Scheduler.submit`.
        """
        return self.engine.scheduler.submit(request, partial(self._collect, sink))

    def cancel(self, ticket: Ticket) -> None:
        """End a request before its next token."""
        self.engine.scheduler.cancel(ticket)

    def stuck_s(self) -> float:
        """Seconds that the present turn has taken; 0 between turns, and while compiling."""
        began = self._turn_began
        return 0.0 if began is None or self._is_compiling else time.monotonic() - began

    async def end(self, within_s: float) -> bool:
        """Let the thread end after its present step; whether it has."""
        self._must_end = True
        return await asyncio.to_thread(self._has_ended.wait, within_s)

    def _deliver(self, events: list[tuple[Sink, RequestEvent]], tokens: int) -> None:
        """Give each request its events of a turn, together."""
        by_sink: dict[Sink, list[RequestEvent]] = {}
        for sink, event in events:
            by_sink.setdefault(sink, []).append(event)
        for sink, of_one in by_sink.items():
            sink(of_one)
        if tokens:
            self._on_turn(tokens)

    # --- in the thread

    def _run(self) -> None:
        try:
            self._engine = self._start(self._watch)
            self._call(self._on_ready, self._engine)
            self._take_turns(self._engine)
        except BaseException as error:  # noqa: BLE001 (the loop reports it, and ends the process)
            self._tell()
            self._call(self._on_failure, error)
        finally:
            self._has_ended.set()

    def _take_turns(self, engine: Engine) -> None:
        scheduler = engine.scheduler
        while not self._must_end:
            if not scheduler.wait(_IDLE_S):
                continue
            self._turn_began, before = time.monotonic(), scheduler.totals
            try:
                scheduler.turn()
            finally:
                self._turn_began = None
                self.turns += 1
            recent = scheduler.totals.since(before)
            self._tell(recent.prefilled + recent.decoded)
            if self._lost is not None:
                raise self._lost

    def _collect(self, sink: Sink, event: RequestEvent) -> None:
        self._events.append((sink, event))
        if isinstance(event, Failed) and isinstance(event.error, PeerError):
            self._lost = event.error  # nothing can run any more

    def _tell(self, tokens: int = 0) -> None:
        """Hand the events of a turn to the loop, and how many tokens it ran."""
        events, self._events = self._events, []
        if events or tokens:
            self._call(self._deliver, events, tokens)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has ended: nobody waits any more
            self._loop.call_soon_threadsafe(function, *arguments)

    def _watch(self, event: Event) -> None:
        match event:
            case Started(stage=Stage.COMPILE):
                self._is_compiling = True
            case Finished(stage=Stage.COMPILE):
                self._is_compiling = False
                self._turn_began = time.monotonic() if self._turn_began else None
            case _:
                pass
        self._observe(event)
