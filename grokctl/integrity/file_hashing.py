"""SHA-256 of the files of a ready checkpoint."""

import hashlib
import os
from pathlib import Path
from threading import Event, Lock

from grokctl.integrity.pieces import AHEAD, Feeder, open_regular

_BUFFER = 2**20


class FileHashing:
    """Hashes whole files, in several threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.done = 0
        """Bytes hashed by all threads."""
        self.is_cancelled = Event()
        self._lock = Lock()

    def sha256(self, name: str, nbytes: int) -> str:
        """Hash one file; after a cancellation, the result is meaningless."""
        hasher = hashlib.sha256()
        feeder = Feeder(_BUFFER, self.is_cancelled)
        handle = open_regular(self.root / name)
        try:
            for start in range(0, nbytes, AHEAD):
                end = min(nbytes, start + AHEAD)
                if not feeder.feed(hasher, handle, start, end):
                    break
                with self._lock:
                    self.done += end - start
        finally:
            os.close(handle)
        return hasher.hexdigest()
