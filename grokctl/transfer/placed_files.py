"""The files that libtorrent writes: made before it opens them, and looked at again at the end.

libtorrent follows links, and looks for none. A file that this user has created, in a folder that
nobody else can write to, stays the one that libtorrent opens; elsewhere, others can replace it.
"""

import os
import stat
from contextlib import ExitStack, suppress
from pathlib import Path

from grokctl.errors import FetchError
from grokctl.events import Noted, Observer
from grokctl.integrity.pieces import check_pieces
from grokctl.os_errors import refusal
from grokctl.own_files import create, open_below
from grokctl.ownership import why_exposed
from grokctl.paths import quoted
from grokctl.transfer.destination import FileSelection

_Identity = tuple[int, int]
"""Device and inode."""


class PlacedFiles:
    """The wanted files of a download, each of them there."""

    def __init__(self, root: Path, selection: FileSelection, observe: Observer) -> None:
        """Create the files that are missing.

        Args:
            root: The release.
            selection: The files to download.
            observe: Receives a note if others can replace the files.

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
        problem = why_exposed(root)
        if problem is not None:
            message = "other users can replace what is fetched, while it arrives and afterwards"
            observe(Noted(message=f"{problem}: {message}"))
        try:
            for place in self._files:
                self._create(place)
            self._identities = {place: self._identity(place) for place in self._files}
        except OSError as error:
            raise refusal(error, root, kind=FetchError) from error

    def check(self) -> None:
        """Look again: the bytes of a complete download are in its files.

        Raises:
            FetchError: A file was replaced meanwhile, or is short.
        """
        self.is_doubtful = True
        for place in self.replaced():  # some file systems give a file another number
            if not self._is_proven(place):
                raise self._failure(place, "was replaced while it was fetched")
        for place, file in self._files.items():
            size = (self._root / place).stat().st_size
            if size < file.length:
                raise self._failure(place, f"expected {file.length:,} bytes, found {size:,}")
        self._identities = {place: self._identity(place) for place in self._files}
        self.is_doubtful = False

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
        *folders, name = place.split("/")
        for depth in range(1, len(folders) + 1):
            folder = self._root.joinpath(*folders[:depth])
            if not folder.exists():
                self._made.append(folder)
                folder.mkdir()
        with ExitStack() as stack, suppress(FileExistsError):
            os.close(create(name, open_below(stack, self._root, tuple(folders))))
            self._made.append(self._root / place)

    def _identity(self, place: str) -> _Identity:
        """Of a file itself; no folder on the way is a link."""
        *folders, name = place.split("/")
        with ExitStack() as stack:
            above = open_below(stack, self._root, tuple(folders))
            status = os.stat(name, dir_fd=above, follow_symlinks=False)
        return status.st_dev, status.st_ino

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
