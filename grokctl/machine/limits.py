"""Limits on threads, open files and memory: what this process may have, tried out."""

import errno
import os
import re
import resource
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grokctl.errors import HardwareError
from grokctl.system import cgroup_folders
from grokctl.text import format_bytes

ENOUGH_THREADS: Final = 64
"""A run on 16 virtual devices starts about 50."""
_SMALL_STACK: Final = 2**18
_STACKS: Final = 8 * 2**23
"""Bytes of address space for the stacks of eight threads."""
_ENOUGH_FILES: Final = 4096
_MEMORY: Final = (
    ("address space", "-v", resource.RLIMIT_AS, "VmSize"),
    ("data segment", "-d", resource.RLIMIT_DATA, "VmData"),
)
"""Limits of memory: name, option of `ulimit`, kind, and line of `/proc/self/status`."""
_LIBRARIES: Final = {"-v": 2**28, "-d": 2**26}
"""Bytes that numpy and the other libraries of every command take."""
_NO_LIBRARY: Final = "failed to map segment"
"""How the loader says that there is no memory for a library."""
_NO_THREAD: Final = "can't start new thread"
"""How Python says it; the class is only `RuntimeError`."""


def startable_threads(most: int) -> int:
    """Threads that this process can start now, by starting them; at most so many.

    Nothing else tells: `ulimit -u` counts all threads of a user, is not applied to root, and
    a cgroup of a container may allow fewer.
    """
    ends, threads = threading.Event(), []
    before = threading.stack_size()
    with suppress(ValueError):
        threading.stack_size(_SMALL_STACK)
    try:
        for _ in range(most):
            thread = threading.Thread(target=ends.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except (RuntimeError, MemoryError):
        pass
    finally:
        ends.set()
        for thread in threads:
            thread.join()
        with suppress(ValueError):
            threading.stack_size(before)
    return len(threads)


def require_threads(count: int) -> None:
    """Refuse to begin what would end in the middle, because libraries abort without a thread.

    Raises:
        HardwareError: This process cannot start so many threads.
    """
    found = startable_threads(count)
    if found < count:
        raise few_threads(f"expected {count} more, found {found}")


def few_threads(problem: str) -> HardwareError:
    """The error about a lack of threads, with the limits that there are.

    The stack of a thread needs memory: where a limit of that is nearly reached, it is the cause.
    """
    if any(limit.is_near for limit in memory_limits()):
        return little_memory()
    limits = ", ".join(thread_limits()) or "no limit that shows"
    return HardwareError(
        f"threads: {problem} ({limits})",
        "ulimit -u unlimited  # and for a container: docker run --pids-limit=-1",
    )


def require_files(count: int) -> None:
    """Refuse to begin what opens more files and connections than this process may have.

    Raises:
        HardwareError: The soft limit is lower, and cannot be raised.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and max(soft, hard) < count:
        raise HardwareError(
            f"open files: expected at least {count}, found {max(soft, hard)} (ulimit -n)",
            f"ulimit -n {_ENOUGH_FILES}",
        )


def thread_limits(root: Path = Path("/")) -> Iterator[str]:
    """What limits threads, in words.

    Args:
        root: Where `proc` and `sys` are.
    """
    most_of_user = limit_of(resource.RLIMIT_NPROC)
    if most_of_user is not None:
        yield f"ulimit -u {most_of_user}"
    mount = root / "sys/fs/cgroup"
    for controllers, place in (("", mount), ("pids", mount / "pids")):
        for folder in cgroup_folders(root, controllers, place):
            with suppress(OSError, ValueError):
                most = int((folder / "pids.max").read_text())
                used = int((folder / "pids.current").read_text())
                yield f"pids.max {most} of the cgroup, {used} in use"
                return


def limit_of(kind: int) -> int | None:
    """The soft limit of a resource; None without one."""
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A limit on the memory that this process may ask for."""

    name: str
    option: str
    """Of the shell's `ulimit`."""
    nbytes: int
    used: int
    """Bytes that this process has of it; 0 if that is not known."""

    @property
    def is_near(self) -> bool:
        """Whether the stacks of a few threads may not fit any more."""
        return self.nbytes - self.used < max(_STACKS, self.nbytes // 4)


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """The limits of memory that are set: of all addresses, and of what is not a file.

    Args:
        root: Where `proc` is.
    """
    status = ""
    with suppress(OSError):
        status = (root / "proc/self/status").read_text()
    found = []
    for name, option, kind, field in _MEMORY:
        most = limit_of(kind)
        used = re.search(rf"^{field}:\s*(\d+) kB", status, re.MULTILINE)
        if most is not None:
            found.append(MemoryLimit(name, option, most, 1024 * int(used[1]) if used else 0))
    return found


def little_memory() -> HardwareError:
    """The error about memory that the system did not give, with the limit if there is one."""
    limits = memory_limits()
    if not limits:
        return HardwareError("memory: the system has no more of it", "grokctl doctor")
    least = min(limits, key=lambda limit: limit.nbytes - limit.used)
    return HardwareError(
        f"{least.name}: {format_bytes(least.nbytes)} are too few (ulimit {least.option})",
        f"ulimit {least.option} unlimited",
    )


def require_memory() -> None:
    """Refuse to begin where libraries would end the process when they are loaded.

    Raises:
        HardwareError: Less than that is left of a limit of memory.
    """
    if any(limit.nbytes - limit.used < _LIBRARIES[limit.option] for limit in memory_limits()):
        raise little_memory()


def limit_in(words: str) -> HardwareError | None:
    """The error for what a library reports of a limit, in words only; None if it is another."""
    if os.strerror(errno.ENOMEM) in words or _NO_LIBRARY in words:
        return little_memory()
    if _NO_THREAD in words or os.strerror(errno.EAGAIN) in words:
        return few_threads("the system starts no more of them")
    return None
