"""Frozen progress events, the `Observer` that receives them, and `throttled`.

Stages emit on the caller's thread; workers only add to counters. The caller cancels by raising.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """What a progress bar is about."""

    LOOK = "look"
    METADATA = "metadata"
    FETCH = "fetch"
    SEED = "seed"
    VERIFY = "verify"
    STRUCTURE = "structure"
    VALUES = "values"
    RESHARD = "reshard"
    LOAD = "load"
    COMPILE = "compile"
    PREFILL = "prefill"
    DECODE = "decode"
    SCORE = "score"
    BENCH = "bench"
    MINIATURE = "miniature"


class Unit(StrEnum):
    """What a stage counts."""

    BYTES = "bytes"
    TOKENS = "tokens"
    FILES = "files"
    PROMPTS = "prompts"
    NOTHING = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A stage begins."""

    stage: Stage
    total: int = 0
    """How much there is to do in `unit`; 0 when nobody can know."""
    unit: Unit = Unit.BYTES
    done: int = 0
    """How much of it was done before (a resumed download)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advanced:
    """A stage has got further."""

    stage: Stage
    done: int = 0
    """Since the beginning, not since the last event."""
    detail: str = ""
    """What it does or waits for now, in a few words."""
    facts: tuple[tuple[str, str], ...] = ()
    """More of that for those who have room: names and values."""
    parts: tuple[float, ...] = ()
    """How much is done of equal parts of the work, each 0 to 1, in order: a map."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A stage is over, and well."""

    stage: Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """A decision taken for the user, said in one line."""

    message: str


Event = Started | Advanced | Finished | Noted
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Observe nothing; the default of every stage."""
    del event


def throttled(
    observer: Observer, *, every: float, clock: Callable[[], float] = time.monotonic
) -> Observer:
    """Pass on at most one `Advanced` each `every` seconds, and every other event.

    Args:
        observer: Receives what is left.
        every: Seconds between two `Advanced` events.
        clock: Seconds, never backwards.

    Returns:
        An observer that never loses the last `Advanced` of a stage.
    """
    held: Advanced | None = None
    due = 0.0

    def observe(event: Event) -> None:
        nonlocal held, due
        if isinstance(event, Advanced):
            if clock() < due:
                held = event
                return
            due = clock() + every
        elif held is not None:
            observer(held)
        held = None
        observer(event)

    return observe
