"""Main memory: total, available, and the limit of our cgroup."""

import os
import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from grokctl.machine.facts import Memory
from grokctl.system import cgroup_folders


@dataclass(frozen=True, slots=True)
class _Version:
    """The files of one version of cgroups."""

    controllers: str
    """In the line of `/proc/self/cgroup` that names our cgroup."""
    mount: str
    limit: str
    current: str
    caches: tuple[str, ...]
    """Entries of `memory.stat` for cached file pages, which the kernel can reclaim."""


_VERSIONS = (
    _Version("", "sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")),
    _Version(
        "memory",
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")
"""The first line of a mapping, which ends with the path of a file; see proc_pid_smaps(5)."""


def memory(root: Path = Path("/")) -> Memory:
    """Memory as of now.

    Args:
        root: Where `proc`, `sys` and `dev` are.
    """
    total, available = _machine()
    limits = [(limit, used) for limit, used in _limits(root) if limit < total]
    # of nested cgroups, the one with the least memory left
    limit, used = min(limits, key=lambda pair: pair[0] - pair[1], default=(None, 0))
    shm = None
    with suppress(OSError):
        status = os.statvfs(root / "dev/shm")
        shm = status.f_blocks * status.f_frsize
    return Memory(total=total, available=available, limit=limit, used=used, shm=shm)


def limited(usable: int, most: int | None) -> int:
    """Bytes that a run may take, of those that are free and those that the user allows."""
    return usable if most is None else min(usable, most)


def peak_rss(root: Path = Path("/")) -> int:
    """Most main memory that this process has ever had, in bytes.

    Args:
        root: Where `proc` is mounted.
    """
    try:
        # of this process alone: `ru_maxrss` begins with the memory of the process that forked it
        status = (root / "proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, LookupError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def pages_of_files(ending: str, root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of mapped files that are in memory, and how many of them are in huge pages.

    Args:
        ending: Of the names of the files.
        root: Where `proc` is mounted.

    Returns:
        Zeros where nothing is mapped, or the system does not tell.
    """
    text = ""
    with suppress(OSError):
        text = (root / "proc/self/smaps").read_text(errors="replace")
    totals = {"Rss:": 0, "FilePmdMapped:": 0}
    is_one = False
    for line in text.splitlines():
        words = line.split()
        if _MAPPING.match(line):
            is_one = line.endswith(ending)
        elif is_one and len(words) > 1 and words[0] in totals and words[1].isdecimal():
            totals[words[0]] += 1024 * int(words[1])
    return totals["Rss:"], totals["FilePmdMapped:"]


def _machine() -> tuple[int, int]:
    """Total and available memory; without `/proc`, only free memory counts as available."""
    try:
        machine = psutil.virtual_memory()
    except (OSError, ValueError, LookupError, psutil.Error):
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    return machine.total, machine.available


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and usage of each of our cgroups that has a limit."""
    for version in _VERSIONS:
        mount = root / version.mount
        for folder in cgroup_folders(root, version.controllers, mount):
            limit = _number(folder / version.limit)
            used = _number(folder / version.current)
            if limit is not None and used is not None:
                yield limit, max(0, used - _cached(folder / "memory.stat", version.caches))


def _number(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None  # missing, or `max`


def _cached(path: Path, names: tuple[str, ...]) -> int:
    total = 0
    with suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            name, _, value = line.partition(" ")
            if name in names and value.isdecimal():
                total += int(value)
    return total
