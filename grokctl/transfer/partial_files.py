"""Take over what other programs began to download, such as `tensor00000_000.!qB`."""

import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Final

from grokctl.checkpoint.folders import partial_files
from grokctl.events import Noted, Observer
from grokctl.integrity.pieces import check_pieces
from grokctl.paths import quoted
from grokctl.system import usable_cores
from grokctl.transfer.destination import FileSelection

_MOST_JOBS: Final = 8
_MOST_COMBINATIONS: Final = 64
"""Tries for a piece in which several files meet, each with several forms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialFiles:
    """The files of other programs beside missing ones, and what they prove."""

    used: Mapping[int, Path]
    """File index -> the file of which a piece is proven."""
    proven: frozenset[int]
    """Pieces that need these files."""
    unused: tuple[Path, ...]

    def selection(self, root: Path, selection: FileSelection) -> FileSelection:
        """The selection with the files where they are now."""
        places = {index: str(path.relative_to(root)) for index, path in self.used.items()}
        return replace(selection, places={**selection.places, **places})


def candidates(root: Path, selection: FileSelection) -> dict[int, tuple[Path, ...]]:
    """File index -> files of other programs that may be it, if nothing is in its own place."""
    found = {}
    for index in sorted(selection.wanted):
        place = selection.places[index]
        if not _is_empty(root / place):
            continue
        beside = tuple(path for path in partial_files(root, place) if not path.is_symlink())
        if beside:
            found[index] = beside
    return found


def find_partial(root: Path, selection: FileSelection) -> PartialFiles:
    """Find the files of other programs of which a piece is proven; changes nothing.

    A piece may begin in one file and end in another: each is looked for in all of them at once,
    under its own name or that of the other program.

    Args:
        root: The release.
        selection: The files to download.

    Raises:
        OSError: The machine refuses to read a file.
    """
    search = _Search(root, selection, candidates(root, selection))
    search.run()
    places = [selection.places[index] for index in selection.wanted]
    every = {path for place in places for path in partial_files(root, place)}
    unused = tuple(sorted(every - set(search.used.values())))
    return PartialFiles(used=search.used, proven=frozenset(search.proven), unused=unused)


class _Search:
    """The search for the files of which a piece is proven."""

    def __init__(
        self, root: Path, selection: FileSelection, found: Mapping[int, tuple[Path, ...]]
    ) -> None:
        self.root = root
        self.selection = selection
        self.found = found
        self.used: dict[int, Path] = {}
        self.proven: set[int] = set()

    def run(self) -> None:
        """Look at every piece; those of files with several forms are hashed once for each form."""
        metainfo = self.selection.metainfo
        files = {file.index: file for file in metainfo.files}
        most = max(map(len, self.found.values()), default=0)
        for turn in range(most):
            forms = {
                index: self.used.get(index, paths[min(turn, len(paths) - 1)])
                for index, paths in self.found.items()
            }
            tried = (index for index in forms if not turn or len(self.found[index]) > 1)
            self._try({p for index in tried for p in metainfo.pieces_of(files[index])}, forms)
        several = {index for index, paths in self.found.items() if len(paths) > 1}
        for piece in {p for index in several for p in metainfo.pieces_of(files[index])}:
            self._try_combinations(piece, several)

    def _try_combinations(self, piece: int, several: set[int]) -> None:
        """Look at a piece in which several files meet that have several forms."""
        forms: dict[int, list[Path]] = {}
        for file, offset, length in self.selection.metainfo.spans(piece):
            if file.index in self.found:
                used = self.used.get(file.index)
                known = self.found[file.index] if used is None else (used,)
                forms[file.index] = [f for f in known if f.stat().st_size >= offset + length]
        if len(several.intersection(forms)) < 2:  # noqa: PLR2004 (every form was tried)
            return
        for combination in islice(product(*forms.values()), _MOST_COMBINATIONS):
            if piece not in self.proven:
                self._try({piece}, dict(zip(forms, combination, strict=True)))

    def _try(self, pieces: set[int], forms: Mapping[int, Path]) -> None:
        metainfo, places = self.selection.metainfo, dict(self.selection.places)
        places |= {index: str(path.relative_to(self.root)) for index, path in forms.items()}
        jobs = min(usable_cores(), _MOST_JOBS)
        left = sorted(pieces - self.proven)
        for checked in check_pieces(self.root, metainfo, places, left, jobs=jobs):
            if checked.is_good:
                self.proven.add(checked.piece)
                met = (file.index for file, *_ in metainfo.spans(checked.piece))
                self.used |= {index: forms[index] for index in met if index in forms}


def adopt_partial(root: Path, selection: FileSelection, observe: Observer) -> frozenset[int]:
    """Give the files of other programs their final names, and return the pieces that they prove.

    A file of theirs beside a missing one gets its final name if a piece of it is proven. All
    others are named in a note, and stay.

    Raises:
        OSError: The machine refuses to read or rename a file.
    """
    partial = find_partial(root, selection)
    files = {file.index: file for file in selection.metainfo.files}
    for index, path in sorted(partial.used.items()):
        path.rename(root / selection.places[index])
        good = len(partial.proven.intersection(selection.metainfo.pieces_of(files[index])))
        count = "1 piece fits" if good == 1 else f"{good:,} pieces fit"
        observe(Noted(message=f"{path.name}: taken over, {count}"))
    for path in partial.unused:
        message = f"{path}: left by another program, not used; to delete it: rm"
        observe(Noted(message=f"{message} {quoted(path)}"))
    return partial.proven


def _is_empty(path: Path) -> bool:
    """Whether there is nothing at a path, or a file in which nothing has arrived."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return True
    return stat.S_ISREG(status.st_mode) and status.st_size == 0
