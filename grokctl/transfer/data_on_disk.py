"""Find the pieces of a download that are on disk already: claimed by resume data, or hashed."""

import mmap
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from grokctl.checkpoint.file_sizes import regular_size
from grokctl.checkpoint.folders import partial_files
from grokctl.checkpoint.release_files import EXTRA, names_of
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started
from grokctl.integrity.pieces import check_pieces
from grokctl.os_errors import is_absence
from grokctl.own_files import create, open_below
from grokctl.paths import quoted
from grokctl.system import is_unsupported, usable_cores
from grokctl.text import format_number
from grokctl.transfer.destination import FileSelection, forget_resume_data, take_resume_data
from grokctl.transfer.resume_data import read_claims
from grokctl.transfer.swarm_types import Claims

_MOST_JOBS: Final = 8
_MOST_SHOWN: Final = 5
"""Names in a note."""
_PAGE: Final = max(mmap.PAGESIZE, 4096)
"""Holes in files consist of file system blocks, which are pages nearly everywhere."""


def find_claims(
    root: Path,
    selection: FileSelection,
    have: frozenset[int] | None,
    observe: Observer,
    *,
    follows: bool = False,
) -> Claims:
    """Find the pieces that need not be downloaded.

    Claims of resume data are believed if they can be true. Any other data, left by a killed fetch
    or copied there, is hashed: nothing is downloaded twice.

    Args:
        root: The release.
        selection: The files to download.
        have: Pieces that were proven just now; then nothing is hashed, and no claim is believed.
        observe: Receives verify in bytes.
        follows: Whether files may be links.

    Raises:
        OSError: The machine refuses to read what is there.
    """
    sizes = {index: _size(root / place) for index, place in selection.places.items()}
    resume, is_final = take_resume_data(root)
    claims = read_claims(resume, selection.metainfo, sizes)
    if have is not None:
        forget_resume_data(root)
        return Claims(have=have, uploaded=claims.uploaded)
    if not is_final:
        # a later block may have replaced one of an incomplete piece
        claims = Claims(have=claims.have, uploaded=claims.uploaded)
    unclaimed = [piece for piece in selection.pieces if piece not in claims.have]
    proven = claims.have | proven_on_disk(root, selection, unclaimed, observe, follows=follows)
    unfinished = {p: blocks for p, blocks in claims.unfinished.items() if p not in proven}
    return Claims(have=proven, unfinished=unfinished, uploaded=claims.uploaded)


def proven_on_disk(
    root: Path,
    selection: FileSelection,
    pieces: list[int],
    observe: Observer,
    *,
    follows: bool = False,
) -> frozenset[int]:
    """The pieces that have the promised hashes.

    Raises:
        OSError: The machine refuses to read what is there.
    """
    pieces = _with_data(root, selection, pieces, follows=follows)
    if not pieces:
        return frozenset()
    metainfo, proven, done = selection.metainfo, set(), 0
    observe(Started(stage=Stage.VERIFY, total=sum(map(metainfo.piece_size, pieces))))
    jobs = min(usable_cores(), _MOST_JOBS)
    for checked in check_pieces(root, metainfo, selection.places, pieces, jobs=jobs):
        done += checked.nbytes
        if checked.is_good:
            proven.add(checked.piece)
        observe(Advanced(stage=Stage.VERIFY, done=done, detail="checking data on disk"))
    observe(Finished(stage=Stage.VERIFY))
    return frozenset(proven)


def adopt_partial(root: Path, selection: FileSelection, observe: Observer) -> frozenset[int]:
    """Take over what other programs began to download, and return the pieces that it proves.

    A file of theirs beside a missing one, such as `tensor00000_000.!qB`, gets its final name if a
    piece of it is proven. All others are named in a note, and stay.

    Raises:
        OSError: The machine refuses to read or rename a file.
    """
    metainfo, found = selection.metainfo, set()
    for file in metainfo.files:
        place = selection.places.get(file.index)
        if place is None or file.index not in selection.wanted:
            continue
        for beside in partial_files(root / place):
            if _is_empty(root / place):
                places = {**selection.places, file.index: str(beside.relative_to(root))}
                pieces = list(metainfo.pieces_of(file))
                checks = check_pieces(root, metainfo, places, pieces, jobs=1)
                good = {checked.piece for checked in checks if checked.is_good}
                if good:
                    beside.rename(root / place)
                    found |= good
                    fit = "1 piece fits" if len(good) == 1 else f"{len(good):,} pieces fit"
                    observe(Noted(message=f"{beside.name}: taken over, {fit}"))
                    continue
            message = f"{beside}: left by another program, not used; to delete it: rm"
            observe(Noted(message=f"{message} {quoted(beside)}"))
    return frozenset(found)


def number_extras(root: Path, selection: FileSelection, observe: Observer) -> None:
    """Before the first fetch of files that a program might run or obey: give each its number.

    One that is there under its own name, from an earlier version, is copied and stays.

    Args:
        root: The release.
        selection: The files to download.
        observe: Receives a note with their names.

    Raises:
        OSError: A file cannot be read or written.
    """
    names, shown = names_of(selection.metainfo, selection.places), []
    for file in selection.metainfo.files:
        place, name = selection.places.get(file.index), names.get(file.index)
        if place is None or name is None or place == name or os.path.lexists(root / place):
            continue
        shown.append(name)
        path = root / name
        if path.is_symlink() or regular_size(path) != file.length:
            continue
        with ExitStack() as stack:
            folder = open_below(stack, root, tuple(EXTRA.split("/")), make=True)
            with os.fdopen(create(str(file.index), folder), "wb") as copy:
                copy.write(path.read_bytes())
    if shown:
        count = format_number(len(shown), "file")
        message = f"{count} that a program might run or obey get a number in {EXTRA} as a name"
        observe(Noted(message=f"{message}: {', '.join(shown[:_MOST_SHOWN])}"))


def _is_empty(path: Path) -> bool:
    """Whether there is nothing at a path, or a file in which nothing has arrived."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return True
    return stat.S_ISREG(status.st_mode) and status.st_size == 0


def _with_data(
    root: Path, selection: FileSelection, pieces: list[int], *, follows: bool
) -> list[int]:
    """The pieces that have data on disk: missing files and holes need no hashing."""
    handles: dict[int, int | None] = {}
    with ExitStack() as stack:

        def has_data(index: int, offset: int, length: int) -> bool:
            if index not in handles:
                handles[index] = None
                flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follows else os.O_NOFOLLOW)
                try:
                    handles[index] = handle = os.open(root / selection.places[index], flags)
                    stack.callback(os.close, handle)
                except OSError as error:
                    if not is_absence(error):
                        raise
            opened = handles[index]
            if opened is None:
                return False
            # pages at the edges may hold data of the neighbouring pieces
            low, high = -(-offset // _PAGE) * _PAGE, (offset + length) // _PAGE * _PAGE
            if low >= high:
                low, high = offset, offset + length
            try:
                return os.lseek(opened, low, os.SEEK_DATA) < high
            except OSError as error:  # a hole to the end, or not a regular file
                return is_unsupported(error)

        return [piece for piece in pieces if _is_written(selection, piece, has_data)]


def _is_written(
    selection: FileSelection, piece: int, has_data: Callable[[int, int, int], bool]
) -> bool:
    return any(
        has_data(file.index, offset, length)
        for file, offset, length in selection.metainfo.spans(piece)
        if file.index in selection.places
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        if not is_absence(error):
            raise
        return 0
