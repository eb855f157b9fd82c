"""A check and how it ended: what `doctor` and `fetch --dry-run` are made of."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"
    """It does not apply here, or could not be made."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that somebody needs."""

    name: str
    status: Status
    detail: str
    fix: str = ""
    """A line that can be pasted, where something can be done."""
