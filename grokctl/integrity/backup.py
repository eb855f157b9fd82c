"""Back up damaged files until their repair is proven."""

import errno
import os
import shutil
import stat
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
    lengths_of,
    measure,
    open_file,
    refuse_full,
    targets_of,
)
from grokctl.linked_files import opened_linked
from grokctl.marks import MARK, delete_in, delete_marked, put_mark
from grokctl.os_errors import refusal
from grokctl.own_files import (
    folder_of,
    names_in,
    open_below,
    open_to_others,
    opened_folder,
    why_not_own,
)
from grokctl.ownership import can_be_written
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
    with opened_linked(path, root) as source:
        handle, temporary = create_beside(path, source.copy_mode)
        try:
            with os.fdopen(handle, "r+b") as target:
                target.truncate(nbytes)
                for low, high in data_of(source.handle, 0, nbytes):
                    _copy(source.handle, target.fileno(), low, min(high, nbytes))
                os.fsync(target.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def forget(root: Path) -> None:
    """Delete the backups of this and earlier repairs: the release is proven."""
    with suppress(OSError), ExitStack() as stack:
        private = open_below(stack, root, (PRIVATE,))
        parent = open_below(stack, root, (PRIVATE, DAMAGED))
        for name in names_in(parent):
            _delete(stack, root, (PRIVATE, DAMAGED, name))
        os.rmdir(DAMAGED, dir_fd=private)


def _delete(stack: ExitStack, root: Path, place: tuple[str, ...]) -> None:
    """Delete a backup; where others can rename folders of this user's to its name, if it is one.

    Args:
        stack: Closes the descriptors.
        root: The release.
        place: The names of the folders on the way, and its own.
    """
    name, parent, is_exposed = place[-1], -1, False
    for depth in range(len(place)):
        parent = open_below(stack, root, place[:depth])
        status, path = os.fstat(parent), root.joinpath(*place[:depth])
        is_exposed |= bool(why_not_own(status) or can_be_written(path, status))
    if is_exposed:
        with suppress(OSError):
            delete_marked(name, parent, made_as=name.removesuffix(_BEGUN))
        return
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=parent)
        return
    with opened_folder(name, above=parent) as folder:
        delete_in(folder, last=MARK)
        os.rmdir(name, dir_fd=parent)


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
                    _delete(stack, root, (PRIVATE, under, name))


def _keep(root: Path, originals: Collection[Original], under: str) -> Path:
    with ExitStack() as stack:
        parent = open_below(stack, root, (PRIVATE, under), make=True)
        name = _new_name(parent)
        begun = f"{name}{_BEGUN}"
        folder = stack.enter_context(opened_folder(begun, above=parent))
        try:
            put_mark(folder, name)
            # copies first: nothing changes until the last of them is safe
            for original in originals:
                if not original.is_moved:
                    _keep_one(root, (PRIVATE, under, begun), original)
        except BaseException:
            with suppress(OSError):
                delete_in(folder, last=MARK)
                os.rmdir(begun, dir_fd=parent)
            raise
        os.rename(begun, name, src_dir_fd=parent, dst_dir_fd=parent)
        with optional():
            os.fsync(parent)
        for original in originals:
            if original.is_moved:
                _keep_one(root, (PRIVATE, under, name), original)
        if under != DAMAGED:  # it stays, for all who could read it before
            os.unlink(MARK, dir_fd=folder)
            open_to_others(folder)
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
            os.mkdir(f"{name}{_BEGUN}", 0o700, dir_fd=parent)
            return name
    raise FileExistsError(errno.EEXIST, "has too many folders", now)
