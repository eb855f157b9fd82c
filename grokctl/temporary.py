"""Temporary folders: made where nobody else can rename them, and deleted below an open folder."""

import errno
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grokctl.marks import delete_in
from grokctl.own_files import opened_folder
from grokctl.ownership import exposures

PLACES: Final = ("/tmp", "/dev/shm", "/var/tmp")  # noqa: S108 (a folder of our own there)
"""Where one is made if `TMPDIR` is a folder in which others can rename it."""


@dataclass(frozen=True, slots=True)
class TemporaryFolder:
    """An open folder that only this user can enter, and the open folder that contains it."""

    path: Path
    handle: int
    above: int

    @property
    def is_in_place(self) -> bool:
        """Whether its path still leads to it."""
        try:
            return os.path.samestat(self.path.lstat(), os.fstat(self.handle))
        except OSError:
            return False

    def delete(self) -> None:
        """Delete all that is in it, and itself if its name is still its own."""
        with suppress(OSError):
            delete_in(self.handle)
        if self.is_in_place:
            with suppress(OSError):
                os.rmdir(self.path.name, dir_fd=self.above)


@contextmanager
def temporary_folder(
    prefix: str = "grokctl-",
    *,
    places: Sequence[Path] = (),
    suits: Callable[[Path], None] = lambda _: None,
) -> Iterator[TemporaryFolder]:
    """Make a folder in here, which is gone at the end.

    Args:
        prefix: Of its name.
        places: Folders that are made for it if no usual place will do.
        suits: Gets the folder, and raises an `OSError` if it will not do.

    Raises:
        OSError: There is no place for it, with the reason of the first.
    """
    first: OSError | None = None
    for parent in _parents(places):
        with ExitStack() as stack:
            try:
                folder = _made(stack, parent, prefix, is_ours=parent in places)
                suits(folder.path)
            except OSError as error:
                first = first or error
                continue
            yield folder
            return
    assert first is not None
    raise first


def _made(stack: ExitStack, parent: Path, prefix: str, *, is_ours: bool) -> TemporaryFolder:
    """Make a folder in another.

    Raises:
        OSError: Others could rename it there, or it cannot be made.
    """
    path = parent / f"{prefix}{secrets.token_hex(4)}"
    for place, _, problem in exposures(path, is_made=True):
        reason = f"no temporary folder there: {place} {problem}"
        raise OSError(errno.EACCES, reason, str(parent))
    if is_ours:
        parent.mkdir(parents=True, exist_ok=True)
    above = stack.enter_context(opened_folder(parent))
    os.mkdir(path.name, 0o700, dir_fd=above)
    handle = stack.enter_context(opened_folder(path.name, above=above))
    folder = TemporaryFolder(path, handle, above)
    stack.callback(folder.delete)
    return folder


def _parents(places: Sequence[Path]) -> Iterator[Path]:
    with suppress(OSError):
        yield Path(tempfile.gettempdir()).resolve()
    yield from map(Path, PLACES)
    yield from places
