"""Back up damaged files until their repair is proven."""

import errno
import os
import shutil
import stat
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grokctl.checkpoint.file_sizes import regular_size
from grokctl.checkpoint.torrent import Metainfo
from grokctl.errors import DiskFullError, FetchError, GrokctlError
from grokctl.events import Noted, Observer, ignore
from grokctl.integrity.damage import merged
from grokctl.os_errors import is_absence, refusal
from grokctl.own_files import copy_mode, open_below, refuse_foreign_links
from grokctl.paths import PRIVATE, create_beside, quoted
from grokctl.system import is_unsupported, optional
from grokctl.text import format_apart, format_bytes, format_number

DAMAGED: Final = "damaged"
"""Folder of what a repair overwrote, until it is proven."""
REPLACED: Final = "replaced"
"""Folder of what a fetch found in place of its own files."""
_AT_ONCE: Final = 64 * 2**20
"""Bytes per copy, which cannot be interrupted."""
_SECTOR: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class _Original:
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

    originals: tuple[_Original, ...]
    kept: int
    """Bytes to copy."""
    growth: int
    """Bytes of the download that use no disk space yet."""

    @property
    def required(self) -> int:
        """Bytes that must be free."""
        return self.kept + self.growth


def measure(
    root: Path, metainfo: Metainfo, places: Mapping[int, str], pieces: Collection[int]
) -> Backup:
    """Measure the data that a repair will overwrite or cut off.

    Args:
        root: The release.
        metainfo: Its torrent.
        places: File index -> path below the release.
        pieces: The pieces that will be fetched.

    Raises:
        FetchError: A link leads elsewhere, or the disk cannot be read.
    """
    wanted = _wanted(metainfo, places, pieces)
    lengths = _lengths(metainfo, places)
    try:
        originals = tuple(
            original
            for place, length in lengths.items()
            if (original := _look(root, place, length, wanted.get(place, ()))) is not None
        )
    except OSError as error:
        raise _refused(error, root) from error
    growth = sum(
        min(sum(high - low for low, high in ranges), _unstored(root / place, lengths[place]))
        for place, ranges in wanted.items()
    )
    kept = sum(high - low for original in originals for low, high in original.extents)
    return Backup(originals=originals, kept=kept, growth=growth)


def _refused(error: OSError, root: Path) -> GrokctlError:
    return refusal(error, root, kind=FetchError, hint=f"ls -la {quoted(root)}")


def set_aside(
    root: Path,
    metainfo: Metainfo,
    places: Mapping[int, str],
    pieces: Collection[int],
    *,
    under: str = DAMAGED,
    observe: Observer = ignore,
) -> Path | None:
    """Copy the data that a repair will overwrite or cut off; move away what it cannot repair.

    Args:
        root: The release.
        metainfo: Its torrent.
        places: File index -> path below the release.
        pieces: The pieces that will be fetched.
        under: Folder for the backup, in the release's private one.
        observe: Receives a note with the size of the backup.

    Returns:
        A folder of sparse files with the same paths as in the release, and with all copied data
        at its own offset; None if there is nothing to back up.

    Raises:
        DiskFullError: There is no room for the backup and the repair. Nothing was changed.
        FetchError: A link leads elsewhere, or the disk cannot be read or written.
    """
    backup = measure(root, metainfo, places, pieces)
    try:
        refuse_full(root, backup.required, shutil.disk_usage(root).free)
        if not backup.originals:
            return None
        if backup.kept:
            until = " of damaged data until the repair is proven" if under == DAMAGED else ""
            observe(Noted(message=f"keeping {format_bytes(backup.kept)}{until}"))
        return _keep(root, backup.originals, under)
    except OSError as error:
        raise _refused(error, root) from error


def unlink_targets(
    root: Path,
    metainfo: Metainfo,
    places: Mapping[int, str],
    pieces: Collection[int],
    *,
    observe: Observer = ignore,
) -> None:
    """Replace links by copies wherever a fetch will write, so that no target is written to.

    Args:
        root: The release.
        metainfo: Its torrent.
        places: File index -> path below the release.
        pieces: The pieces that will be fetched.
        observe: Receives a note with the size of the copies.

    Raises:
        DiskFullError: There is no room for the copies. Nothing was changed.
        FetchError: A file cannot be read or written.
    """
    touched = _wanted(metainfo, places, pieces).keys()
    lengths = _lengths(metainfo, places)
    copies = {}
    try:
        for place, length in lengths.items():
            path = root / place
            size = regular_size(path) if _is_shared(root, path) else None
            if size is not None and (place in touched or size > length):
                copies[place] = min(size, length)
        refuse_full(root, sum(copies.values()), shutil.disk_usage(root).free)
        if copies:
            count = format_number(len(copies), "link")
            observe(Noted(message=f"copying {count}: nothing is written to targets"))
        for place, nbytes in copies.items():
            _copy_target(root, root / place, nbytes)
    except OSError as error:
        raise refusal(error, root, kind=FetchError) from error


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


