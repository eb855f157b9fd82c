"""Hash the files of a ready checkpoint."""

import hashlib
import os
from pathlib import Path
from threading import Event, Lock
from typing import Final

from grokctl.integrity.pieces import AHEAD, feed, open_regular

_BUFFER: Final = 2**20


class FileHashing:
    """Whole files, hashed by several threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.done = 0
        """Bytes, by all threads."""
        self.is_cancelled = Event()
        self._lock = Lock()

    def sha256(self, name: str, nbytes: int) -> str:
        """Hash one file; the result means nothing after a cancellation."""
        hasher = hashlib.sha256()
        buffer = memoryview(bytearray(_BUFFER))
        handle = open_regular(self.root / name)
        try:
            for start in range(0, nbytes, AHEAD):
                end = min(nbytes, start + AHEAD)
                if not feed(hasher, handle, start, end, buffer, self.is_cancelled):
                    break
                with self._lock:
                    self.done += end - start
        finally:
            os.close(handle)
        return hasher.hexdigest()
