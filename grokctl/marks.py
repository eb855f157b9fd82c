"""Marks of folders that grokctl made, so that no other that is renamed to their name is theirs."""

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from grokctl.own_files import create, names_in, open_own, opened_folder, why_not_own

MARK: Final = ".made-by-grokctl"
"""A file with the name and the inode of its folder: only who could write into that has made it."""
_MOST: Final = 1024


def put_mark(folder: int, name: str) -> None:
    """Mark an open folder as made under a name.

    Raises:
        FileExistsError: It has a mark.
        OSError: It cannot be written.
    """
    handle = create(MARK, folder, 0o600)
    try:
        os.write(handle, _text(folder, name))
    except BaseException:
        os.unlink(MARK, dir_fd=folder)
        raise
    finally:
        os.close(handle)


def is_marked(folder: int, name: str, *, is_copy: bool = False) -> bool:
    """Whether this user has marked an open folder as made under a name.

    Args:
        folder: Its descriptor.
        name: That which it was made under.
        is_copy: Whether a copy counts as well, which has the mark of another folder.
    """
    with suppress(OSError):
        handle = open_own(MARK, folder, Path(name) / MARK, flags=os.O_RDONLY)
        try:
            found, own = os.read(handle, _MOST), _text(folder, name)
            return found == own or (is_copy and found.splitlines()[:1] == own.splitlines()[:1])
        finally:
            os.close(handle)
    return False


def delete_marked(name: str, above: int, *, made_as: str) -> None:
    """Delete a folder with its mark and all that is in it; any other is left as it is.

    Args:
        name: Of the folder; a link is not followed.
        above: Descriptor of the folder that contains it.
        made_as: The name in its mark.

    Raises:
        OSError: It cannot be deleted.
    """
    with opened_folder(name, above=above) as folder:
        if why_not_own(os.fstat(folder)) is None and is_marked(folder, made_as):
            delete_in(folder, last=MARK)
            os.rmdir(name, dir_fd=above)


def delete_in(folder: int, *, last: str | None = None) -> None:
    """Delete all that is in an open folder, whatever becomes of its name meanwhile.

    Args:
        folder: Descriptor of it.
        last: A name in it that is deleted after all others.

    Raises:
        OSError: It cannot be deleted.
    """
    for name in sorted(names_in(folder), key=lambda name: name == last):
        mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
        if not stat.S_ISDIR(mode):
            os.unlink(name, dir_fd=folder)
            continue
        with opened_folder(name, above=folder) as inner:
            delete_in(inner)
        os.rmdir(name, dir_fd=folder)


def _text(folder: int, name: str) -> bytes:
    return f"{name}\n{os.fstat(folder).st_ino}\n".encode(errors="surrogateescape")
