"""Limits on threads, locked memory and address space: what this process may have, tried out."""

import resource
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from grokctl.errors import HardwareError
from grokctl.system import cgroup_folders
from grokctl.text import format_bytes

ENOUGH_THREADS: Final = 64
"""A run on 16 virtual devices starts about 50."""
_SMALL_STACK: Final = 2**18


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
    """The error about a lack of threads, with the limits that there are."""
    limits = ", ".join(thread_limits()) or "no limit that shows"
    return HardwareError(
        f"threads: {problem} ({limits})",
        "ulimit -u unlimited  # and, for a container, docker run --pids-limit=-1 …",
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


def little_memory() -> HardwareError:
    """The error about memory that the system did not give, with the limit if there is one."""
    space = limit_of(resource.RLIMIT_AS)
    if space is None:
        return HardwareError("memory: the system has no more of it", "grokctl doctor")
    return HardwareError(
        f"address space: {format_bytes(space)} are too few (ulimit -v)", "ulimit -v unlimited"
    )
