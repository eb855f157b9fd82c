"""What the operating system refused, as an error that users understand.

A file that cannot be read is not damaged. `refusal` is the error for the machine: of the caller's
kind, or about a full disk or a file over its limit (12), or failing hardware (40). `is_absence`
tells what is damage: a file that is missing, or ends early.
"""

import errno
import os
import resource
import shlex
from pathlib import Path
from typing import Final

from grokctl.errors import DiskFullError, GrokctlError, HardwareError, UsageError

_ENOUGH: Final = 4096
"""Open files that every command can do with."""
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_BROKEN: Final = frozenset(
    getattr(errno, name)
    for name in ("EIO", "EBADMSG", "EUCLEAN", "EREMOTEIO")
    if hasattr(errno, name)  # some are Linux's own
)
"""A disk, or the file system on it, fails."""
_ABSENT: Final = frozenset({errno.ENOENT, errno.ENOTDIR})


class NotAFileError(OSError):
    """A folder, a pipe or a device has the name of a file."""

    def __init__(self, path: Path) -> None:
        super().__init__(errno.EINVAL, "is not a regular file", str(path))


class TooLargeError(OSError):
    """A file has more bytes than anything of its kind."""

    def __init__(self, path: Path, *, most: int, found: int) -> None:
        reason = f"expected at most {most:,} bytes, found {found:,}"
        super().__init__(errno.EFBIG, reason, str(path))


class StdoutError(OSError):
    """Our results cannot be written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.errno, reason_of(error))


def refusal(
    error: OSError,
    folder: Path | None = None,
    *,
    kind: type[GrokctlError] = UsageError,
    hint: str | None = None,
) -> GrokctlError:
    """Translate an `OSError`, the same way for every command.

    A full disk, an exhausted quota and a file over `ulimit -f` are a `DiskFullError`, and a failing
    disk a `HardwareError`, whatever was being done; everything else is of the caller's kind.

    Args:
        error: As Python raised it.
        folder: Where it happened, named when the error names no file or only a part of its path.
        kind: The class of the error, unless the disk is full.
        hint: Advice, unless the disk is full; by default, to look at the file.
    """
    name = error.filename
    file = Path(os.fsdecode(name)) if isinstance(name, str | bytes | Path) else None
    place = file or folder
    noun = "stdout" if isinstance(error, StdoutError) else "this machine"
    where = f"{place or noun}"
    if file is not None and folder is not None and not file.is_absolute():
        place, where = folder, f"{folder}: {file}"
    message = f"{where}: {reason_of(error)}"
    if error.errno in _FULL:
        return DiskFullError(message, _more_room(folder or place))
    if _is_over_file_limit(error):
        return DiskFullError(message, "ulimit -f unlimited")
    if error.errno in _BROKEN:
        return HardwareError(message, "dmesg | tail  # what the kernel says about the disk")
    if error.errno == errno.EMFILE:
        return kind(message, f"ulimit -n {_ENOUGH}  # then run the same command again")
    return kind(message, hint or (None if place is None else f"ls -ld {_quoted(place)}"))


def reason_of(error: OSError) -> str:
    """The system's own words, such as `Permission denied`."""
    if error.errno == errno.EMFILE:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"{error.strerror}: this process may have {limit} (ulimit -n)"
    if _is_over_file_limit(error):
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        return f"{error.strerror}: this process may write files of {limit:,} bytes (ulimit -f)"
    return error.strerror or str(error)


def _is_over_file_limit(error: OSError) -> bool:
    """Whether a file would have become larger than this process may write."""
    if error.errno != errno.EFBIG or isinstance(error, TooLargeError):
        return False
    return resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY


def is_absence(error: OSError) -> bool:
    """Whether a file could be looked at, and is missing, too short, or no file.

    Every other error says nothing about the file: it is the machine that refuses.
    """
    return error.errno is None or error.errno in _ABSENT or isinstance(error, NotAFileError)


def located(error: OSError, path: Path) -> OSError:
    """The same error with the path of the file, which errors of a descriptor do not have."""
    if error.filename is not None or error.errno is None:
        return error
    return OSError(error.errno, error.strerror or os.strerror(error.errno), str(path))


def _more_room(place: Path | None) -> str | None:
    if place is None:
        return None
    return f"df -h {_quoted(place)}  # free some space, then run the same command again"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
