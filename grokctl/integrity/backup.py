"""Back up damaged files until their repair is proven."""

import errno
import os
import shutil
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from grokctl.checkpoint.torrent import Metainfo
from grokctl.errors import FetchError
from grokctl.events import Noted, Observer, ignore
from grokctl.integrity.room import (
    Original,
    data_of,
    disk_refusal,
    folder_of,
    lengths_of,
    measure,
    open_file,
    refuse_full,
    targets_of,
)
from grokctl.os_errors import refusal
from grokctl.own_files import copy_mode, names_in, open_below, refuse_foreign_links
from grokctl.paths import PRIVATE, REPLACED, create_beside
from grokctl.system import is_unsupported, optional
from grokctl.text import format_bytes, format_number

DAMAGED: Final = "damaged"
"""Folder of what a repair overwrote, until it is proven."""
_AT_ONCE: Final = 64 * 2**20
"""Bytes per copy, which cannot be interrupted."""
_SECTOR: Final = 4096
_BEGUN: Final = ".begun"
"""Suffix of a backup until its last copy is safe."""


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
    backup = measure(root, metainfo, places, pieces, copies=False)
    try:
        _forget_begun(root)
        refuse_full(root, backup.required, shutil.disk_usage(root).free)
        if not backup.originals:
            return None
        if backup.kept:
            until = " of damaged data until the repair is proven" if under == DAMAGED else ""
            observe(Noted(message=f"keeping {format_bytes(backup.kept)}{until}"))
        return _keep(root, backup.originals, under)
    except OSError as error:
        raise disk_refusal(error, root) from error


def unlink_targets(
    root: Path,
    metainfo: Metainfo,
    places: Mapping[int, str],
    pieces: Collection[int],
    *,
    keeps: Collection[int] | None = None,
    observe: Observer = ignore,
) -> None:
    """Replace links by copies wherever a fetch will write, so that no target is written to.

    Args:
        root: The release.
        metainfo: Its torrent.
        places: File index -> path below the release.
        pieces: The pieces that will be fetched.
        keeps: Indices of the files whose data `set_aside` will keep; None for all.
        observe: Receives a note with the number of the copies.

    Raises:
        DiskFullError: There is no room for the copies, the backup and the download. Nothing was
            changed.
        FetchError: A file cannot be read or written.
    """
    backup = measure(root, metainfo, places, pieces, keeps=keeps)
    lengths = lengths_of(metainfo, places)
    try:
        _forget_begun(root)
        refuse_full(root, backup.required, shutil.disk_usage(root).free)
        if not backup.copies:
            return
        count = format_number(len(backup.copies), "link")
        observe(Noted(message=f"copying {count}: nothing is written to targets"))
        for place, nbytes in targets_of(root, lengths, backup.copies).items():
            _copy_target(root, root / place, nbytes)
    except OSError as error:
        raise refusal(error, root, kind=FetchError) from error


def _copy_target(root: Path, path: Path, nbytes: int) -> None:
    """Replace a link by the first bytes of its target, which nobody else may read than before."""
    refuse_foreign_links(path, root)
    handle, temporary = create_beside(path, copy_mode(path, root))
    try:
        with os.fdopen(handle, "r+b") as target, path.open("rb") as source:
            target.truncate(nbytes)
            for low, high in data_of(source.fileno(), 0, nbytes):
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


def begun_nbytes(root: Path) -> int:
    """Disk space of copies that a kill left; the next backup deletes them before it begins.

    Args:
        root: The release.

    Raises:
        OSError: They cannot be looked at.
    """
    return sum(
        path.lstat().st_blocks * 512
        for under in (DAMAGED, REPLACED)
        for begun in (root / PRIVATE / under).glob(f"*{_BEGUN}")
        for path in begun.rglob("*")
    )


def _forget_begun(root: Path) -> None:
    """Delete the copies of a kill: their originals are as they were until the last copy is safe."""
    for under in (DAMAGED, REPLACED):
        with suppress(OSError), ExitStack() as stack:
            parent = open_below(stack, root, (PRIVATE, under))
            for name in names_in(parent):
                if name.endswith(_BEGUN):
                    shutil.rmtree(name, dir_fd=parent)


def _keep(root: Path, originals: Collection[Original], under: str) -> Path:
    with ExitStack() as stack:
        parent = open_below(stack, root, (PRIVATE, under), make=True)
        name = _new_name(parent)
        begun = f"{name}{_BEGUN}"
        try:
            # copies first: nothing changes until the last of them is safe
            for original in originals:
                if not original.is_moved:
                    _keep_one(root, (PRIVATE, under, begun), original)
        except BaseException:
            shutil.rmtree(begun, dir_fd=parent, ignore_errors=True)
            raise
        os.rename(begun, name, src_dir_fd=parent, dst_dir_fd=parent)
        with optional():
            os.fsync(parent)
        for original in originals:
            if original.is_moved:
                _keep_one(root, (PRIVATE, under, name), original)
    return root / PRIVATE / under / name


def _keep_one(root: Path, folder: tuple[str, ...], original: Original) -> None:
    with ExitStack() as stack:
        place = (*folder, *original.place.split("/"))
        source, file = folder_of(stack, root, original.place)
        target = open_below(stack, root, place[:-1], make=True)
        if original.is_moved:
            os.rename(file, file, src_dir_fd=source, dst_dir_fd=target)
            return
        reading = open_file(stack, source, file)
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
    """A free name with the time in it, for the folder that is begun under a longer name."""
    now = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime())
    taken = names_in(parent)
    for attempt in range(1, 1000):
        name = now if attempt == 1 else f"{now}-{attempt}"
        if name in taken:
            continue
        with suppress(FileExistsError):
            os.mkdir(f"{name}{_BEGUN}", 0o777, dir_fd=parent)
            return name
    raise FileExistsError(errno.EEXIST, "has too many folders", now)
