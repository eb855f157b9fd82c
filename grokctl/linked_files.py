"""Files that may lie behind links: judged by the very links, folders and file that were opened."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grokctl.own_files import ForeignFileError
from grokctl.ownership import MOST_LINKS, is_own

_LOOK: Final = getattr(os, "O_PATH", 0) | os.O_NOFOLLOW | os.O_CLOEXEC
"""To open a folder or a link only to look at it; systems but Linux need the right to read it."""

_Seen = tuple[Path, os.stat_result]
"""Where a folder, link or file was, and its status when it was opened."""


@dataclass(frozen=True, slots=True)
class LinkedFile:
    """An open file, and the way to it."""

    path: Path
    """Its own, behind all links."""
    handle: int
    """To read it."""
    status: os.stat_result
    links: tuple[_Seen, ...]
    """Below the release and on the way from there, in their order."""
    folders: tuple[_Seen, ...]
    """Those that contain the file, from the root of the machine down."""
    shared: frozenset[tuple[int, int]]
    """Device and inode of the release, and of the folders that contain it."""
    is_inside: bool
    """Whether the release contains the file itself."""

    @property
    def copy_mode(self) -> int:
        """The mode for a copy, so that nobody reads it who could not read the file.

        Folders that the file shares with the release do not count: the copy lies there, too, or
        its user has moved it on purpose. The umask limits it further.
        """
        mode = stat.S_IMODE(self.status.st_mode) & 0o666
        if self.is_inside:
            return mode | 0o600
        for _, folder in self.folders:
            if _identity(folder) not in self.shared and not folder.st_mode & stat.S_IXOTH:
                mode &= 0o660
        # a file of a group alone stays with its owner: the copy may belong to another group
        return 0o600 | (mode if mode & stat.S_IROTH else 0)

    def refuse_foreign_links(self) -> None:
        """Refuse what another user has linked to a file that others cannot read.

        Raises:
            ForeignFileError: A link belongs neither to this user nor to root nor to the owner of
                the file that it leads to, and others could not read that file themselves.
        """
        for path, link in self.links:
            is_theirs = not is_own(link) and link.st_uid != self.status.st_uid
            if is_theirs and not self.copy_mode & stat.S_IROTH:
                problem = "is another user's link to a file that others cannot read"
                raise ForeignFileError(problem, path)


@contextmanager
def opened_linked(path: Path, root: Path) -> Iterator[LinkedFile]:
    """Open a file of a release, which may be a link, to copy it.

    Each part of the way is opened by itself and never looked up again, so that what is judged is
    what is read, whatever others put in its place meanwhile.

    Args:
        path: The file, or the link.
        root: The release; the user named it, so links on the way to it are not judged.

    Raises:
        ForeignFileError: See `LinkedFile.refuse_foreign_links`; or it is no regular file.
        OSError: It cannot be read.
    """
    path.stat()  # mounts what is mounted on demand
    with ExitStack() as stack:
        way = _Way(stack)
        way.follow(root.absolute())
        shared = frozenset(_identity(folder) for _, folder in way.seen)
        release, way.links[:] = _identity(way.seen[-1][1]), []
        way.follow(path.relative_to(root), is_file=True)
        (place, status), folders = way.seen[-1], tuple(way.seen[:-1])
        if not stat.S_ISREG(status.st_mode):
            raise ForeignFileError("is not a regular file", place)
        file = LinkedFile(
            path=place,
            handle=way.read(place),
            status=status,
            links=tuple(way.links),
            folders=folders,
            shared=shared,
            is_inside=release in {_identity(folder) for _, folder in folders},
        )
        file.refuse_foreign_links()
        yield file


class _Way:
    """The folders from the root of the machine to a place, each of them open."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._handles: list[int] = []
        self.seen: list[_Seen] = []
        self.links: list[_Seen] = []
        self._restart()

    def follow(self, path: Path, *, is_file: bool = False) -> None:
        """Go on to a path, through links.

        Args:
            path: Absolute, or below the last folder.
            is_file: Whether its end may be something else than a folder.

        Raises:
            OSError: Something is missing, is no folder, or links form a loop.
        """
        rest, count = list(reversed(path.parts)), 0
        while rest:
            part = rest.pop()
            if part == "..":
                del self._handles[max(1, len(self._handles) - 1) :]
                del self.seen[max(1, len(self.seen) - 1) :]
            elif part.startswith("/"):
                self._restart()
            else:
                target = self._enter(part, is_last=is_file and not rest)
                count += target is not None
                if count > MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
                rest.extend(reversed(target.parts if target is not None else ()))

    def read(self, place: Path) -> int:
        """Open the file at the end to read it.

        Raises:
            ForeignFileError: Something else has its name by now.
            OSError: It cannot be read.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            handle = os.open(place.name, flags, dir_fd=self._handles[-2])
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(place)) from error
        self._stack.callback(os.close, handle)
        if not os.path.samestat(os.fstat(handle), self.seen[-1][1]):
            raise ForeignFileError("changed while it was read", place)
        return handle

    def _restart(self) -> None:
        handle = self._open("/", None)
        self._handles[:], self.seen[:] = [handle], [(Path("/"), os.fstat(handle))]

    def _enter(self, name: str, *, is_last: bool) -> Path | None:
        """Open what has a name in the last folder; the target if that is a link."""
        place = self.seen[-1][0] / name
        try:
            handle = self._open(name, self._handles[-1])
            status = os.fstat(handle)
            if stat.S_ISLNK(status.st_mode):
                self.links.append((place, status))
                return Path(os.readlink("", dir_fd=handle))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(place)) from error
        if not is_last and not stat.S_ISDIR(status.st_mode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
        self._handles.append(handle)
        self.seen.append((place, status))
        return None

    def _open(self, name: str, above: int | None) -> int:
        handle = os.open(name, _LOOK, dir_fd=above)
        self._stack.callback(os.close, handle)
        return handle


def refuse_foreign_links(path: Path, root: Path) -> None:
    """Refuse a file of a release, which is about to be copied, as `opened_linked` would.

    Raises:
        ForeignFileError: See there.
        OSError: It cannot be read.
    """
    with opened_linked(path, root):
        pass


def read_linked(path: Path, root: Path, *, most: int) -> tuple[bytes, int]:
    """Read a file of a release, which may be a link, to copy it.

    Args:
        path: The file, or the link.
        root: The release.
        most: Bytes that a file of its kind can have.

    Returns:
        Its bytes, and the mode for the copy.

    Raises:
        ForeignFileError: See `opened_linked`; or it has more bytes.
        OSError: It cannot be read.
    """
    with opened_linked(path, root) as file, open(file.handle, "rb", closefd=False) as reader:
        if (size := file.status.st_size) > most:
            raise ForeignFileError(f"expected at most {most:,} bytes, found {size:,}", file.path)
        return reader.read(size), file.copy_mode


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
