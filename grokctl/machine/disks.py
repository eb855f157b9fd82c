"""The disk of a folder: space, type of file system, and measured speed."""

import errno
import fcntl
import mmap
import os
import random
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Final, Protocol

from grokctl.machine.facts import Disk
from grokctl.machine.waiting import Waiting
from grokctl.os_errors import reason_of
from grokctl.system import is_unsupported, optional
from grokctl.text import format_bytes

_MOUNTS: Final = Path("/proc/self/mountinfo")
_TRIAL_S: Final = 0.7
_LARGEST_TRIAL: Final = 2**29
_FREE_PARTS: Final = 100
"""A trial writes at most one of this many parts of the free space."""
_SMALLEST_BLOCK: Final = 2**20
_LARGEST_BLOCK: Final = 2**24
_REMOTE: Final = re.compile(
    r"9p|afs|beegfs|ceph|cifs|coda|davfs|fuse(blk|\..*)?|glusterfs|gpfs|lustre|ncpfs|nfs4?|orangefs"
    r"|panfs|pvfs2|smb3|smbfs|wekafs"
)
_SMALL_FILES: Final = frozenset({"vfat", "msdos"})
"""File systems with 32-bit file sizes."""
_DEVICE_S: Final = 1.0
"""Seconds to find the device of a folder; after that, the folder is probed on its own."""


def probe_disks(
    folders: Sequence[tuple[str, Path]], *, tries: bool, timeout_s: float
) -> Callable[[], list[Disk]]:
    """Begin to inspect folders in parallel; a disk with several of them is measured once.

    Args:
        folders: Purpose and path of each.
        tries: Whether to measure.
        timeout_s: Seconds to wait for a disk.

    Returns:
        A function that waits for the results.
    """
    devices = [
        Waiting(partial(_device, path), timeout_s=_DEVICE_S, default=None) for _, path in folders
    ]
    groups: dict[object, list[int]] = {}
    for index, waiting in enumerate(devices):
        device = waiting.answer()
        groups.setdefault(("unknown", index) if device is None else device, []).append(index)

    def probe(indices: list[int]) -> Waiting[list[Disk]]:
        own = [folders[index] for index in indices]
        error = f"it did not answer in {timeout_s:.0f} s"
        silent = [Disk(purpose=purpose, path=path, error=error) for purpose, path in own]
        look = partial(_on_one_disk, own, tries=tries)
        return Waiting(look, timeout_s=timeout_s, default=silent)

    probes = [(indices, probe(indices)) for indices in groups.values()]

    def results() -> list[Disk]:
        disks: dict[int, Disk] = {}
        for indices, waiting in probes:
            disks.update(zip(indices, waiting.answer(), strict=True))
        return [disks[index] for index in range(len(folders))]

    return results


def _on_one_disk(folders: Sequence[tuple[str, Path]], *, tries: bool) -> list[Disk]:
    disks: list[Disk] = []
    measured: Disk | None = None
    for purpose, path in folders:
        each = disk(purpose, path, tries=tries and measured is None)
        if each.write_rate is not None:
            measured = each
        elif measured is not None and each.is_writable:
            each = replace(each, write_rate=measured.write_rate, read_rate=measured.read_rate)
        disks.append(each)
    return disks


def disk(purpose: str, path: Path, *, tries: bool) -> Disk:
    """Inspect the disk of a folder.

    Args:
        purpose: `home` or `destination`.
        path: The folder, which need not exist.
        tries: Whether to measure with an unnamed file, for about a second.
    """
    facts = Disk(purpose=purpose, path=path)
    try:
        folder = existing(path)
        usage = shutil.disk_usage(folder)
        system, device = file_system(folder), folder.stat().st_dev
        is_read_only = bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    except OSError as error:
        return replace(facts, error=reason_of(error))
    facts = replace(
        facts,
        total=usage.total,
        free=usage.free,
        file_system=system,
        is_remote=_REMOTE.fullmatch(system) is not None,
        device=device,
    )
    if not folder.is_dir():
        return replace(facts, error=f"{folder} is not a folder")
    if is_read_only:
        return replace(facts, error="it is mounted read-only")
    if not os.access(folder, os.W_OK | os.X_OK):
        return replace(facts, error=f"no permission for {folder}")
    facts = replace(facts, is_writable=True)
    return _measured(facts, folder, usage.free) if tries else facts


def file_system(folder: Path, *, table: Path = _MOUNTS) -> str:
    """Linux's name of the type of a folder's file system; empty on other systems.

    Args:
        folder: The folder.
        table: The table of mounts.

    Raises:
        OSError: The folder cannot be read.
    """
    if not table.exists():
        return ""
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    best, place = "", folder.resolve()
    longest = -1
    for line in table.read_text(errors="replace").splitlines():
        fields, _, rest = line.partition(" - ")
        names, system = fields.split(), rest.split()
        if len(names) < 5 or not system:  # noqa: PLR2004 (the fifth is the mount point)
            continue
        if names[2] == wanted:
            return system[0]
        # subvolumes of btrfs have device numbers that are not in the table
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), names[4]))
        if place.is_relative_to(point) and len(point.parts) >= longest:
            best, longest = system[0], len(point.parts)
    return best


