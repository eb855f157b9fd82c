"""The hidden folder in which a reshard grows: opened once, and closed to all other users."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grokctl.events import Noted, Observer
from grokctl.marks import MARK, is_begun_here, is_marked, put_mark
from grokctl.own_files import (
    ForeignFileError,
    create,
    names_in,
    open_own,
    open_to_others,
    opened_folder,
    why_not_own,
)
from grokctl.ownership import can_be_written, is_own
from grokctl.resharding.replaced import FolderKind, delete_files, is_begun
from grokctl.system import optional

_MODE: Final = 0o700
"""While it grows; once it is published, the umask decides."""


@dataclass(frozen=True, slots=True)
class PartialFolder:
    """An open partial folder and the open folder that contains it."""

    path: Path
    handle: int
    above: int
    kind: FolderKind
    """What it becomes."""
    is_exposed: bool = False
    """Whether other users can give its name, and those beside it, to something else."""
    is_of_others: bool = False
    """Whether others, an archive or an earlier version may have written what was in it."""

    @property
    def name(self) -> str:
        """Its own name."""
        return self.path.name

    @property
    def is_empty(self) -> bool:
        """Whether nothing but its mark is in it."""
        return set(names_in(self.handle)) <= {MARK}

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        with os.scandir(self.handle) as entries:
            files = [entry for entry in entries if entry.name != MARK]
            return sum(entry.stat(follow_symlinks=False).st_size for entry in files)

    def open(self, name: str, flags: int = 0) -> int:
        """Open a file of this user's own in it, or create it.

        Args:
            name: Of the file.
            flags: In addition to those that read, write and create.

        Raises:
            OSError: It is a link, has several names, or belongs to another user.
        """
        flags |= os.O_RDWR | os.O_CREAT
        return open_own(name, self.handle, self.path / name, flags=flags)

    def write(self, name: str, data: bytes, mode: int = 0o666) -> None:
        """Write a whole file and wait until it is on disk; what had its name is removed."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.handle)
        with os.fdopen(create(name, self.handle, mode), "wb") as file:
            file.write(data)
            file.flush()
            with optional():
                os.fsync(file.fileno())

    def require_name(self, name: str) -> None:
        """Check that a name beside it is still, or has become, its own.

        Raises:
            ForeignFileError: Another user has put something else there.
        """
        status = os.stat(name, dir_fd=self.above, follow_symlinks=False)
        if not os.path.samestat(status, os.fstat(self.handle)):
            place = self.path.with_name(name)
            raise ForeignFileError("was replaced by somebody while it was written", place)

    def delete(self) -> None:
        """Delete its files, whatever has its name by now; and the folder, if that is empty then."""
        names = names_in(self.handle)
        delete_files(self.handle, (name for name in names if name != MARK), self.kind)
        if self.is_empty:
            delete_files(self.handle, [MARK], self.kind)
            with suppress(OSError):  # of something else, or not empty any more
                self.require_name(self.name)
                os.rmdir(self.name, dir_fd=self.above)

    def open_to_others(self) -> None:
        """Give it the mode that the umask leaves to a new folder."""
        open_to_others(self.handle)


@contextmanager
def opened_partial(path: Path, kind: FolderKind, observe: Observer) -> Iterator[PartialFolder]:
    """Open the partial folder of an earlier run, or make one.

    One that others could have made or changed is not continued: its bytes would be published as
    this user's. Nor is one without the mark of grokctl: others can rename what is this user's own.
    Then another one is made, with a name that nobody can guess.

    Args:
        path: The usual name.
        kind: What it becomes.
        observe: Receives a note for each folder that is not continued.

    Raises:
        OSError: It cannot be made.
    """
    with suppress(FileExistsError):  # a file: it cannot be opened as a folder
        path.parent.mkdir(parents=True, exist_ok=True)
    with opened_folder(path.parent) as above:
        is_exposed = _is_exposed(path.parent, above)
        for place in _candidates(path, above, is_exposed=is_exposed):
            with ExitStack() as stack:
                handle = _opened(stack, place, above, kind, observe)
                if handle is None:
                    continue
                with optional():
                    os.fchmod(handle, os.fstat(handle).st_mode & ~0o077)
                is_of_others = set(names_in(handle)) > {MARK} and not is_begun_here(
                    handle, place.name
                )
                yield PartialFolder(place, handle, above, kind, is_exposed, is_of_others)
                return


def _is_exposed(parent: Path, above: int) -> bool:
    """Whether others can rename what is in a folder: it is theirs, or open and not sticky."""
    status = os.fstat(above)
    is_sticky = bool(status.st_mode & stat.S_ISVTX)
    return not is_own(status) or (not is_sticky and can_be_written(parent, status) is not None)


def _candidates(path: Path, above: int, *, is_exposed: bool) -> Iterator[Path]:
    """The usual name, those of earlier runs that could not use it, and new ones without end.

    Where others could have given the usual name to a folder of this user's, a new one has another.
    """
    stem = path.name.removesuffix(".partial")
    names = names_in(above)
    if path.name in names or not is_exposed:
        yield path
    for name in names:
        if name.startswith(f"{stem}.") and name.endswith(".partial") and name != path.name:
            yield path.with_name(name)
    while True:
        yield path.with_name(f"{stem}.{secrets.token_hex(8)}.partial")


def _opened(
    stack: ExitStack, place: Path, above: int, kind: FolderKind, observe: Observer
) -> int | None:
    """Open a partial folder, or make it; None if it is not this user's and grokctl's work.

    Raises:
        ForeignFileError: One that was just made is not.
    """
    handle, is_new = None, False
    with suppress(FileExistsError):
        os.mkdir(place.name, _MODE, dir_fd=above)
        is_new = True
    problem = _problem(os.stat(place.name, dir_fd=above, follow_symlinks=False), place)
    if problem is None:
        handle = stack.enter_context(opened_folder(place.name, above=above))
        problem = _problem(os.fstat(handle), place) or _unmarked(handle, place.name, kind)
    if problem is not None and is_new:  # so would be the next
        raise ForeignFileError(problem, place)
    if problem is not None:
        observe(Noted(message=f"{place}: {problem}, so it is not continued"))
        return None
    return handle


def _problem(status: os.stat_result, place: Path) -> str | None:
    if not stat.S_ISDIR(status.st_mode):
        return "is no folder"
    return why_not_own(status) or can_be_written(place, status)


def _unmarked(handle: int, name: str, kind: FolderKind) -> str | None:
    """Words for a folder that grokctl may not have made; one that it has made gets its mark."""
    if is_marked(handle, name):
        return None
    names = names_in(handle)
    is_copy = is_marked(handle, name, is_copy=True)  # as `cp -a` makes one
    if is_copy:
        names.remove(MARK)
    if names and not is_begun(names, kind, is_copy=is_copy):
        return "has files, and no mark of grokctl"
    delete_files(handle, [MARK], kind)
    with suppress(FileExistsError):  # of another run, at this moment
        put_mark(handle, name, is_new=not names)
    return None
