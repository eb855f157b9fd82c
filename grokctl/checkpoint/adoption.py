"""The record of a folder of others that a fetch takes over: whose files are not kept aside yet.

It is written before anything in the folder says that it is of this torrent, and deleted once what
does not fit is kept aside, of every file. Whatever happens between, the next fetch keeps it.
"""

import json
import os
from collections.abc import Collection
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from typing import Any, Final

from grokctl.checkpoint.torrent import Metainfo, read_metainfo
from grokctl.checkpoint.trust import read_object
from grokctl.errors import FetchError
from grokctl.own_files import names_in, open_below, opened_folder
from grokctl.paths import ADOPTION, PRIVATE, REPLACED, TORRENT, delete_record, write_atomically

_VERSION: Final = 1
_LARGEST: Final = 2**20
"""Bytes of the record."""


def is_adopting(root: Path) -> bool:
    """Whether files of others may lie where those of the torrent belong."""
    return (root / PRIVATE / ADOPTION).exists()


def begin_adoption(root: Path, metainfo: Metainfo, *, is_repair: bool = False) -> None:
    """Record that nothing in a folder is kept aside yet, and keep another torrent that lies there.

    Args:
        root: The folder.
        metainfo: The torrent that takes it over.
        is_repair: Whether the user calls what differs damage, which a repair may delete.

    Raises:
        OSError: The folder cannot be written.
    """
    _write(root, metainfo, (), is_repair=is_repair)
    with suppress(OSError, FetchError):
        if read_metainfo(root / TORRENT).infohash == metainfo.infohash:
            return
    with ExitStack() as stack:
        folder = stack.enter_context(opened_folder(root))
        if TORRENT not in names_in(folder):
            return
        kept = open_below(stack, root, (PRIVATE, REPLACED), make=True)
        numbers = (f"{TORRENT}.{number}" for number in count(1))
        taken = names_in(kept)
        name = next(name for name in numbers if name not in taken)
        os.rename(TORRENT, name, src_dir_fd=folder, dst_dir_fd=kept)


def is_for_repair(root: Path) -> bool:
    """Whether the user calls what differs in the folder damage."""
    return bool(_read(root).get("repair"))


def end_adoption(root: Path) -> None:
    """Nothing in the folder differs from the torrent, or all of it is kept aside.

    Raises:
        OSError: The folder cannot be written.
    """
    delete_record(root / PRIVATE / ADOPTION)


def files_to_keep(root: Path, metainfo: Metainfo) -> frozenset[int]:
    """The indices of the files whose data is to be kept aside before it is overwritten.

    Args:
        root: The folder.
        metainfo: The torrent that takes it over.

    Returns:
        All files if the record says nothing about this torrent; none if there is no record.

    Raises:
        TooLargeError: The record has more bytes than any of ours.
    """
    if not is_adopting(root):
        return frozenset()
    values = _read(root)
    kept = values.get("kept") if values.get("infohash") == metainfo.infohash else None
    known = {index for index in kept if type(index) is int} if isinstance(kept, list) else set()
    return frozenset(file.index for file in metainfo.files if not file.is_pad) - known


def record_kept(root: Path, metainfo: Metainfo, kept: Collection[int]) -> None:
    """Record files of which all that does not fit is kept aside; of all files: end the adoption.

    Args:
        root: The folder.
        metainfo: The torrent that takes it over.
        kept: Their indices.

    Raises:
        OSError: The folder cannot be written.
    """
    files = {file.index for file in metainfo.files if not file.is_pad}
    left = files_to_keep(root, metainfo) - set(kept)
    if left:
        _write(root, metainfo, files - left, is_repair=is_for_repair(root))
    else:
        end_adoption(root)


def _read(root: Path) -> dict[str, Any]:
    return read_object(root / PRIVATE / ADOPTION, limit=_LARGEST)


def _write(root: Path, metainfo: Metainfo, kept: Collection[int], *, is_repair: bool) -> None:
    values = {
        "version": _VERSION,
        "infohash": metainfo.infohash,
        "kept": sorted(kept),
        "repair": is_repair,
    }
    write_atomically(root / PRIVATE / ADOPTION, json.dumps(values).encode())
