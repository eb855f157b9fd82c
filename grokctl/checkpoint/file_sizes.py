"""Whether a file has its expected size, as damage: missing, short or long."""

import stat
from pathlib import Path

from grokctl.errors import Damage, Reason
from grokctl.os_errors import is_absence
from grokctl.text import format_exact


def regular_size(path: Path) -> int | None:
    """The size of a file; None if there is no regular file.

    Raises:
        OSError: The machine refuses to look at it.
    """
    try:
        status = path.stat()
    except OSError as error:
        if not is_absence(error):
            raise
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def size_damage(name: str, *, expected: int, size: int | None) -> Damage | None:
    """Compare the size of a file with the expected one.

    Args:
        name: Path of the file in the checkpoint, `/`-separated.
        expected: Bytes that it should have.
        size: Bytes that it has; None if it is missing.
    """
    if size is None:
        return Damage(name, Reason.MISSING, f"expected {format_exact(expected)}", _whole(expected))
    detail = f"expected {format_exact(expected)}, found {size:,}"
    if not size:
        detail = f"is empty, expected {format_exact(expected)}"
    if size < expected:
        return Damage(name, Reason.SHORT, detail, ((size, expected),))
    if size > expected:
        return Damage(name, Reason.LONG, detail, ((expected, size),))
    return None


def file_damage(root: Path, name: str, *, expected: int, size: int | None) -> Damage | None:
    """The same, where a folder, a pipe or a dangling link may have the name.

    Args:
        root: The checkpoint.
        name: Path of the file below it.
        expected: Bytes that it should have.
        size: Bytes that it has; None if there is no regular file.
    """
    path = root / name
    if size is None and (path.exists() or path.is_symlink()):
        return Damage(name, Reason.UNREADABLE, "is not a regular file", _whole(expected))
    return size_damage(name, expected=expected, size=size)


def _whole(nbytes: int) -> tuple[tuple[int, int], ...]:
    return ((0, nbytes),) if nbytes else ()
