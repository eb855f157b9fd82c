"""Who waits and who runs: a bounded queue in which requests take turns, whatever they ask for."""

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from grokctl.inference.active import Ticket
from grokctl.inference.generation import Ended, Failed, PromptRead, Request, RequestEvent, Token
from grokctl.serving.engine_thread import EngineThread
from grokctl.serving.measures import Measures
from grokctl.serving.wire_errors import WireError

_MOST_TOKENS: Final = 2**22
"""Tokens of all waiting prompts: 150 MB."""
_AHEAD: Final = 4
"""Sequences that wait in the scheduler, at most, so that a free slot is taken at once."""
_LONGEST_RETRY_S: Final = 60
_WINDOW: Final = 32
"""Ends over which the rate of finished sequences is measured."""


@dataclass(eq=False, slots=True)
class Run:
    """One sequence of a job, on its way through the queue and the engine."""

    job: "Job"
    index: int
    request: Request
    ticket: Ticket | None = None
    """Once the scheduler has it."""
    begun_at: float | None = None
    """When it got a slot."""
    token_at: float | None = None
    """When its newest token came."""
    first_at: float | None = None
    read: int = 0
    """Tokens of its prompt in the cache."""
    made: int = 0
    """Sampled tokens."""
    is_over: bool = False


Message = tuple[int, list[RequestEvent]] | WireError
"""The events of a turn of a job's run with that index, or why there are no more of any."""


@dataclass(eq=False, slots=True)
class Job:
    """The sequences of one HTTP request."""

    runs: list[Run] = field(default_factory=list)
    messages: "asyncio.Queue[Message]" = field(default_factory=asyncio.Queue)
    arrived_at: float = field(default_factory=time.monotonic)
    left: deque[Run] = field(default_factory=deque)
    """Runs that the scheduler does not have yet."""
    is_dropped: bool = False

    @property
    def has_begun(self) -> bool:
        """Whether one of its runs got a slot."""
        return any(run.begun_at is not None for run in self.runs)

    @property
    def progress(self) -> tuple[int, int]:
        """Tokens of the prompts under way that were read, and all of them."""
        reading = [run for run in self.runs if run.begun_at is not None and not run.made]
        return sum(run.read for run in reading), sum(len(run.request.prompt) for run in reading)


class Admission:
    """All jobs under way; used in the loop alone.

    Args:
        engine: Runs them.
        slots: Sequences that run at a time.
        limit: Sequences that may wait.
        measures: Counts what happens to sequences.
    """

    def __init__(self, engine: EngineThread, *, slots: int, limit: int, measures: Measures) -> None:
        self.slots = slots
        self.limit = limit
        self._engine = engine
        self._measures = measures
        self._jobs: dict[Job, None] = {}
        self._turns: deque[Job] = deque()
        """Jobs with runs that the scheduler does not have, the next one first."""
        self._given = 0
        """Runs that the scheduler has."""
        self._ends: deque[float] = deque(maxlen=_WINDOW)

    @property
    def running(self) -> int:
        """Sequences in slots."""
        return len(self.lengths())

    @property
    def waiting(self) -> int:
        """Sequences that have no slot yet."""
        return sum(
            run.begun_at is None and not run.is_over for job in self._jobs for run in job.runs
        )

    @property
    def is_busy(self) -> bool:
        """Whether there is a job."""
        return bool(self._jobs)

    def lengths(self) -> list[int]:
        """Positions of the cache that each running sequence fills."""
        return [
            run.read + run.made
            for job in self._jobs
            for run in job.runs
            if run.begun_at is not None and not run.is_over
        ]

    def place(self, job: Job) -> int:
        """Sequences that wait before a job, at most."""
        return sum(
            run.begun_at is None and not run.is_over
            for other in self._jobs
            if other.arrived_at < job.arrived_at
            for run in other.runs
        )

    def retry_after_s(self) -> int:
        """Seconds until the queue has gone, about."""
        now = time.monotonic()
        span = now - self._ends[0] if self._ends else 0.0
        rate = len(self._ends) / span if span else 0.0
        wait = self.waiting / rate if rate else _LONGEST_RETRY_S
        return int(min(max(wait, 1), _LONGEST_RETRY_S))

    @contextmanager
    def admitted(self, requests: Sequence[Request]) -> Iterator[Job]:
        """A job that is cancelled at the end of the block, unless it has ended.

        Raises:
            WireError: Too many sequences, or too many tokens, wait already.
        """
        job = self.admit(requests)
        try:
            yield job
        finally:
            self.drop(job)

    def admit(self, requests: Sequence[Request]) -> Job:
        """Queue a job, which somebody has to drop; see `admitted`."""
        waiting = self.waiting
        tokens = sum(
            len(run.request.prompt) for job in self._jobs for run in job.runs if not run.begun_at
        )
        tokens += sum(len(request.prompt) for request in requests)
        under_way = waiting + self.running + len(requests)
        if waiting and (under_way > self.slots + self.limit or tokens > _MOST_TOKENS):
            self._measures.refused("queue_full")
            message = f"queue: expected at most {self.limit:,} sequences, found {waiting:,} waiting"
            headers = {"Retry-After": str(self.retry_after_s())}
            raise WireError(429, message, "queue_full", headers=headers)
        job = Job()
        job.runs = [Run(job, index, request) for index, request in enumerate(requests)]
        job.left = deque(job.runs)
        self._jobs[job] = None
        self._turns.append(job)
        self._pump()
        return job

    def drop(self, job: Job) -> None:
        """Forget a job: nobody waits for it. What is under way ends before its next token."""
        job.is_dropped = True
        job.left.clear()
        for run in job.runs:
            if run.ticket is None:
                run.is_over = True
            elif not run.is_over:
                self._engine.cancel(run.ticket)
        if all(run.is_over for run in job.runs):
            self._jobs.pop(job, None)

    def end(self, error: WireError, *, waiting_only: bool = False) -> None:
        """End jobs, all or those without a slot, with an error."""
        for job in list(self._jobs):
            if not (waiting_only and job.has_begun):
                job.messages.put_nowait(error)

    # --- between queue and engine

    def _pump(self) -> None:
        """Give runs to the scheduler, of one job after the other."""
        while self._turns and self._given < self.slots + min(self.slots, _AHEAD):
            job = self._turns.popleft()
            if not job.left:
                continue
            run = job.left.popleft()
            self._given += 1
            run.ticket = self._engine.submit(run.request, _Sink(self, run))
            if job.left:
                self._turns.append(job)

    def note(self, run: Run, events: list[RequestEvent]) -> None:
        """Take the events of a turn of a run."""
        now = time.monotonic()
        if run.begun_at is None:
            run.begun_at = now
            self._measures.began(now - run.job.arrived_at)
        for event in events:
            match event:
                case PromptRead(done=done):
                    run.read = done
                case Token(id=int()):
                    self._measures.token(run, now)
                    run.made += 1
                    run.first_at, run.token_at = run.first_at or now, now
                case Ended() | Failed():
                    self._given -= 1
                    self._measures.ended(run, event, now)
                    self._ends.append(now)
                    run.is_over = True
                case _:
                    pass
        if not run.job.is_dropped:
            run.job.messages.put_nowait((run.index, events))
        elif all(each.is_over for each in run.job.runs):
            self._jobs.pop(run.job, None)
        self._pump()


@dataclass(frozen=True, slots=True, eq=False)
class _Sink:
    """Where the events of a run go."""

    admission: Admission
    run: Run

    def __call__(self, events: list[RequestEvent]) -> None:
        self.admission.note(self.run, events)