def _copy_target(root: Path, path: Path, nbytes: int) -> None:
    """Replace a link by the first bytes of its target, which nobody else may read than before."""
    refuse_foreign_links(path, root)
    handle, temporary = create_beside(path, copy_mode(path, root))
    try:
        with os.fdopen(handle, "r+b") as target, path.open("rb") as source:
            target.truncate(nbytes)
            for low, high in _data(source.fileno(), 0, nbytes):
                _copy(source.fileno(), target.fileno(), low, min(high, nbytes))
            os.fsync(target.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def forget(root: Path) -> None:
    """Delete the backups of this and earlier repairs: the release is proven."""
    with suppress(OSError), ExitStack() as stack:
        private = open_below(stack, root, (PRIVATE,))
        shutil.rmtree(DAMAGED, dir_fd=private)


def _lengths(metainfo: Metainfo, places: Mapping[int, str]) -> dict[str, int]:
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
) -> _Original | None:
    """The parts of a file to back up; None if there are none."""
    with ExitStack() as stack:
        try:
            folder, name = _folder_of(stack, root, place)
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
        moved = _Original(place=place, size=status.st_size, extents=(), is_moved=True)
        if not stat.S_ISREG(status.st_mode):
            _refuse_filled(root / place)
            return moved
        handle = _open(stack, folder, name)
        whole = (*ranges, (length, status.st_size))
        extents = tuple(
            extent
            for low, high in whole
            for extent in _data(handle, low, min(high, status.st_size))
        )
        return _Original(place=place, size=status.st_size, extents=extents) if extents else None


def _refuse_filled(path: Path) -> None:
    """Refuse a folder with files in the place of a file: nobody has proven that they are waste."""
    if path.is_dir() and not path.is_symlink() and any(path.iterdir()):
        raise FetchError(f"{path}: expected a file, found a folder", f"ls -la {quoted(path)}")


def _data(handle: int, low: int, high: int) -> Iterator[tuple[int, int]]:
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


def _keep(root: Path, originals: Collection[_Original], under: str) -> Path:
    with ExitStack() as stack:
        parent = open_below(stack, root, (PRIVATE, under), make=True)
        name = _new_name(parent)
        try:
            # copies first: nothing changes until the last of them is safe
            for original in sorted(originals, key=lambda original: original.is_moved):
                _keep_one(root, (PRIVATE, under, name), original)
        except BaseException:
            if not any(original.is_moved for original in originals):
                shutil.rmtree(name, dir_fd=parent, ignore_errors=True)
            raise
    return root / PRIVATE / under / name


def _keep_one(root: Path, folder: tuple[str, ...], original: _Original) -> None:
    with ExitStack() as stack:
        place = (*folder, *original.place.split("/"))
        source, file = _folder_of(stack, root, original.place)
        target = open_below(stack, root, place[:-1], make=True)
        if original.is_moved:
            os.rename(file, file, src_dir_fd=source, dst_dir_fd=target)
            return
        reading = _open(stack, source, file)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        writing = os.open(file, flags, 0o666, dir_fd=target)
        stack.callback(os.close, writing)
        os.ftruncate(writing, original.size)
        for low, high in original.extents:
            _copy(reading, writing, low, high)
        for handle in (writing, target):
            with optional():
                os.fsync(handle)


def _copy(source: int, target: int, low: int, high: int) -> None:
    """Copy a range to the same offset of another file, except for unreadable sectors."""
    while low < high:
        try:
            try:
                count = os.copy_file_range(source, target, min(_AT_ONCE, high - low), low, low)
            except OSError as error:
                if error.errno != errno.EXDEV and not is_unsupported(error):
                    raise
                count = os.pwrite(target, os.pread(source, min(2**20, high - low), low), low)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            count = _SECTOR - low % _SECTOR
        if not count:
            return
        low += count


def _new_name(parent: int) -> str:
    """Create a folder with the time in its name."""
    now = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime())
    for attempt in range(1, 1000):
        name = now if attempt == 1 else f"{now}-{attempt}"
        with suppress(FileExistsError):
            os.mkdir(name, 0o777, dir_fd=parent)
            return name
    raise FileExistsError(errno.EEXIST, "has too many folders", now)


def _folder_of(stack: ExitStack, root: Path, place: str) -> tuple[int, str]:
    *folders, name = place.split("/")
    return open_below(stack, root, tuple(folders)), name


def _open(stack: ExitStack, folder: int, name: str) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(name, flags, dir_fd=folder)
    stack.callback(os.close, handle)
    return handle