def file_limit(system: str) -> int | None:
    """Bytes that a file cannot reach on a type of file system; None without such a limit."""
    return 2**32 if system in _SMALL_FILES else None


def largest_file(folder: Path) -> tuple[int | None, str]:
    """The most bytes that a file may have, and where the limit comes from."""
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft != resource.RLIM_INFINITY:
        return soft, "ulimit -f"
    try:
        system = file_system(folder)
    except OSError:
        return None, ""
    limit = file_limit(system)
    return (None, "") if limit is None else (limit - 1, system)


def existing(path: Path) -> Path:
    """The folder itself, or its nearest ancestor that exists."""
    whole = path.absolute()
    return next(each for each in (whole, *whole.parents) if each.exists())


class Writable(Protocol):
    """A file that is written without a buffer of Python's."""

    def write(self, data: memoryview, /) -> int | None:
        """Write bytes; returns how many of them."""
        ...

    def fileno(self) -> int:
        """Its descriptor."""
        ...


def write_rate(file: Writable, nbytes: int, *, seconds: float) -> tuple[float | None, str]:
    """Write and sync random bytes until the time is over.

    Args:
        file: An empty file without a buffer.
        nbytes: Bytes to write at most.
        seconds: Time limit.

    Returns:
        Bytes a second, None if nothing could be written; and the error that ended it early.
    """
    data = memoryview(random.Random(0).randbytes(min(_LARGEST_BLOCK, max(1, nbytes))))  # noqa: S311

    def write(size: int) -> int:
        count = file.write(data[:size])
        with optional():
            getattr(os, "fdatasync", os.fsync)(file.fileno())  # macOS has only the slower one
        return count or 0

    return _rate(write, nbytes, seconds=seconds)


def _read_rate(file: FileIO, nbytes: int, *, seconds: float) -> float | None:
    """Bytes a second from the disk, not from the page cache; None if that is impossible."""
    memory = memoryview(mmap.mmap(-1, _LARGEST_BLOCK))  # aligned to a page for O_DIRECT
    for forget in (_bypass_cache, _drop_cache):
        try:
            forget(file)
            file.seek(0)
        except OSError:
            continue
        rate, error = _rate(lambda size: file.readinto(memory[:size]), nbytes, seconds=seconds)
        if not error:
            return rate
    return None


def _bypass_cache(file: FileIO) -> None:
    """Read a file without the page cache, if its file system supports that."""
    if not hasattr(os, "O_DIRECT"):
        raise OSError("not supported by this system")
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)


def _drop_cache(file: FileIO) -> None:
    """Drop a file from the page cache."""
    if not hasattr(os, "posix_fadvise"):
        raise OSError("not supported by this system")
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    fcntl.fcntl(file, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _rate(move: Callable[[int], int], nbytes: int, *, seconds: float) -> tuple[float | None, str]:
    """Move blocks until the time is over; block sizes grow while they are fast."""
    moved, size, failure = 0, _SMALLEST_BLOCK, ""
    begun = now = time.perf_counter()
    while moved < nbytes and now - begun < seconds:
        before = now
        try:
            count = move(min(size, nbytes - moved))
        except OSError as error:
            failure = reason_of(error)
            break
        now = time.perf_counter()
        moved += count
        if not count:
            break
        if now - before < seconds / 16:
            size = min(2 * size, _LARGEST_BLOCK)
        elif now - before > seconds / 4:
            size = max(size // 2, _SMALLEST_BLOCK)
    return (moved / (now - begun) if moved else None), failure


def _measured(facts: Disk, folder: Path, free: int) -> Disk:
    nbytes = min(_LARGEST_TRIAL, free // _FREE_PARTS) // _SMALLEST_BLOCK * _SMALLEST_BLOCK
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            facts = replace(facts, lacks=tuple(_lacking(file.fileno(), folder)))
            if not nbytes:
                return replace(facts, error=f"{format_bytes(free)} are free, too few to measure")
            writes, failure = write_rate(file, nbytes, seconds=_TRIAL_S)
            reads = None if writes is None else _read_rate(file, nbytes, seconds=_TRIAL_S)
    except OSError as error:
        return replace(facts, is_writable=False, error=reason_of(error))
    is_writable = writes is not None
    return replace(
        facts, is_writable=is_writable, write_rate=writes, read_rate=reads, error=failure
    )


def _lacking(file: int, folder: Path) -> Iterator[str]:
    """Operations that the file system refuses, and that grokctl can do without."""

    def sync_folder() -> None:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    attempts: dict[str, Callable[[], object]] = {
        "locks": lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB),
        "file modes": lambda: os.fchmod(file, 0o600),
        "folder syncs": sync_folder,
        "preallocation": lambda: os.posix_fallocate(file, 0, 1),
        "mappings": lambda: mmap.mmap(file, 1).close(),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError:
            continue  # no room to grow: nothing is known of mappings
        except OSError as error:
            if is_unsupported(error) or error.errno == errno.ENOLCK:
                yield name
        except AttributeError:  # macOS has no preallocation
            yield name
    os.ftruncate(file, 0)


def _device(path: Path) -> int | None:
    try:
        return existing(path).stat().st_dev
    except OSError:
        return None
