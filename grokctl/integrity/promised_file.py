"""Read a file that a hub names the hash of: once, for that hash and for those of its ranges."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Final

from grokctl.checkpoint.hashtree import Hasher
from grokctl.checkpoint.hub_record import HubFile
from grokctl.integrity.pieces import Feeder, open_regular
from grokctl.system import optional

_BUFFER: Final = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFile:
    """The hashes of a file as it is on disk."""

    ranges: tuple[bytes, ...]
    """SHA-256 of each range."""
    found: str
    """Of all of it in hexadecimal: SHA-256, or SHA-1 of its git blob."""
    is_good: bool
    """Whether it has the size and the hash that the hub names."""


class _Both:
    """Feeds two hashers."""

    def __init__(self, whole: Hasher) -> None:
        self._whole = whole
        self._range = hashlib.sha256()

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        self._whole.update(data)
        self._range.update(data)

    def digest(self) -> bytes:
        return self._range.digest()


def read_promised(
    root: Path, file: HubFile, range_length: int, is_cancelled: Event, *, sync: bool = False
) -> ReadFile:
    """Hash a file and its ranges in one pass.

    Args:
        root: The release.
        file: The promise.
        range_length: Bytes of a range; the last one of a file is shorter.
        is_cancelled: Ends the pass early when set; its result is then meaningless.
        sync: Whether to wait first until the file is on the disk.

    Raises:
        OSError: It cannot be read.
    """
    whole = hashlib.sha256()
    if not file.sha256:
        whole = hashlib.sha1(b"blob %d\0" % file.nbytes, usedforsecurity=False)
    feeder = Feeder(_BUFFER, is_cancelled)
    ranges: list[bytes] = []
    handle = open_regular(root / file.place)
    try:
        if sync:
            with optional():
                os.fsync(handle)
        is_whole = os.fstat(handle).st_size == file.nbytes
        for start in range(0, file.nbytes, range_length):
            both = _Both(whole)
            is_whole &= feeder.feed(both, handle, start, min(file.nbytes, start + range_length))
            ranges.append(both.digest())
    finally:
        os.close(handle)
    found = whole.hexdigest()
    is_good = is_whole and found == (file.sha256 or file.blob)
    return ReadFile(ranges=tuple(ranges), found=found, is_good=is_good)
