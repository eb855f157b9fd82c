"""The record of the last full verification that found damage, until a later one finds none."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grokctl.checkpoint.receipt import now
from grokctl.checkpoint.trust import read_object
from grokctl.errors import Damage, bounds_of, count_range, worst
from grokctl.paths import PRIVATE, REFUSAL, delete_record, quoted, write_atomically
from grokctl.text import printable

_VERSION: Final = 1
_TIME: Final = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_LONGEST: Final = 300
_LARGEST: Final = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A verification that found damage."""

    at: str
    """ISO 8601, UTC."""
    files: int
    """Damaged files, at least."""
    most: int
    """Damaged files, at most."""
    first: str
    """The first of them, and its damage."""

    def describe(self, root: Path) -> str:
        """One line for people."""
        damaged = f"{count_range(self.files, self.most)} damaged file{'s' * (self.most != 1)}"
        command = f"grokctl verify {quoted(root)}"
        return f"{root.name}: verify found {damaged} on {self.at}, first {self.first} ({command})"


def write_refusal(root: Path, damage: Sequence[Damage]) -> None:
    """Record the damage to a checkpoint.

    Raises:
        OSError: The folder cannot be written.
    """
    least, most = bounds_of(damage)
    first = str(worst(damage))
    values = {"version": _VERSION, "at": now(), "files": least, "most": most, "first": first}
    write_atomically(root / PRIVATE / REFUSAL, json.dumps(values, indent=1).encode())


def forget_refusal(root: Path) -> None:
    """Delete the record: nothing is damaged.

    Raises:
        OSError: The folder cannot be written.
    """
    delete_record(root / PRIVATE / REFUSAL)


def read_refusal(root: Path) -> Refusal | None:
    """The last verification, if it found damage; None if it found none, or there was none."""
    path = root / PRIVATE / REFUSAL
    try:
        values = read_object(path, limit=_LARGEST)
        at, files, first = values["at"], values["files"], values["first"]
        most = values.get("most", files)  # an earlier version wrote one number
        is_counted = type(files) is int and type(most) is int and 0 < files <= most
        if not (_TIME.fullmatch(at) and is_counted and values["version"] == _VERSION):
            return None
        return Refusal(at=at, files=files, most=most, first=printable(first, limit=_LONGEST))
    except (OSError, KeyError, TypeError, AttributeError):
        return None
