"""Kinds of folders, and the files of one that is replaced: these are deleted, nothing else."""

import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grokctl.checkpoint.frames import SUFFIX
from grokctl.checkpoint.ready import SUMS
from grokctl.marks import MARK
from grokctl.own_files import names_in, opened_folder
from grokctl.paths import MANIFEST, PRIVATE, TOKENIZER

JOURNAL: Final = "journal"
"""The tensors that are written, in a partial folder."""
_DEVICE: Final = rf"device-\d\d-of-\d\d\.safetensors({re.escape(SUFFIX)})?"
_NAMES: Final = (SUMS, TOKENIZER, JOURNAL, MANIFEST, MARK, PRIVATE)
_OWN: Final = re.compile("|".join([_DEVICE, *map(re.escape, _NAMES)]))
_RECORD: Final = re.compile(r"\.?[a-z]+\.json(\.[0-9a-f]{8})?|lock|resume(\.begun)?")
"""Files in the private folder, and how they are called while they are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderKind:
    """A kind of folder that is published here, and the names of its files."""

    name: str
    """As `kind_of` has it."""
    words: str
    """The same in words, with an article."""
    manifest: str
    """The file that makes a folder one of this kind; it is written and moved last."""
    is_own_name: Callable[[str], bool]
    """Whether such a folder, complete or not, has a file of this name."""
    is_replaceable: bool = False
    """Whether `--force` replaces one."""


READY: Final = FolderKind(
    name="ready",
    words="a ready checkpoint",
    manifest=MANIFEST,
    is_own_name=lambda name: _OWN.fullmatch(name) is not None,
    is_replaceable=True,
)


def is_begun(names: Iterable[str], kind: FolderKind, *, is_copy: bool = False) -> bool:
    """Whether a folder with these names is a partial one: of an earlier version, if it has no mark.

    Args:
        names: All that are in it, but no mark.
        kind: What it would become.
        is_copy: Whether it is a copy of one that grokctl made: it need not have every file.
    """
    found = set(names)
    is_whole = JOURNAL in found and any(re.fullmatch(_DEVICE, name) for name in found)
    others = {kind.manifest, MARK, PRIVATE}
    return (is_whole or is_copy) and all(
        kind.is_own_name(name) and name not in others for name in found
    )


def foreign_in(path: Path, kind: FolderKind) -> str | None:
    """What is not of a folder of a kind: a path in one, or something below it; None if all is.

    Returns:
        Its name, below the folder.
    """
    if not kind.is_own_name(path.name):
        return path.name
    if path.is_symlink() or not path.is_dir():
        return None  # a link is deleted, and its target stays
    if path.name != PRIVATE:
        return path.name
    inside = (one for one in sorted(path.iterdir()) if not _is_record(one))
    return next((f"{PRIVATE}/{one.name}" for one in inside), None)


def _is_record(path: Path) -> bool:
    return _RECORD.fullmatch(path.name) is not None and (path.is_symlink() or not path.is_dir())


def delete_folder(name: str, above: int, kind: FolderKind, *, opened: int | None = None) -> None:
    """Delete the files of a folder of a kind, and the folder if that holds nothing else.

    Args:
        name: Of the folder; a link is not followed.
        kind: Of the folder.
        above: Descriptor of the folder that contains it.
        opened: Its own descriptor; nothing else that has its name by now is touched.
    """
    with suppress(OSError), opened_folder(name, above=above) as handle:
        if opened is None or os.path.samestat(os.fstat(opened), os.fstat(handle)):
            delete_files(handle, names_in(handle), kind)
            os.rmdir(name, dir_fd=above)


def delete_files(folder: int, names: Iterable[str], kind: FolderKind) -> None:
    """Delete files of a folder of a kind; a folder that has the name of one is none, and stays.

    Args:
        folder: Descriptor of the folder.
        names: In it; others than those of the kind are left out.
        kind: Of the folder.
    """
    for name in filter(kind.is_own_name, names):
        if name == PRIVATE:
            _delete_records(folder)
            continue
        with suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(name, dir_fd=folder)


def _delete_records(folder: int) -> None:
    with suppress(OSError), opened_folder(PRIVATE, above=folder) as private:
        for name in filter(_RECORD.fullmatch, names_in(private)):
            with suppress(IsADirectoryError):
                os.unlink(name, dir_fd=private)
        os.rmdir(PRIVATE, dir_fd=folder)
