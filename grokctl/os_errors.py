"""What the operating system refused, as an error that users understand."""

import errno
import os
import shlex
from pathlib import Path
from typing import Final

from grokctl.errors import DiskFullError, GrokctlError, UsageError

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def refusal(
    error: OSError,
    folder: Path | None = None,
    *,
    kind: type[GrokctlError] = UsageError,
    hint: str | None = None,
) -> GrokctlError:
    """Translate an `OSError`, the same way for every command.

    A full disk and an exhausted quota are a `DiskFullError`, whatever was being done; everything
    else is of the caller's kind.

    Args:
        error: As Python raised it.
        folder: Where it happened, named when the error names no file or only a part of its path.
        kind: The class of the error, unless the disk is full.
        hint: Advice, unless the disk is full; by default, to look at the file.
    """
    name = error.filename
    file = Path(os.fsdecode(name)) if isinstance(name, str | bytes | Path) else None
    place = file or folder
    where = f"{place or 'stdout'}"
    if file is not None and folder is not None and not file.is_absolute():
        place, where = folder, f"{folder}: {file}"
    message = f"{where}: {reason_of(error)}"
    if error.errno in _FULL:
        return DiskFullError(message, _more_room(folder or place))
    return kind(message, hint or (None if place is None else f"ls -ld {_quoted(place)}"))


def reason_of(error: OSError) -> str:
    """The system's own words, such as `Permission denied`."""
    return error.strerror or str(error)


def _more_room(place: Path | None) -> str | None:
    if place is None:
        return None
    return f"df -h {_quoted(place)}  # free some space, then run the same command again"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
