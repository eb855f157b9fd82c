"""What a folder lies on: room, type of file system, and how fast it writes and reads, tried now."""

import fcntl
import mmap
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Final

from grokctl.machine.facts import Disk
from grokctl.machine.waiting import Waiting
from grokctl.os_errors import reason_of

_MOUNTS: Final = Path("/proc/self/mountinfo")
_TRY_S: Final = 0.7
_LARGEST_TRY: Final = 2**29
_FREE_PARTS: Final = 100
"""Of so many parts of what is free, one is written at most."""
_SMALLEST_BLOCK: Final = 2**20
_LARGEST_BLOCK: Final = 2**24
_REMOTE: Final = re.compile(
    r"9p|afs|beegfs|ceph|cifs|coda|davfs|fuse(blk|\..*)?|glusterfs|gpfs|lustre|ncpfs|nfs4?|orangefs"
    r"|panfs|pvfs2|smb3|smbfs|wekafs"
)
_SMALL_FILES: Final = frozenset({"vfat", "msdos"})
"""File systems that count the bytes of a file in 32 bits."""
_NUMBER_S: Final = 1.0
"""Seconds that a folder has to say which device it lies on, before it is looked at alone."""


def disks(folders: Sequence[tuple[str, Path]], *, tries: bool, timeout_s: float) -> list[Disk]:
    """Look at folders side by side; a disk that several lie on is tried once.

    Args:
        folders: Purpose and path of each.
        tries: Whether to measure.
        timeout_s: A disk that hangs is left alone after so many seconds.
    """
    return asking_disks(folders, tries=tries, timeout_s=timeout_s)()


def asking_disks(
    folders: Sequence[tuple[str, Path]], *, tries: bool, timeout_s: float
) -> Callable[[], list[Disk]]:
    """Begin to look at folders; what is returned waits for that. See `disks`."""
    asked = [
        Waiting(partial(_device, path), timeout_s=_NUMBER_S, otherwise=None) for _, path in folders
    ]
    groups: dict[object, list[int]] = {}
    for index, waiting in enumerate(asked):
        device = waiting.answer()
        groups.setdefault(("nobody knows", index) if device is None else device, []).append(index)

    def looking(indices: list[int]) -> Waiting[list[Disk]]:
        mine = [folders[index] for index in indices]
        why = f"it did not answer in {timeout_s:.0f} s"
        silent = [Disk(purpose=purpose, path=path, error=why) for purpose, path in mine]
        look = partial(_on_one_disk, mine, tries=tries)
        return Waiting(look, timeout_s=timeout_s, otherwise=silent)

    answers = [(indices, looking(indices)) for indices in groups.values()]

    def answer() -> list[Disk]:
        found: dict[int, Disk] = {}
        for indices, waiting in answers:
            found.update(zip(indices, waiting.answer(), strict=True))
        return [found[index] for index in range(len(folders))]

    return answer


def _on_one_disk(folders: Sequence[tuple[str, Path]], *, tries: bool) -> list[Disk]:
    found: list[Disk] = []
    tried: Disk | None = None
    for purpose, path in folders:
        each = disk(purpose, path, tries=tries and tried is None)
        if each.write_rate is not None:
            tried = each
        elif tried is not None and each.is_writable:
            each = replace(each, write_rate=tried.write_rate, read_rate=tried.read_rate)
        found.append(each)
    return found


def disk(purpose: str, path: Path, *, tries: bool) -> Disk:
    """Look at what a folder lies on, or will lie on.

    Args:
        purpose: `home` or `destination`.
        path: Need not exist.
        tries: Whether to write a file that has no name and read it back, for about a second.
    """
    found = Disk(purpose=purpose, path=path)
    try:
        there = existing(path)
        usage = shutil.disk_usage(there)
        kind, device = file_system(there), there.stat().st_dev
        is_read_only = bool(os.statvfs(there).f_flag & os.ST_RDONLY)
    except OSError as error:
        return replace(found, error=reason_of(error))
    found = replace(
        found,
        total=usage.total,
        free=usage.free,
        file_system=kind,
        is_remote=_REMOTE.fullmatch(kind) is not None,
        device=device,
    )
    if not there.is_dir():
        return replace(found, error=f"{there} is not a folder")
    if is_read_only:
        return replace(found, error="it is mounted read-only")
    if not os.access(there, os.W_OK | os.X_OK):
        return replace(found, error=f"no permission for {there}")
    found = replace(found, is_writable=True)
    return _tried(found, there, usage.free) if tries else found


