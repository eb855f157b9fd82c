"""Outputs that the user named: where they go, and how a regular file is replaced by another."""

import errno
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from grokctl.errors import invalid
from grokctl.ownership import can_be_written, is_own, links_on
from grokctl.paths import CKPT, create_beside, kind_of
from grokctl.system import optional


def find_output(path: Path, name: str, example: str) -> tuple[Path, bool]:
    """Where an output that the user named goes: links are followed, devices are kept.

    Args:
        path: As the user typed it.
        name: The field of the library, for errors.
        example: A path for the hint.

    Returns:
        The path at the end of all links, and whether a regular file is or will be there, which
        can be replaced by another. If not, the output must be written into what is there.

    Raises:
        InvalidValueError: It is a folder, a terminal, a block device, a socket, or our own stdout;
            or a link or a pipe that another user may have planted.
        OSError: The links form a loop, or the machine refuses to look at them.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        status = None
    whole = path.absolute()
    if any(_is_planted(link, own, is_named=link == whole) for link, own in links_on(path)):
        raise invalid(name, path, "is another user's link, expected a file", f"--{name} {example}")
    if status is None:
        return Path(os.path.realpath(path)), True
    if problem := _unfit(path, status):
        raise invalid(name, path, problem, f"--{name} {example}")
    is_regular = stat.S_ISREG(status.st_mode)
    if not is_regular and _is_planted(Path(os.path.realpath(path)), status, is_named=True):
        problem = "is another user's pipe or device, expected a file"
        raise invalid(name, path, problem, f"--{name} {example}")
    return Path(os.path.realpath(path)) if is_regular else path, is_regular


def _unfit(path: Path, status: os.stat_result) -> str | None:
    """The reason why nothing can be written into what has the name of an output."""
    mode = status.st_mode
    if stat.S_ISDIR(mode) or not path.name:
        return "is a folder, expected a file"
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        return "is a disk or a socket, expected a file"
    if stat.S_ISCHR(mode):
        return "is a terminal, expected a file" if _is_terminal(path) else None
    folder = Path(os.path.realpath(path)).parent
    if stat.S_ISREG(mode) and (folder.name == CKPT or kind_of(folder) is not None):
        return "is a file of a checkpoint, expected another file"
    for number, stream in ((1, "stdout"), (2, "stderr")):
        with suppress(OSError):  # it is closed
            if os.path.samestat(status, os.fstat(number)):
                return f"is {stream} of this command, expected another file"
    return None


def _is_planted(link: Path, status: os.stat_result, *, is_named: bool) -> bool:
    """Whether a link or a pipe is another user's, who may have put it where an output is expected.

    Args:
        link: On the way to the output, or the pipe.
        status: Of the link itself.
        is_named: Whether the output itself is the link; a link on the way to it, in a folder that
            belongs to who made the link, is a part of how the machine is set up.
    """
    if is_own(status):
        return False
    folder = link.parent.stat()
    return can_be_written(link.parent, folder) is not None or (is_named and not is_own(folder))


def _is_terminal(path: Path) -> bool:
    handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        return os.isatty(handle)
    finally:
        os.close(handle)


def create_output(place: Path) -> tuple[int, Path]:
    """Create a hidden file for a new output; those who cannot read the old one cannot read it.

    Args:
        place: A regular file, or nothing yet.

    Returns:
        A descriptor to write to, and the path for `replace_output`.
    """
    try:
        old = place.lstat()
    except FileNotFoundError:
        return create_beside(place)
    handle, temporary = create_beside(place, 0o600)
    try:
        own = os.fstat(handle)
        mode = stat.S_IMODE(old.st_mode) & 0o777
        # of another group, it would be read by others than before
        mode &= 0o777 if own.st_gid == old.st_gid else 0o707
        with optional(errno.EPERM):
            os.fchmod(handle, mode | 0o600)
    except BaseException:
        os.close(handle)
        temporary.unlink()
        raise
    return handle, temporary


def replace_output(temporary: Path, place: Path) -> None:
    """Give a finished file the name of an output; into a mounted file, copy it."""
    try:
        temporary.replace(place)
    except OSError as error:
        if error.errno != errno.EBUSY:  # a container mounts single files
            raise
        shutil.copyfile(temporary, place)
        temporary.unlink()
