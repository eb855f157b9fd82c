"""The result of a check, for `doctor` and `fetch --dry-run`."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """The outcome of a check."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"
    """It does not apply, or could not be run."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check of a requirement."""

    name: str
    status: Status
    detail: str
    fix: str = ""
    """A command that can be pasted; empty if there is none."""
