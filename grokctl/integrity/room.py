"""Measure the room that a fetch or a repair needs: copies, what it keeps aside, the download."""

import errno
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grokctl.checkpoint.file_sizes import regular_size
from grokctl.checkpoint.torrent import Metainfo
from grokctl.errors import DiskFullError, FetchError, GrokctlError
from grokctl.integrity.damage import merged
from grokctl.linked_files import opened_linked
from grokctl.os_errors import is_absence, refusal
from grokctl.own_files import folder_of
from grokctl.paths import quoted
from grokctl.text import format_apart

_BLOCK: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """The parts of one file to back up."""

    place: str
    size: int
    extents: tuple[tuple[int, int], ...]
    """Ranges with data that will be overwritten or cut off."""
    is_moved: bool = False
    """Whether to move it: what is not a regular file cannot be repaired."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """What a repair keeps and needs, measured before it changes anything."""

    originals: tuple[Original, ...]
    copies: Mapping[str, tuple[tuple[int, int], ...]]
    """Links, by place, and the ranges of their targets that a copy in their place will hold."""
    growth: int
    """Bytes of the download that use no disk space yet."""

    @property
    def kept(self) -> int:
        """Bytes to keep aside."""
        return sum(high - low for each in self.originals for low, high in each.extents)

    @property
    def copied(self) -> int:
        """Bytes of the copies that replace links."""
        return sum(high - low for extents in self.copies.values() for low, high in extents)

    @property
    def required(self) -> int:
        """Bytes that must be free: a disk gives whole blocks."""
        several = (*(each.extents for each in self.originals), *self.copies.values())
        blocks = sum(
            -(-high // _BLOCK) - low // _BLOCK for extents in several for low, high in extents
        )
        return blocks * _BLOCK + self.growth


def measure(
    root: Path,
    metainfo: Metainfo,
    places: Mapping[int, str],
    pieces: Collection[int],
    *,
    keeps: Collection[int] | None = None,
    copies: bool = True,
) -> Backup:
    """Measure the data that a fetch or a repair will copy, overwrite or cut off: all its room.

    Args:
        root: The release.
        metainfo: Its torrent.
        places: File index -> path below the release.
        pieces: The pieces that will be fetched.
        keeps: Indices of the files whose data is kept aside; None for all.
        copies: Whether links are replaced by copies first.

    Raises:
        FetchError: A link leads elsewhere, or the disk cannot be read.
    """
    wanted = _wanted(metainfo, places, pieces)
    lengths = lengths_of(metainfo, places)
    kept = {place for index, place in places.items() if keeps is None or index in keeps}
    originals = []
    try:
        targets = targets_of(root, lengths, wanted) if copies else {}
        copied = {place: _copied(root / place, root, size) for place, size in targets.items()}
        for place, length in lengths.items():
            if place not in kept:
                continue
            ranges = wanted.get(place, ())
            if place in targets:
                original = _of_copy(place, targets[place], ranges, copied[place])
            else:
                original = _look(root, place, length, ranges)
            if original is not None:
                originals.append(original)
    except OSError as error:
        raise disk_refusal(error, root) from error
    growth = 0
    for place, ranges in wanted.items():
        unstored = _unstored(root / place, lengths[place])
        if place in targets:
            unstored = lengths[place] - _nbytes(copied[place])
        growth += min(_nbytes(ranges), unstored)
    return Backup(originals=tuple(originals), copies=copied, growth=growth)


def _nbytes(extents: Iterable[tuple[int, int]]) -> int:
    return sum(high - low for low, high in extents)


def targets_of(root: Path, lengths: Mapping[str, int], wanted: Collection[str]) -> dict[str, int]:
    """The links that a fetch will write to, or cut, and the bytes of a copy of each target."""
    targets = {}
    for place, length in lengths.items():
        path = root / place
        size = regular_size(path) if _is_shared(root, path) else None
        if size is not None and (place in wanted or size > length):
            targets[place] = min(size, length)
    return targets


def has_links(root: Path, places: Iterable[str]) -> bool:
    """Whether a file of a release has another name, by a link of either kind."""
    return any(_is_shared(root, root / place) for place in places)


def _copied(path: Path, root: Path, nbytes: int) -> tuple[tuple[int, int], ...]:
    """The data of the target of a link."""
    with opened_linked(path, root) as source:
        return tuple(data_of(source.handle, 0, nbytes))


def _of_copy(
    place: str,
    nbytes: int,
    ranges: tuple[tuple[int, int], ...],
    copied: tuple[tuple[int, int], ...],
) -> Original | None:
    """The parts to back up of the copy that will replace a link."""
    overlaps = ((max(a, c), min(b, d)) for a, b in ranges for c, d in copied)
    extents = tuple((low, high) for low, high in overlaps if low < high)
    return Original(place=place, size=nbytes, extents=extents) if extents else None


def disk_refusal(error: OSError, root: Path) -> GrokctlError:
    """The error for a release that the machine refuses to read or write."""
    return refusal(error, root, kind=FetchError, hint=f"ls -la {quoted(root)}")


def _is_shared(root: Path, path: Path) -> bool:
    """Whether a file has another name too, by a link of either kind, in a folder of the release."""
    parents = path.relative_to(root).parents
    if any((root / parent).is_symlink() for parent in parents[:-1]):
        return False
    try:
        status = path.lstat()
    except OSError as error:
        if not is_absence(error):
            raise
        return False
    is_hard = stat.S_ISREG(status.st_mode) and status.st_nlink > 1
    return stat.S_ISLNK(status.st_mode) or is_hard


def lengths_of(metainfo: Metainfo, places: Mapping[int, str]) -> dict[str, int]:
    """The length of each file that has a place, by its place."""
    return {places[file.index]: file.length for file in metainfo.files if file.index in places}


def _wanted(
    metainfo: Metainfo, places: Mapping[int, str], pieces: Collection[int]
) -> dict[str, tuple[tuple[int, int], ...]]:
    """The ranges of each file that the pieces cover."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for piece in sorted(pieces):
        for file, offset, length in metainfo.spans(piece):
            if file.index in places:
                ranges.setdefault(places[file.index], []).append((offset, offset + length))
    return {place: tuple(merged(several)) for place, several in ranges.items()}


