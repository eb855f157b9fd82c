"""Everything grokctl raises on purpose: the exception tree, `ExitCode`, and the facts errors carry.

    GrokctlError
    ├── UsageError                  2
    ├── FetchError                 10
    │   └── StalledError           11
    ├── DiskFullError              12
    ├── CorruptCheckpointError     20
    ├── UnsafePickleError          21
    ├── PlacementError             30
    ├── HardwareError              40
    └── PeerError                  50

`str(error)` is one sentence with the noun first and without advice; `error.hint` is the advice, one
line that can be pasted. Fields are positional, so that every error survives `pickle`.
"""

from dataclasses import dataclass, fields
from enum import IntEnum, StrEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What the shell sees; `docs/exit-codes.md` is tested against this table."""

    OK = 0
    """done"""
    BUG = 1
    """a bug: please report"""
    USAGE = 2
    """usage"""
    FETCH = 10
    """fetch failed"""
    STALLED = 11
    """swarm stalled"""
    DISK_FULL = 12
    """not enough disk"""
    CORRUPT = 20
    """corrupt or incomplete checkpoint"""
    UNSAFE = 21
    """unsafe pickle refused"""
    PLACEMENT = 30
    """mesh or precision impossible"""
    HARDWARE = 40
    """this hardware cannot do it"""
    PEER = 50
    """another process of the run failed"""
    INTERRUPTED = 130
    """interrupted"""


class Reason(StrEnum):
    """Why a file is damaged."""

    MISSING = "missing"
    SHORT = "short"
    LONG = "long"
    ALTERED = "altered"
    UNREADABLE = "unreadable"
    UNPROVEN = "unproven"
    """Shares a bad piece with the file whose fault it is, or nothing promises it."""
    MALFORMED = "malformed"
    UNSAFE = "unsafe"


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged file of a checkpoint."""

    file: str
    """Path relative to the checkpoint, `/`-separated."""
    reason: Reason
    detail: str = ""
    """Both sides of the mismatch, such as `expected 4519 bytes, found 4000`."""
    ranges: tuple[tuple[int, int], ...] = ()
    """Damaged byte ranges of the file, half open, ascending."""
    pieces: tuple[tuple[int, int], ...] = ()
    """Bad pieces of the torrent that touch the file, half open, ascending."""
    mend_nbytes: int = 0
    """Bytes of those pieces: what mending the file takes."""

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}" + (f", {self.detail}" if self.detail else "")


@dataclass(eq=False)
class GrokctlError(Exception):
    """The only failure that users are expected to meet.

    Attributes:
        message: One sentence, noun first.
        hint: One line of advice that can be pasted, or nothing.
    """

    message: str
    hint: str | None = None

    exit_code: ClassVar[ExitCode] = ExitCode.BUG

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))


class UsageError(GrokctlError):
    """What was asked cannot be meant."""

    exit_code = ExitCode.USAGE


class FetchError(GrokctlError):
    """The download cannot go on: bad source, bad names, refused by the destination."""

    exit_code = ExitCode.FETCH


class StalledError(FetchError):
    """Nobody in the swarm sends anything."""

    exit_code = ExitCode.STALLED


class DiskFullError(GrokctlError):
    """Not enough room; found before a byte moves where that is possible."""

    exit_code = ExitCode.DISK_FULL


@dataclass(eq=False)
class CorruptCheckpointError(GrokctlError):
    """Files on disk are not what they should be."""

    damage: tuple[Damage, ...] = ()

    exit_code: ClassVar[ExitCode] = ExitCode.CORRUPT


class UnsafePickleError(CorruptCheckpointError):
    """A file asks for something that no tensor needs; nothing of it was built or executed."""

    exit_code = ExitCode.UNSAFE


class PlacementError(GrokctlError):
    """No such mesh or precision for this model."""

    exit_code = ExitCode.PLACEMENT


class HardwareError(GrokctlError):
    """This machine cannot hold or run it."""

    exit_code = ExitCode.HARDWARE


class PeerError(GrokctlError):
    """Another process of a run failed, never came, or is about something else."""

    exit_code = ExitCode.PEER


def corrupt(
    file: str,
    reason: Reason,
    detail: str,
    hint: str | None = None,
    *,
    ranges: tuple[tuple[int, int], ...] = (),
) -> CorruptCheckpointError:
    """The error for one damaged file; an unsafe one is an `UnsafePickleError`."""
    damage = Damage(file, reason, detail, ranges)
    kind = UnsafePickleError if reason is Reason.UNSAFE else CorruptCheckpointError
    return kind(str(damage), hint, (damage,))
