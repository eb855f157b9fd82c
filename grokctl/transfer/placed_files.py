"""The files that libtorrent writes: made before it opens them, and looked at again at the end.

libtorrent follows links, and looks for none. A file that this user has created, in a folder that
nobody else can write to, stays the one that libtorrent opens; elsewhere, others can replace it,
and the fetch ends as soon as that is seen.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from grokctl.errors import FetchError
from grokctl.integrity.pieces import check_pieces
from grokctl.os_errors import refusal
from grokctl.own_files import create, folder_of, names_in, open_below
from grokctl.paths import PRIVATE, quoted
from grokctl.transfer.destination import FileSelection

_PARTS: Final = re.compile(r"\..*\.parts")
_Identity = tuple[int, int, int]
"""Device, inode, and the type: a link can get the inode of a file that was deleted."""


class PlacedFiles:
    """The wanted files of a download, each of them there."""

    def __init__(self, root: Path, selection: FileSelection) -> None:
        """Create the files that are missing.

        Args:
            root: The release.
            selection: The files to download.

        Raises:
            FetchError: A name leads elsewhere, or a file cannot be created.
        """
        self._root = root
        self._selection = selection
        self._files = {
            selection.places[file.index]: file
            for file in selection.metainfo.files
            if file.index in selection.wanted
        }
        self.is_doubtful = False
        """Whether bytes may have gone elsewhere."""
        self._made: list[Path] = []
        """Files and folders, in the order in which they were made."""
        self._open = ExitStack()
        self._folders: dict[str, int] = {}
        """Folders that libtorrent writes to, below the release, and their descriptors."""
        try:
            for place in self._files:
                self._create(place)
            self._identities = {place: self._identity(place) for place in self._files}
            with ExitStack() as stack:
                for folder in sorted({PRIVATE, *_folders_of(self._files)}):
                    names = Path(folder).parts
                    self._folders[folder] = open_below(stack, root, names, make=True)
                self._open = stack.pop_all()
        except OSError as error:
            raise refusal(error, root, kind=FetchError) from error

    def close(self) -> None:
        """Close the folders."""
        self._open.close()

    def check(self) -> None:
        """Look again: the bytes of a complete download are in its files.

        Raises:
            FetchError: A file was replaced meanwhile, or is short.
        """
        with self._doubting():
            self._check()

    def _check(self) -> None:
        for place in self.replaced():  # some file systems give a file another number
            if not self._is_proven(place):
                raise self._failure(place, "was replaced while it was fetched")
        for place, file in self._files.items():
            size = (self._root / place).stat().st_size
            if size < file.length:
                raise self._failure(place, f"expected {file.length:,} bytes, found {size:,}")
        self._identities = {place: self._identity(place) for place in self._files}
        self.watch()

    def watch(self, *, files: bool = False) -> None:
        """Look whether libtorrent still writes where the download began.

        Args:
            files: Whether to look at every file, too; one that became another file of one name is
                left to `check`.

        Raises:
            FetchError: A folder or a file was replaced, or a part file leads elsewhere.
        """
        with self._doubting():
            for folder, handle in self._folders.items():
                if not self._is_same(folder, handle):
                    raise self._failure(folder, "was replaced while it was fetched")
            for place in [*self._parts(), *(self.replaced() if files else [])]:
                if not self._is_plain(place):
                    raise self._failure(place, "was replaced while it was fetched")

    @contextmanager
    def _doubting(self) -> Iterator[None]:
        """Doubt what was written if a look ends with an error; Ctrl-C in it shows nothing."""
        try:
            yield
        except Exception:
            self.is_doubtful = True
            raise

    def _is_same(self, folder: str, handle: int) -> bool:
        """Whether the way to a folder still ends at the one that was opened."""
        try:
            with ExitStack() as stack:
                now = open_below(stack, self._root, Path(folder).parts)
                return os.path.samestat(os.fstat(now), os.fstat(handle))
        except OSError:
            return False

    def _parts(self) -> list[str]:
        """Files in which libtorrent keeps pieces of unwanted files."""
        with suppress(OSError):  # a folder that may not be listed
            names = names_in(self._folders[PRIVATE])
            return [f"{PRIVATE}/{name}" for name in names if _PARTS.fullmatch(name)]
        return []

    def _is_plain(self, place: str) -> bool:
        """Whether a place has a regular file without a second name, or nothing."""
        folder, _, name = place.rpartition("/")
        try:
            status = os.stat(name, dir_fd=self._folders[folder], follow_symlinks=False)
        except FileNotFoundError:
            return True
        return stat.S_ISREG(status.st_mode) and status.st_nlink == 1

    def replaced(self) -> list[str]:
        """The files that are not those of the beginning any more."""
        return [place for place, was in self._identities.items() if self._now(place) != was]

    def remove_empty(self) -> None:
        """Delete the files and folders that it made, and in which nothing has arrived."""
        for path in reversed(self._made):
            file = self._files.get(path.relative_to(self._root).as_posix())
            with suppress(OSError):
                if file is None:
                    path.rmdir()
                elif file.length and path.lstat().st_size == 0:
                    path.unlink()

    def _create(self, place: str) -> None:
        folders = place.split("/")[:-1]
        for depth in range(1, len(folders) + 1):
            folder = self._root.joinpath(*folders[:depth])
            if not folder.exists():
                self._made.append(folder)
                folder.mkdir()
        with ExitStack() as stack, suppress(FileExistsError):
            above, name = folder_of(stack, self._root, place)
            os.close(create(name, above))
            self._made.append(self._root / place)

    def _identity(self, place: str) -> _Identity:
        """Of a file itself; no folder on the way is a link."""
        with ExitStack() as stack:
            above, name = folder_of(stack, self._root, place)
            status = os.stat(name, dir_fd=above, follow_symlinks=False)
        return status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode)

    def _now(self, place: str) -> _Identity | None:
        try:
            return self._identity(place)
        except OSError:
            return None

    def _is_proven(self, place: str) -> bool:
        """Whether a regular file, behind no link, has the bytes of the torrent."""
        if self._now(place) is None or not stat.S_ISREG((self._root / place).lstat().st_mode):
            return False
        metainfo, places = self._selection.metainfo, self._selection.places
        pieces = list(metainfo.pieces_of(self._files[place]))
        checks = check_pieces(self._root, metainfo, places, pieces, jobs=1)
        return all(checked.is_good for checked in checks)

    def _failure(self, place: str, problem: str) -> FetchError:
        path = self._root / place
        hint = f"ls -ld {quoted(path.parent)}  # who can write there?"
        return FetchError(f"{path}: {problem}", hint)


def _folders_of(places: Iterable[str]) -> Iterator[str]:
    """The folders on the way to files, below the release; it is empty for the release itself."""
    yield ""
    for place in places:
        for folder in Path(place).parents[:-1]:
            yield folder.as_posix()
