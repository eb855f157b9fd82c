"""Requests for callers that take the turns themselves: one, token by token, or many."""

import weakref
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Several
from functools import partial

from grokctl.errors import GrokctlError, UsageError
from grokctl.events import Advanced, Finished, Observer, Stage, Started, Unit, ignore
from grokctl.inference.active import Ticket
from grokctl.inference.generation import (
    BatchStats,
    Ended,
    Failed,
    Generation,
    PromptRead,
    Request,
    RequestEvent,
    Token,
)
from grokctl.inference.scheduler import Scheduler


class Stream:
    """A request on its way; taking its next token takes the scheduler's turns.

    Nobody waits for a stream that was dropped: its request is cancelled.

    Args:
        scheduler: Runs it, and whatever else was submitted.
        request: What to continue, and how.
        observe: Receives progress in tokens of the prompt.

    Raises:
        UsageError: As `Scheduler.submit`.
    """

    def __init__(
        self, scheduler: Scheduler, request: Request, *, observe: Observer = ignore
    ) -> None:
        self.request = request
        self._scheduler = scheduler
        inbox = _Inbox(len(request.prompt), observe)  # knows no stream, so that one can be dropped
        self._events = inbox.events
        self._ticket = scheduler.submit(request, inbox)
        self._generation: Generation | None = None
        self._error: GrokctlError | None = None
        weakref.finalize(self, scheduler.cancel, self._ticket)

    def __iter__(self) -> Iterator[Token]:
        """Every token as it comes."""
        return (event for event in self.events() if isinstance(event, Token))

    def events(self) -> Iterator[RequestEvent]:
        """Every event but the end, as it comes; see `result`.

        Raises:
            GrokctlError: The request could not be fulfilled.
        """
        while not self.is_over:
            while self._events:
                match self._events.popleft():
                    case Ended(generation):
                        self._generation = generation
                    case Failed(error):
                        self._error = error
                    case event:
                        yield event
            if not self.is_over:
                self._scheduler.turn()
        if self._error is not None:
            raise self._error

    @property
    def is_over(self) -> bool:
        """Whether the last event has come."""
        return self._generation is not None or self._error is not None

    def cancel(self) -> None:
        """End the request with the text so far; the events until now can still be taken."""
        self._scheduler.cancel(self._ticket)
        self._scheduler.end_cancelled()

    @property
    def result(self) -> Generation:
        """The result, after the last token or `cancel`.

        Raises:
            UsageError: The request has not ended.
            GrokctlError: It could not be fulfilled.
        """
        if self._events and isinstance(self._events[-1], Ended | Failed):
            for _ in self.events():
                pass  # nobody wants them any more
        if self._error is not None:
            raise self._error
        if self._generation is None:
            raise UsageError("the generation has not ended: take its tokens, or cancel it")
        return self._generation


class _Inbox:
    """Keeps the events of a request, and reports the progress of its prompt at once."""

    def __init__(self, total: int, observe: Observer) -> None:
        self.events: deque[RequestEvent] = deque()
        self._total = total
        self._observe = observe
        self._reads = False

    def __call__(self, event: RequestEvent) -> None:
        """Receive an event."""
        self.events.append(event)
        if isinstance(event, PromptRead):
            if not self._reads:
                self._observe(Started(stage=Stage.PREFILL, total=self._total, unit=Unit.TOKENS))
                self._reads = True
            self._observe(Advanced(stage=Stage.PREFILL, done=event.done))
        elif self._reads and isinstance(event, Token | Ended | Failed):
            self._observe(Finished(stage=Stage.PREFILL))
            self._reads = False


class Batch:
    """Many requests: iterate over it once, then read the statistics.

    Args:
        scheduler: Runs them, as many at a time as there are slots.
        requests: What to continue, and how.
        observe: Receives progress in prompts.

    Raises:
        UsageError: As `Scheduler.submit`; then none of them runs.
    """

    def __init__(
        self, scheduler: Scheduler, requests: Several[Request], *, observe: Observer = ignore
    ) -> None:
        self._scheduler = scheduler
        self._ends: deque[tuple[int, Ended | Failed]] = deque()
        self._observe = observe
        for request in requests:
            scheduler.check(request)
        tickets = [
            scheduler.submit(request, partial(_note_end, self._ends, index))
            for index, request in enumerate(requests)
        ]
        self._count, self._done = len(tickets), 0
        self._before = scheduler.totals
        weakref.finalize(self, _cancel_all, scheduler, tickets)

    def __iter__(self) -> Iterator[tuple[int, Generation]]:
        """Index and result of each request, as it ends.

        Raises:
            GrokctlError: One could not be fulfilled.
        """
        self._observe(Started(stage=Stage.DECODE, total=self._count, unit=Unit.PROMPTS))
        while self._done < self._count:
            while not self._ends:
                self._scheduler.turn()
            rate = f"{self.stats.decode_tokens_per_s:.1f} tokens/s"
            detail = f"{self._scheduler.running} running, {rate}"
            done = self._done + len(self._ends)
            self._observe(Advanced(stage=Stage.DECODE, done=done, detail=detail))
            while self._ends:
                index, event = self._ends.popleft()
                self._done += 1
                if isinstance(event, Failed):
                    raise event.error
                yield index, event.generation
        self._observe(Finished(stage=Stage.DECODE))

    @property
    def stats(self) -> BatchStats:
        """Of everything that ran since the batch was submitted."""
        return self._scheduler.totals.since(self._before)


def _note_end(ends: deque[tuple[int, Ended | Failed]], index: int, event: RequestEvent) -> None:
    if isinstance(event, Ended | Failed):
        ends.append((index, event))


def _cancel_all(scheduler: Scheduler, tickets: list[Ticket]) -> None:
    for ticket in tickets:
        scheduler.cancel(ticket)