def file_system(there: Path, *, table: Path = _MOUNTS) -> str:
    """The type of the file system that a folder lies on, as Linux calls it; empty elsewhere.

    Args:
        there: The folder.
        table: What is mounted where.

    Raises:
        OSError: The folder cannot be looked at.
    """
    if not table.exists():
        return ""
    device = there.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    best, place = "", there.resolve()
    longest = -1
    for line in table.read_text(errors="replace").splitlines():
        fields, _, rest = line.partition(" - ")
        names, kind = fields.split(), rest.split()
        if len(names) < 5 or not kind:  # noqa: PLR2004 (the fifth is where it is mounted)
            continue
        if names[2] == wanted:
            return kind[0]
        # parts of a btrfs have numbers that are not in the table
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), names[4]))
        if place.is_relative_to(point) and len(point.parts) >= longest:
            best, longest = kind[0], len(point.parts)
    return best


def file_limit(kind: str) -> int | None:
    """Bytes that a file may not reach on a type of file system; None if there is no such limit."""
    return 2**32 if kind in _SMALL_FILES else None


def existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    whole = path.absolute()
    return next(each for each in (whole, *whole.parents) if each.exists())


def write_rate(file: FileIO, nbytes: int, *, seconds: float) -> tuple[float | None, str]:
    """Write random bytes and wait until they are on the disk, as long as there is time.

    Args:
        file: An empty one without a buffer.
        nbytes: How much at most.
        seconds: After which no more is written.

    Returns:
        Bytes a second, None if there was no room for any; and why it ended early.
    """
    data = memoryview(random.Random(0).randbytes(min(_LARGEST_BLOCK, max(1, nbytes))))  # noqa: S311

    def write(size: int) -> int:
        count = file.write(data[:size])
        getattr(os, "fdatasync", os.fsync)(file.fileno())  # macOS has only the slower one
        return count or 0

    return _rate(write, nbytes, seconds=seconds)


def _read_rate(file: FileIO, nbytes: int, *, seconds: float) -> float | None:
    """Bytes a second that come from the disk and not from memory; None where nothing tells."""
    memory = memoryview(mmap.mmap(-1, _LARGEST_BLOCK))  # at the start of a page, as O_DIRECT wants
    for forget in (_around_memory, _out_of_memory):
        try:
            forget(file)
            file.seek(0)
        except OSError:
            continue
        rate, error = _rate(lambda size: file.readinto(memory[:size]), nbytes, seconds=seconds)
        if not error:
            return rate
    return None


def _around_memory(file: FileIO) -> None:
    """Have a file read without the page cache, where its file system can do that."""
    if not hasattr(os, "O_DIRECT"):
        raise OSError("there is no such thing here")
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)


def _out_of_memory(file: FileIO) -> None:
    """Have the page cache forget a file."""
    if not hasattr(os, "posix_fadvise"):
        raise OSError("there is no such thing here")
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    fcntl.fcntl(file, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _rate(move: Callable[[int], int], nbytes: int, *, seconds: float) -> tuple[float | None, str]:
    """Move blocks as long as there is time; they grow while they are quick."""
    moved, size, why = 0, _SMALLEST_BLOCK, ""
    begun = now = time.perf_counter()
    while moved < nbytes and now - begun < seconds:
        before = now
        try:
            count = move(min(size, nbytes - moved))
        except OSError as error:
            why = reason_of(error)
            break
        now = time.perf_counter()
        moved += count
        if not count:
            break
        if now - before < seconds / 16:
            size = min(2 * size, _LARGEST_BLOCK)
        elif now - before > seconds / 4:
            size = max(size // 2, _SMALLEST_BLOCK)
    return (moved / (now - begun) if moved else None), why


def _tried(found: Disk, there: Path, free: int) -> Disk:
    nbytes = min(_LARGEST_TRY, free // _FREE_PARTS) // _SMALLEST_BLOCK * _SMALLEST_BLOCK
    try:
        with tempfile.TemporaryFile(dir=there, buffering=0) as file:
            if not nbytes:
                return replace(found, error=f"{free:,} bytes are free, too few to try it")
            writes, why = write_rate(file, nbytes, seconds=_TRY_S)
            reads = None if writes is None else _read_rate(file, nbytes, seconds=_TRY_S)
    except OSError as error:
        return replace(found, is_writable=False, error=reason_of(error))
    is_writable = writes is not None
    return replace(found, is_writable=is_writable, write_rate=writes, read_rate=reads, error=why)


def _device(path: Path) -> int | None:
    try:
        return existing(path).stat().st_dev
    except OSError:
        return None
