"""Every error that grokctl raises on purpose, its exit code, and the facts it carries.

    GrokctlError
    ├── UsageError                  2
    │   └── InvalidValueError       2
    ├── FetchError                 10
    │   └── StalledError           11
    ├── DiskFullError              12
    ├── CorruptCheckpointError     20
    ├── UnsafePickleError          21
    ├── PlacementError             30
    ├── HardwareError              40
    └── PeerError                  50

`str(error)` is one sentence, noun first, without advice. `error.hint` is the advice: one line to
paste. Fields are positional, so that every error survives `pickle`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum, StrEnum
from typing import ClassVar, Final, Self

_LONGEST_VALUE: Final = 60


class ExitCode(IntEnum):
    """The exit status of a command; a test holds `docs/exit-codes.md` to this table."""

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
    """Shares a bad piece with a damaged file, or is in no torrent."""
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
    """Bytes of those pieces: the download that repairs the file."""
    advice: str = ""
    """A command for a checkpoint without a torrent, with `{file}` and `{root}` for their paths."""
    is_certain: bool = True
    """Whether the file is damaged by the evidence: not if it only shares its bad pieces with
    others of which one is, or may be."""

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}" + (f", {self.detail}" if self.detail else "")


def worst(damage: Sequence[Damage]) -> Damage:
    """The damage to name first: an unsafe pickle, then a file that is certainly damaged."""
    unsafe = [item for item in damage if item.reason is Reason.UNSAFE]
    possible = [item for item in damage if item.reason is not Reason.UNPROVEN]
    return (unsafe or certain(damage) or possible or damage)[0]


def certain(damage: Iterable[Damage]) -> list[Damage]:
    """The damage without the files that only share a bad piece with another."""
    return [item for item in damage if item.is_certain]


def possible(damage: Iterable[Damage]) -> list[Damage]:
    """Files that share a bad piece, and nothing tells which of them is damaged."""
    return [item for item in damage if not item.is_certain and item.reason is not Reason.UNPROVEN]


def bounds_of(damage: Sequence[Damage]) -> tuple[int, int]:
    """How many files are damaged, at least and at most.

    Where nothing tells the files of a bad piece apart, one of them is damaged; the fewest are
    counted over pieces that have no file in common.
    """
    sure = certain(damage)
    explained = [pieces for item in sure for pieces in item.pieces]
    groups: dict[int, set[str]] = {}
    for item in (open_cases := possible(damage)):
        for piece in (piece for first, last in item.pieces for piece in range(first, last)):
            if not any(first <= piece < last for first, last in explained):
                groups.setdefault(piece, set()).add(item.file)
    if not sure and not open_cases:
        return len(damage), len(damage)
    fewest, counted = len(sure), set[str]()
    for group in sorted(groups.values(), key=len):
        if counted.isdisjoint(group):
            counted |= group
            fewest += 1
    return fewest, len(sure) + len(open_cases)


def count_of(damage: Sequence[Damage], checked: int) -> str:
    """`3 of 40 files are damaged, 9 more share their pieces`, or `3 to 11 of 40 files are …`."""
    least, most = bounds_of(damage)
    sharing = len(damage) - most
    verb = "shares" if sharing == 1 else "share"
    more = f", {sharing} more {verb} their pieces" if sharing else ""
    is_one = least == most == 1
    among = max(checked, len(damage))  # a run may need files that the torrent does not have
    return (
        f"{count_range(least, most)} of {among:,} files {'is' if is_one else 'are'} damaged{more}"
    )


def count_range(least: int, most: int) -> str:
    """`3`, or `3 to 11`."""
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


@dataclass(eq=False)
class GrokctlError(Exception):
    """An expected failure; anything else that reaches the user is a bug.

    Attributes:
        message: One sentence, noun first.
        hint: One line of advice to paste, or None.
    """

    message: str
    hint: str | None = None

    exit_code: ClassVar[ExitCode] = ExitCode.BUG

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))


class UsageError(GrokctlError):
    """The request is invalid."""

    exit_code = ExitCode.USAGE


@dataclass(eq=False)
class InvalidValueError(UsageError):
    """A named value is invalid.

    The library raises it with the name of its own field or argument. The caller that took the
    value from a user puts the user's name for it in place: `error.renamed("--stall-timeout")`.
    """

    name: str = ""
    value: str = ""
    """As text, short enough for one line; left out where the message describes it."""

    def __str__(self) -> str:
        return f"{self.name} {self.value}".rstrip() + f": {self.message}"

    def renamed(self, name: str) -> Self:
        """The same error about the name that the user typed."""
        return type(self)(self.message, self.hint, name, self.value)


class FetchError(GrokctlError):
    """The download cannot continue: bad source, bad file names, or an unusable destination."""

    exit_code = ExitCode.FETCH


class StalledError(FetchError):
    """No source has sent anything for too long."""

    exit_code = ExitCode.STALLED


class DiskFullError(GrokctlError):
    """Not enough free space; checked before the first byte is written where possible."""

    exit_code = ExitCode.DISK_FULL


@dataclass(eq=False)
class CorruptCheckpointError(GrokctlError):
    """Files of a checkpoint are missing or damaged."""

    damage: tuple[Damage, ...] = ()

    exit_code: ClassVar[ExitCode] = ExitCode.CORRUPT


class UnsafePickleError(CorruptCheckpointError):
    """A pickle refers to something that no tensor needs; nothing in it was built or executed."""

    exit_code = ExitCode.UNSAFE


class PlacementError(GrokctlError):
    """The model does not support this mesh or precision."""

    exit_code = ExitCode.PLACEMENT


class HardwareError(GrokctlError):
    """This hardware cannot hold or run the model."""

    exit_code = ExitCode.HARDWARE


class PeerError(GrokctlError):
    """Another process of the run failed, was lost, never joined, or runs something else."""

    exit_code = ExitCode.PEER


def invalid(name: str, value: object, problem: str, hint: str | None = None) -> InvalidValueError:
    """The error about one value.

    Args:
        name: Of the field, the argument or the option that holds it.
        value: Invalid; text, other than a path, is quoted and cut to a line.
        problem: Why, such as `expected more than 0`.
        hint: One line of advice to paste.
    """
    text = str(value)
    if isinstance(value, str):
        text = repr(value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}…")
    elif isinstance(value, float):
        text = text.removesuffix(".0")
    return InvalidValueError(problem, hint, name, text)


def corrupt(
    file: str,
    reason: Reason,
    detail: str,
    hint: str | None = None,
    *,
    ranges: tuple[tuple[int, int], ...] = (),
    advice: str = "",
) -> CorruptCheckpointError:
    """The error about one damaged file; an unsafe one is an `UnsafePickleError`."""
    damage = Damage(file, reason, detail, ranges, advice=advice)
    kind = UnsafePickleError if reason is Reason.UNSAFE else CorruptCheckpointError
    return kind(str(damage), hint, (damage,))
