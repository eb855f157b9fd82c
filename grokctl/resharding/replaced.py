"""The files of a ready checkpoint that is replaced: these are deleted, and nothing else."""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
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
_BEGUN: Final = re.compile("|".join([_DEVICE, *map(re.escape, (SUMS, TOKENIZER, JOURNAL))]))
"""Files of a checkpoint that is not complete."""
_OWN: Final = re.compile("|".join([_BEGUN.pattern, *map(re.escape, (MANIFEST, MARK, PRIVATE))]))
_RECORD: Final = re.compile(r"\.?[a-z]+\.json(\.[0-9a-f]{8})?|lock|resume(\.begun)?")
"""Files in the private folder, and how they are called while they are written."""


def is_own_name(name: str) -> bool:
    """Whether a ready checkpoint has a file of this name, or its private folder."""
    return _OWN.fullmatch(name) is not None


def is_begun(names: Iterable[str], *, is_copy: bool = False) -> bool:
    """Whether a folder with these names is a partial one of an earlier version.

    Args:
        names: All that are in it, but no mark.
        is_copy: Whether it is a copy of one that grokctl made: it need not have every file.
    """
    found = set(names)
    is_whole = JOURNAL in found and any(re.fullmatch(_DEVICE, name) for name in found)
    return (is_whole or is_copy) and all(map(_BEGUN.fullmatch, found))


def foreign_in(path: Path) -> str | None:
    """What is not of a ready checkpoint: a path in one, or something below it; None if all is.

    Returns:
        Its name, below the checkpoint.
    """
    if not is_own_name(path.name):
        return path.name
    if path.is_symlink() or not path.is_dir():
        return None  # a link is deleted, and its target stays
    if path.name != PRIVATE:
        return path.name
    inside = (one for one in sorted(path.iterdir()) if not _is_record(one))
    return next((f"{PRIVATE}/{one.name}" for one in inside), None)


def _is_record(path: Path) -> bool:
    return _RECORD.fullmatch(path.name) is not None and (path.is_symlink() or not path.is_dir())


def delete_checkpoint(name: str, above: int, *, opened: int | None = None) -> None:
    """Delete the files of a ready checkpoint, and its folder if that holds nothing else.

    Args:
        name: Of the folder; a link is not followed.
        above: Descriptor of the folder that contains it.
        opened: Its own descriptor; nothing else that has its name by now is touched.
    """
    with suppress(OSError), opened_folder(name, above=above) as handle:
        if opened is None or os.path.samestat(os.fstat(opened), os.fstat(handle)):
            delete_files(handle, names_in(handle))
            os.rmdir(name, dir_fd=above)


def delete_files(folder: int, names: Iterable[str]) -> None:
    """Delete files of a ready checkpoint; a folder that has the name of one is none, and stays.

    Args:
        folder: Descriptor of the checkpoint.
        names: In it; others than a checkpoint's own are left out.
    """
    for name in filter(is_own_name, names):
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
