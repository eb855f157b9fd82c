"""A second user of the machine, and the rights of files."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

OTHER: Final = 54_321
"""The number of a user and of a group that nobody has."""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")


def mode_of(path: Path) -> int:
    """The rights of a file or folder."""
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def user_of(settings: Path) -> Iterator[None]:
    """This user with other settings, and so with another key: somebody else, as records show it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(settings))
        yield
