"""A dry run: the folders under home in which a release is proven, made for its length elsewhere."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from grokctl.paths import PRIVATE, TORRENT, Home
from grokctl.temporary import temporary_folder


@dataclass(frozen=True, slots=True)
class _Rehearsed(Home):
    """A home whose links to releases elsewhere, and their proofs, are a copy."""

    copy: Path

    @property
    def adopted(self) -> Path:
        """The copy."""
        return self.copy


@contextmanager
def rehearsed(home: Home) -> Iterator[Home]:
    """A home for a dry run: what is proven under it is forgotten, and the real one stays.

    Args:
        home: The real one, which need not exist.

    Raises:
        OSError: It cannot be read, or there is no folder for temporary files.
    """
    with temporary_folder() as folder:
        copy = folder.path / "adopted"
        for path in home.adopted.rglob("*"):
            _copy(path, copy / path.relative_to(home.adopted))
        yield _Rehearsed(home.root, copy)


def _copy(path: Path, target: Path) -> None:
    """Copy a link or one of grokctl's own small files; link to a file that a repair put there."""
    if path.is_dir() and not path.is_symlink():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        target.symlink_to(path.readlink())
    elif path.name == TORRENT or path.parent.name == PRIVATE:
        shutil.copyfile(path, target)
    elif PRIVATE not in path.parts:
        target.symlink_to(path.absolute())
