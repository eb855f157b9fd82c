"""The state of a server: which phase it is in, its model, its engine, and its queue."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from grokctl.events import Observer, ignore
from grokctl.inference.engine import Engine
from grokctl.inference.generation import BatchStats
from grokctl.serving.admission import Admission, Job
from grokctl.serving.bodies import Bodies
from grokctl.serving.connections import MOST_REQUESTS
from grokctl.serving.engine_thread import EngineThread
from grokctl.serving.measures import Gauges, Measures
from grokctl.serving.served_model import ServedModel
from grokctl.serving.wire_errors import WireError, unavailable

_FAILURES: Final = 2
"""Sequences in a row that fail, of an engine that no longer counts as healthy."""
_LOADING_S: Final = 5
"""When to ask again while the model loads."""


class Phase(StrEnum):
    """What a server can do."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    """It finishes what it has, and takes nothing new."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """Limits and habits of a server."""

    queue: int = 1024
    """Sequences that may wait."""
    ping_s: float = 15.0
    """Silence in a stream after which a comment is sent."""
    stall_s: float = 120.0
    """A turn that takes longer counts as a dead engine."""
    request_s: float | None = None
    """A request that takes longer ends with an error; None for no limit."""
    requests: int = MOST_REQUESTS
    """Of HTTP, that are answered at a time; beside those of probes."""
    body_nbytes: int = 32 * 2**20
    """Longest body of a request."""
    has_page: bool = True
    """Whether the playground is served."""
    is_chatting: bool = False
    """Whether conversations are written down as transcripts, and completed."""


LoadedModel = Callable[[Engine], ServedModel]
Report = Callable[[str, Exception], object]


class Service:
    """Everything that handlers of requests share; used in the loop alone.

    Args:
        start: Loads the engine, in a thread of its own.
        describe: The model of a loaded engine; runs in that thread, too.
        options: Limits and habits.
        observe: Receives progress, also from that thread.
        on_change: Called after each change of phase.
        report: Gets what failed inside, which no client is told, and the id of the request.
    """

    def __init__(
        self,
        start: Callable[[Observer], Engine],
        describe: LoadedModel,
        *,
        options: ServiceOptions,
        observe: Observer = ignore,
        on_change: Callable[[Phase], object] = lambda _: None,
        report: Report = lambda _id, _error: None,
    ) -> None:
        self.options = options
        self.bodies = Bodies(most=options.body_nbytes)
        self.report = report
        self.phase = Phase.LOADING
        self.measures = Measures()
        self.failure: BaseException | None = None
        """What ended the engine."""
        self.created = int(time.time())
        self.served = 0
        """Requests that are being answered."""
        self._on_change = on_change
        self._model: ServedModel | None = None
        self._admission: Admission | None = None

        def start_and_describe(observe: Observer) -> Engine:
            engine = start(observe)
            self._model = describe(engine)  # here, because it reads every piece of the tokenizer
            return engine

        self.engine = EngineThread(
            start_and_describe,
            observe=observe,
            on_ready=self._ready,
            on_failure=self._failed,
            on_turn=self.measures.turned,
        )

    def _ready(self, _engine: Engine) -> None:
        assert self._model is not None
        self.measures.serve(self._model.name)
        self._admission = Admission(
            self.engine,
            slots=self._model.plan.options.slots,
            limit=self.options.queue,
            measures=self.measures,
        )
        if self.phase is Phase.LOADING:
            self._change(Phase.READY)

    def _failed(self, error: BaseException) -> None:
        self.failure = error
        if self._admission is not None:
            self._admission.end(_engine_failed())
        self._change(Phase.FAILED)

    def drain(self) -> None:
        """Take nothing new, and end what waits."""
        if self._admission is not None:
            self._admission.end(_shutting_down(), waiting_only=True)
        if self.phase in {Phase.LOADING, Phase.READY}:
            self._change(Phase.DRAINING)

    def cut_off(self) -> int:
        """End everything that runs, with an error; how many sequences that were."""
        if self._admission is None:
            return 0
        running = self._admission.running
        self._admission.end(_shutting_down())
        return running

    def _change(self, phase: Phase) -> None:
        self.phase = phase
        self._on_change(phase)

    # --- for handlers

    @property
    def model(self) -> ServedModel:
        """The model.

        Raises:
            WireError: It is not loaded.
        """
        if self._model is None or self.phase is Phase.LOADING:
            raise self._not_ready() or _engine_failed()
        return self._model

    @property
    def admission(self) -> Admission:
        """The queue.

        Raises:
            WireError: The server takes no requests now.
        """
        problem = self._not_ready()
        if problem is not None:
            raise problem
        assert self._admission is not None
        return self._admission

    def _not_ready(self) -> WireError | None:
        match self.phase:
            case Phase.LOADING:
                return unavailable("the model is loading", "loading", retry_after_s=_LOADING_S)
            case Phase.DRAINING:
                return _shutting_down()
            case Phase.FAILED:
                return _engine_failed()
            case Phase.READY:
                return None

    def health(self) -> WireError | None:
        """Why this server cannot be relied on now; None if it can.

        It can if a turn of the engine has ended lately, or nothing is to do, or it compiles.
        """
        problem = self._not_ready()
        if problem is not None:
            return problem
        if self.engine.stuck_s() > self.options.stall_s:
            return unavailable("the engine does not answer", "engine_failed", retry_after_s=60)
        if self.measures.failures >= _FAILURES:
            return _engine_failed()
        return None

    @property
    def totals(self) -> BatchStats:
        """Of the scheduler; nothing before there is one."""
        return BatchStats() if self._admission is None else self.engine.engine.scheduler.totals

    def gauges(self) -> Gauges:
        """The present state."""
        admission = self._admission
        if admission is None or self._model is None:
            return Gauges(running=0, waiting=0, filled=0.0, totals=self.totals)
        room = admission.slots * self._model.plan.context
        return Gauges(
            running=admission.running,
            waiting=admission.waiting,
            filled=min(1.0, sum(admission.lengths()) / room),
            totals=self.totals,
            bandwidth=self._model.bandwidth,
        )

    @property
    def slots(self) -> int:
        """Sequences that run at a time."""
        return 0 if self._admission is None else self._admission.slots

    @property
    def has_failed(self) -> bool:
        """Whether the engine has ended."""
        return self.phase is Phase.FAILED

    @property
    def busy(self) -> bool:
        """Whether a request is queued or runs."""
        return self._admission is not None and self._admission.is_busy

    def place(self, job: Job) -> int:
        """Sequences that wait before a job, at most."""
        return 0 if self._admission is None else self._admission.place(job)

    def running_lengths(self) -> list[int]:
        """Positions that each running sequence fills."""
        return [] if self._admission is None else self._admission.lengths()


def _shutting_down() -> WireError:
    return unavailable("the server is shutting down", "shutting_down", retry_after_s=5)


def _engine_failed() -> WireError:
    return unavailable("the engine has failed", "engine_failed", retry_after_s=60)
