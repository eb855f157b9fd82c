"""The hidden folder in which a reshard grows: opened once, and closed to all other users."""

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grokctl.events import Noted, Observer
from grokctl.own_files import (
    ForeignFileError,
    create,
    names_in,
    open_own,
    opened_folder,
    why_not_own,
)
from grokctl.ownership import can_be_written
from grokctl.system import optional

JOURNAL: Final = "journal"
_MODE: Final = 0o700
"""While it grows; once it is published, the umask decides."""


@dataclass(frozen=True, slots=True)
class PartialFolder:
    """An open partial folder and the open folder that contains it."""

    path: Path
    handle: int
    above: int

    @property
    def name(self) -> str:
        """Its own name."""
        return self.path.name

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        with os.scandir(self.handle) as entries:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)

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
        """Delete it and all that is in it."""
        self.require_name(self.name)
        shutil.rmtree(self.name, dir_fd=self.above)

    def open_to_others(self) -> None:
        """Give it the mode that the umask leaves to a new folder."""
        umask = os.umask(0o077)
        os.umask(umask)
        inherited = os.fstat(self.handle).st_mode & stat.S_ISGID
        with optional():
            os.fchmod(self.handle, 0o777 & ~umask | inherited)


@contextmanager
def opened_partial(path: Path, observe: Observer) -> Iterator[PartialFolder]:
    """Open the partial folder of an earlier run, or make one.

    One that others could have made or changed is not continued: its bytes would be published as
    this user's. Then another one is made, with a name that nobody can guess.

    Args:
        path: The usual name.
        observe: Receives a note for each folder that is not continued.

    Raises:
        OSError: It cannot be made.
    """
    with suppress(FileExistsError):  # a file: it cannot be opened as a folder
        path.parent.mkdir(parents=True, exist_ok=True)
    with opened_folder(path.parent) as above:
        for place in _candidates(path, above):
            if not _is_usable(place, above, observe):
                continue
            with opened_folder(place.name, above=above) as handle:
                problem = _problem(os.fstat(handle), place)  # of what was opened
                if problem is not None:
                    raise ForeignFileError(problem, place)
                with optional():
                    os.fchmod(handle, os.fstat(handle).st_mode & ~0o077)
                yield PartialFolder(place, handle, above)
                return


def _candidates(path: Path, above: int) -> Iterator[Path]:
    """The usual name, those of earlier runs that could not use it, and new ones without end."""
    stem = path.name.removesuffix(".partial")
    yield path
    for name in names_in(above):
        if name.startswith(f"{stem}.") and name.endswith(".partial") and name != path.name:
            yield path.with_name(name)
    while True:
        yield path.with_name(f"{stem}.{secrets.token_hex(8)}.partial")


def _is_usable(place: Path, above: int, observe: Observer) -> bool:
    """Whether a name is a folder of this user's own; a new folder is made if there is none."""
    with suppress(FileExistsError):
        os.mkdir(place.name, _MODE, dir_fd=above)
        return True
    problem = _problem(os.stat(place.name, dir_fd=above, follow_symlinks=False), place)
    if problem is not None:
        observe(Noted(message=f"{place}: {problem}, so it is not continued"))
    return problem is None


def _problem(status: os.stat_result, place: Path) -> str | None:
    if not stat.S_ISDIR(status.st_mode):
        return "is no folder"
    return why_not_own(status) or can_be_written(place, status)
