"""The record of a folder of others that a fetch takes over: whose files are not kept aside yet.

It is written before anything in the folder says that it is of this torrent, and deleted once what
does not fit is kept aside, of every file. Whatever happens between, the next fetch keeps it.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Final

from grokctl.checkpoint.torrent import Metainfo
from grokctl.checkpoint.trust import read_object
from grokctl.paths import ADOPTION, PRIVATE, write_atomically

_VERSION: Final = 1
_LARGEST: Final = 2**20
"""Bytes of the record."""


def is_adopting(root: Path) -> bool:
    """Whether files of others may lie where those of the torrent belong."""
    return (root / PRIVATE / ADOPTION).exists()


def begin_adoption(root: Path, metainfo: Metainfo) -> None:
    """Record that nothing in a folder is kept aside yet.

    Args:
        root: The folder.
        metainfo: The torrent that takes it over.

    Raises:
        OSError: The folder cannot be written.
    """
    _write(root, metainfo, ())


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
    values = read_object(root / PRIVATE / ADOPTION, limit=_LARGEST)
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
        _write(root, metainfo, files - left)
    else:
        (root / PRIVATE / ADOPTION).unlink(missing_ok=True)


def _write(root: Path, metainfo: Metainfo, kept: Collection[int]) -> None:
    values = {"version": _VERSION, "infohash": metainfo.infohash, "kept": sorted(kept)}
    write_atomically(root / PRIVATE / ADOPTION, json.dumps(values).encode())
