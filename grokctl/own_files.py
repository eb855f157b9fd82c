"""Files that this user alone has written: opened below a folder, and never through a link."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE: Final = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_MOST_LINKS: Final = 40
"""Links that are followed in one path, as by the kernel."""


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


def links_on(path: Path) -> Iterator[Path]:
    """Every symbolic link on the way to the end of a path, in the order of the kernel.

    Raises:
        OSError: They form a loop, or cannot be looked at.
    """
    rest = list(reversed(path.absolute().parts))
    place = Path(rest.pop())
    count = 0
    while rest:
        part = rest.pop()
        if part == "..":
            place = place.parent
            continue
        place /= part
        if not place.is_symlink():
            continue
        count += 1
        if count > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        yield place
        target = place.readlink()
        rest.extend(reversed(target.parts))
        place = place.parent if not target.is_absolute() else Path(rest.pop())


def refuse_foreign_links(path: Path, root: Path) -> None:
    """Refuse a file below a folder that another user has linked to what only this user may read.

    Args:
        path: The file, which is about to be copied.
        root: The folder; the user named it, so links on the way to it are fine.

    Raises:
        ForeignFileError: A link belongs neither to this user nor to root nor to the owner of the
            file that it leads to, and others could not read that file themselves.
    """
    own = {0, os.geteuid()}
    status = path.stat()
    for link in links_on(root.resolve() / path.relative_to(root)):
        owner = link.lstat().st_uid
        if owner in own or owner == status.st_uid:
            continue
        if not copy_mode(path, Path("/")) & stat.S_IROTH:
            raise ForeignFileError("is another user's link to a file that others cannot read", link)


def read_linked(path: Path, root: Path, *, most: int) -> tuple[bytes, int]:
    """Read a file of a release, which may be a link, to copy it.

    Args:
        path: The file, or the link.
        root: The release.
        most: Bytes that a file of its kind can have.

    Returns:
        Its bytes, and the mode of `copy_mode`.

    Raises:
        ForeignFileError: See `refuse_foreign_links`; or a link changed meanwhile.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        refuse_foreign_links(path, root)
        mode = copy_mode(path, root)
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise ForeignFileError("changed while it was read", path)
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise ForeignFileError(f"expected at most {most:,} bytes, found {size:,}", path)
        return file.read(size), mode


def copy_mode(path: Path, root: Path) -> int:
    """The mode for a copy of a file, so that nobody reads the copy who could not read the file.

    Folders that the file shares with `root` do not count: the copy lies there, too, or its user
    has moved it on purpose.

    Args:
        path: A file; links are followed.
        root: The folder of the release that contains the file or a link to it.

    Returns:
        Rights to read and write, which the umask limits further.
    """
    whole, within = path.resolve(), root.resolve()
    mode = stat.S_IMODE(whole.stat().st_mode) & 0o666
    if whole.is_relative_to(within):
        return mode | 0o600
    for folder in whole.parents:
        if within.is_relative_to(folder):
            break
        if not folder.stat().st_mode & stat.S_IXOTH:
            mode &= 0o660
    # a file of a group alone stays with its owner, because the copy may belong to another group
    return 0o600 | (mode if mode & stat.S_IROTH else 0)