def _look(
    root: Path, place: str, length: int, ranges: tuple[tuple[int, int], ...]
) -> Original | None:
    """The parts of a file to back up; None if there are none."""
    with ExitStack() as stack:
        try:
            folder, name = folder_of(stack, root, place)
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not ranges and stat.S_ISLNK(status.st_mode):
            if regular_size(root / place) == length:
                return None  # it is read only
            raise FetchError(
                f"{root / place}: expected a file, found a symbolic link",
                f"ls -ld {quoted(root / place)}",
            )
        if not ranges and status.st_size <= length:
            return None
        moved = Original(place=place, size=status.st_size, extents=(), is_moved=True)
        if not stat.S_ISREG(status.st_mode):
            _refuse_filled(root / place)
            return moved
        handle = open_file(stack, folder, name)
        whole = (*ranges, (length, status.st_size))
        extents = tuple(
            extent
            for low, high in whole
            for extent in data_of(handle, low, min(high, status.st_size))
        )
        return Original(place=place, size=status.st_size, extents=extents) if extents else None


def _refuse_filled(path: Path) -> None:
    """Refuse a folder with files in the place of a file: nobody has proven that they are waste."""
    if path.is_dir() and not path.is_symlink() and any(path.iterdir()):
        raise FetchError(f"{path}: expected a file, found a folder", f"ls -la {quoted(path)}")


def data_of(handle: int, low: int, high: int) -> Iterator[tuple[int, int]]:
    """The parts of a range that are not holes."""
    while low < high:
        try:
            start = os.lseek(handle, low, os.SEEK_DATA)
            end = os.lseek(handle, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            start, end = low, high
        if start < high:
            yield start, min(end, high)
        low = end


def _unstored(path: Path, length: int) -> int:
    """Bytes of a file that use no disk space yet."""
    try:
        status = path.lstat()
    except OSError:
        return length
    return max(0, length - status.st_blocks * 512) if stat.S_ISREG(status.st_mode) else length


def refuse_full(root: Path, required: int, free: int) -> None:
    """Refuse, before anything changes, a backup and repair that do not fit.

    Raises:
        DiskFullError: There are fewer bytes free than required.
    """
    if required > free:
        needed, found = format_apart(required, free)
        raise DiskFullError(
            f"{root}: expected {needed} free for backup and repair, found {found}",
            f"df -h {quoted(root)}",
        )


def open_file(stack: ExitStack, folder: int, name: str) -> int:
    """Open a file in an open folder, through no link."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(name, flags, dir_fd=folder)
    stack.callback(os.close, handle)
    return handle
