"""Marks of folders that grokctl made, so that no other that is renamed to their name is theirs."""

import os
import stat
from pathlib import Path
from typing import Final

from grokctl.own_files import create, names_in, open_own, opened_folder, why_not_own
from grokctl.own_key import MAC, KeyTroubleError, sealed, why_not_sealed

MARK: Final = ".made-by-grokctl"
"""A file with the name and the inode of its folder: only who could write into that has made it.
The MAC of this user shows that it was begun here, and is no part of an archive."""
_KIND: Final = "mark"
_MOST: Final = 1024


def put_mark(folder: int, name: str, *, is_new: bool = True) -> None:
    """Mark an open folder as made under a name.

    Args:
        folder: Its descriptor.
        name: Of the folder.
        is_new: Whether nothing was in it: then this user has written all that will be.

    Raises:
        FileExistsError: It has a mark.
        OSError: It cannot be written.
    """
    handle = create(MARK, folder, 0o600)
    try:
        os.write(handle, _text(folder, name) + (_mac(folder, name) if is_new else b""))
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
    found, own = _lines(folder, name), _text(folder, name).splitlines()
    return found[:2] == own or (is_copy and found[:1] == own[:1])


def is_begun_here(folder: int, name: str) -> bool:
    """Whether the mark of an open folder has the MAC of this user.

    Args:
        folder: Its descriptor.
        name: That which it was made under.
    """
    found, own = _lines(folder, name), _text(folder, name).splitlines()
    if found[:2] != own:
        return False
    record = {"text": _text(folder, name).hex(), MAC: b"".join(found[2:3]).decode("latin-1")}
    return why_not_sealed(_KIND, record) is None


def _lines(folder: int, name: str) -> list[bytes]:
    """The lines of a mark; none if there is none that this user can have written."""
    try:
        handle = open_own(MARK, folder, Path(name) / MARK, flags=os.O_RDONLY)
    except OSError:
        return []
    try:
        return os.read(handle, _MOST).splitlines()
    finally:
        os.close(handle)


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


def _mac(folder: int, name: str) -> bytes:
    """The third line; empty without a key of this user."""
    try:
        values = sealed(_KIND, {"text": _text(folder, name).hex()})
    except KeyTroubleError:
        return b""
    return f"{values[MAC]}\n".encode()
