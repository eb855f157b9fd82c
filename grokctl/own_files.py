"""Files that this user alone has written: opened below a folder, and never through a link."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from grokctl.system import optional

FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE: Final = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class ForeignFileError(OSError):
    """A file is another user's, has a second name, or can be written by others."""

    def __init__(self, problem: str, path: Path) -> None:
        super().__init__(errno.EPERM, problem, str(path))


@contextmanager
def opened_folder(path: Path | str, *, above: int | None = None) -> Iterator[int]:
    """Open a folder; names below its descriptor stay in it, whatever gets its own name later.

    One that may only be written to is opened as well, but not to list or sync it.

    Args:
        path: The folder; a link is followed only if it has no folder `above`.
        above: Descriptor of the folder that contains it.

    Raises:
        OSError: It is no folder, or cannot be opened.
    """
    nofollow = os.O_NOFOLLOW if above is not None else 0
    try:
        handle = os.open(path, FOLDER | nofollow, dir_fd=above)
    except PermissionError:
        if not hasattr(os, "O_PATH"):  # Linux has it
            raise
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC | nofollow, dir_fd=above)
    try:
        yield handle
    finally:
        os.close(handle)


def open_below(stack: ExitStack, root: Path, names: tuple[str, ...], *, make: bool = False) -> int:
    """Open a folder below another without following links.

    Args:
        stack: Closes the descriptors.
        root: May be a link.
        names: Of the folders on the way.
        make: Whether to create those that are missing.

    Raises:
        OSError: One is missing, is a link, or cannot be read.
    """
    handle = stack.enter_context(opened_folder(root))
    for name in names:
        if make:
            with suppress(FileExistsError):
                os.mkdir(name, 0o777, dir_fd=handle)
        handle = stack.enter_context(opened_folder(name, above=handle))
    return handle


def folder_of(stack: ExitStack, root: Path, place: str) -> tuple[int, str]:
    """The open folder of a file below a root, through no link; and its name.

    Args:
        stack: Closes the descriptors.
        root: May be a link.
        place: Path of the file below it, `/`-separated.

    Raises:
        OSError: A folder is missing, is a link, or cannot be read.
    """
    *folders, name = place.split("/")
    return open_below(stack, root, tuple(folders)), name


def names_in(folder: int) -> list[str]:
    """The names in an open folder, in order."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries)


def why_not_own(status: os.stat_result) -> str | None:
    """The reason why a file or folder may not be this user's own work; None if it is.

    Args:
        status: Of the file or folder itself, not of a link's target.
    """
    if stat.S_ISLNK(status.st_mode):
        return "is a symbolic link"
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        return f"has {status.st_nlink} names (hard links)"
    return None


def open_own(name: str, folder: int, path: Path, *, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open a file of this user's own below a folder, or create it.

    Args:
        name: Of the file.
        folder: Descriptor of a folder that nobody else can write to.
        path: Of the file, for errors.
        flags: As for `os.open`.

    Raises:
        ForeignFileError: It may not be this user's own work.
        OSError: It is a link, or cannot be opened.
    """
    try:
        handle = os.open(name, flags | _FILE, 0o666, dir_fd=folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    status = os.fstat(handle)
    is_regular = stat.S_ISREG(status.st_mode)
    problem = why_not_own(status) if is_regular else "is not a regular file"
    if problem is None:
        return handle
    os.close(handle)
    raise ForeignFileError(problem, path)


def create(name: str, folder: int, mode: int = 0o666) -> int:
    """Create a file below a folder to write to; the umask limits its mode.

    Raises:
        FileExistsError: Something has the name, even a link to nothing.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    return os.open(name, flags | _FILE, mode, dir_fd=folder)


def open_to_others(folder: int) -> None:
    """Give an open folder the mode that the umask leaves to a new one."""
    umask = os.umask(0o077)
    os.umask(umask)
    inherited = os.fstat(folder).st_mode & stat.S_ISGID
    with optional():
        os.fchmod(folder, 0o777 & ~umask | inherited)
