"""Folders of a home from which programs are loaded and run: closed to everybody else."""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from grokctl.ownership import why_exposed
from grokctl.paths import quoted
from grokctl.system import optional

_PRIVATE: Final = 0o700


def make_private(folder: Path) -> None:
    """Make a folder that nobody else can read or write, two levels below the caches of a home.

    Args:
        folder: Such as `cache/xla/0.10.2-cpu` of a home.

    Raises:
        OSError: It cannot be made, or others could have changed what is in it.
    """
    home, cache = folder.parents[2], folder.parents[1]
    home.mkdir(parents=True, exist_ok=True)  # several people may share it
    for place in (cache, folder.parent, folder):
        with suppress(FileExistsError):
            place.mkdir(_PRIVATE)
    problem = why_not_private(folder)
    if problem is not None:
        raise OSError(errno.EPERM, problem)
    with optional():
        folder.chmod(_PRIVATE)


def why_not_private(folder: Path) -> str | None:
    """The reason why another user could have put a program into a folder; None if none could."""
    problem = why_exposed(folder)
    if problem is not None and problem.startswith(f"{folder} "):
        return f"{problem}; to begin a new one: rm -r {quoted(folder)}"
    if problem is None and folder.stat().st_uid != os.geteuid():
        return "it belongs to root"
    return problem
