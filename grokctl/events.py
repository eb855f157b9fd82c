"""Progress events of a stage, and the observers that receive them.

A stage emits events on its caller's thread, and its workers only add to counters. An observer
that raises cancels the stage.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """A stage that reports progress."""

    LOOK = "look"
    METADATA = "metadata"
    FETCH = "fetch"
    SEED = "seed"
    VERIFY = "verify"
    STRUCTURE = "structure"
    VALUES = "values"
    RESHARD = "reshard"
    EXPORT = "export"
    LOAD = "load"
    COMPILE = "compile"
    PREFILL = "prefill"
    DECODE = "decode"
    STREAM = "stream"
    SCORE = "score"
    BENCH = "bench"
    MINIATURE = "miniature"
    SERVE = "serve"


class Unit(StrEnum):
    """The unit of a stage's progress."""

    BYTES = "bytes"
    TOKENS = "tokens"
    FILES = "files"
    PROMPTS = "prompts"
    NOTHING = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A stage has begun."""

    stage: Stage
    total: int = 0
    """All of the work, in `unit`; 0 if unknown."""
    unit: Unit = Unit.BYTES
    done: int = 0
    """Done by an earlier run, such as the first part of a resumed download."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advanced:
    """A stage has progressed."""

    stage: Stage
    done: int = 0
    """In all, not since the last event."""
    detail: str = ""
    """The current work, or what it waits for, in a few words."""
    facts: tuple[tuple[str, str], ...] = ()
    """The same in more detail: names and values."""
    parts: tuple[float, ...] = ()
    """A map: the share done of each of equal parts of the work, in order, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A stage has succeeded."""

    stage: Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """A decision made for the user, in one line."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A server has answered a request."""

    id: str
    """That the client was told, or has chosen."""
    route: str
    status: int
    """Of HTTP; 499 if the client has left before an answer."""
    prompt_tokens: int
    tokens: int
    """Generated ones."""
    seconds: float


Event = Started | Advanced | Finished | Noted | Answered
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Ignore an event; the default of every stage."""
    del event


def throttled(
    observer: Observer, *, every: float, clock: Callable[[], float] = time.monotonic
) -> Observer:
    """An observer that passes on few `Advanced` events, and all others.

    Args:
        observer: Receives the events.
        every: Least number of seconds between two `Advanced` events of a stage; several stages may
            be under way.
        clock: Seconds, monotonic.

    Returns:
        It never drops the last `Advanced` event of a stage.
    """
    latest: dict[Stage, Advanced] = {}
    due: dict[Stage, float] = {}

    def observe(event: Event) -> None:
        if isinstance(event, Advanced):
            if clock() < due.get(event.stage, 0.0):
                latest[event.stage] = event
                return
            due[event.stage] = clock() + every
            latest.pop(event.stage, None)
        else:
            for held in latest.values():
                observer(held)
            latest.clear()
        observer(event)

    return observe
