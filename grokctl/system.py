"""What the operating system allows this process: cgroups, usable cores, optional operations."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Final

_REFUSALS: Final = frozenset(
    {
        errno.EINVAL,
        errno.ENODEV,
        errno.ENOSYS,
        errno.ENOTSUP,
        errno.EOPNOTSUPP,
        errno.ENOTTY,
        errno.EPERM,
    }
)
"""What file systems say that lack an operation: DrvFs, CIFS, exFAT, 9p and FUSE all differ."""


def is_unsupported(error: OSError) -> bool:
    """Whether a file system, or a filter of system calls, refuses an operation as such."""
    return error.errno in _REFUSALS


@contextmanager
def optional(*also: int) -> Iterator[None]:
    """Try an operation that is good to have, and do without it where it does not exist.

    Args:
        also: Numbers of other errors that mean the same here.

    Raises:
        OSError: It failed for another reason, such as a full disk.
    """
    try:
        yield
    except OSError as error:
        if not is_unsupported(error) and error.errno not in also:
            raise


class Reading(Enum):
    """What is to be read of a file."""

    IN_ORDER = "POSIX_FADV_SEQUENTIAL"
    """All of it, from beginning to end."""
    SOON = "POSIX_FADV_WILLNEED"
    """The part that is named: it is fetched now, without waiting."""


def announce(handle: int, reading: Reading, *, offset: int = 0, nbytes: int = 0) -> None:
    """Tell the kernel what will be read, where it listens: macOS has no such call.

    Args:
        handle: An open file.
        reading: What will be read.
        offset: Of the part.
        nbytes: Of the part; 0 for everything from `offset` on.
    """
    with suppress(AttributeError, OSError):
        os.posix_fadvise(handle, offset, nbytes, getattr(os, reading.value))


def machine_id() -> str:
    """The same for all processes on this machine, and different elsewhere."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use, after affinity and cgroup quotas; at least 1.

    Args:
        root: Where `proc` and `sys` are.
    """
    bound = bound_cores()
    cores = (os.cpu_count() or 1) if bound is None else len(bound)
    return max(1, min([cores, *map(int, _quotas(root))]))


def bound_cores() -> frozenset[int] | None:
    """The cores to which this process is bound by affinity; None where there is no such thing."""
    with suppress(AttributeError, OSError):  # macOS has no affinity
        return frozenset(os.sched_getaffinity(0))
    return None


def cgroup_folders(root: Path, controllers: str, mount: Path) -> Iterator[Path]:
    """Folders of this process's cgroup and of its ancestors, the innermost first.

    A container may see its own cgroup as the root, although `/proc` has the path outside.

    Args:
        root: Where `proc` is.
        controllers: As in `/proc/self/cgroup`; empty in cgroups v2.
        mount: Where these cgroups are mounted.
    """
    text = ""
    with suppress(OSError):
        text = (root / "proc/self/cgroup").read_text(errors="replace")
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        parts = [part for part in path.split("/") if part not in {"", ".", ".."}]
        if controllers in names.split(","):
            yield from (mount.joinpath(*parts[:depth]) for depth in range(len(parts), 0, -1))
    yield mount


def _quotas(root: Path) -> Iterator[float]:
    """Cores that each cgroup with a quota allows."""
    mount = root / "sys/fs/cgroup"
    for folder in cgroup_folders(root, "", mount):
        yield from _quotient(folder, "cpu.max")
    for folder in cgroup_folders(root, "cpu", mount / "cpu"):
        yield from _quotient(folder, "cpu.cfs_quota_us", "cpu.cfs_period_us")


def _quotient(folder: Path, *names: str) -> Iterator[float]:
    """Quota divided by period; nothing without a quota."""
    with suppress(OSError, ValueError):  # `max` is not a number
        quota, period = (
            int(word) for name in names for word in (folder / name).read_text().split()
        )
        if quota > 0 and period > 0:  # -1 means no limit
            yield quota / period
