"""Hash the files of a ready checkpoint while a reshard reads them: their pages are in memory then.

The hashing trails the reshard by its share of the work, as both go through the files from the
beginning to the end. What the reshard does not read of a file, as another device has it, is read
here, once. A run that continues hashes every file: who knows what the earlier one has read. Files
that a receipt covers, unchanged since, are not hashed.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Event, Thread
from typing import Any, Final, Self

from grokctl.checkpoint.manifest import FileRecord
from grokctl.checkpoint.published import Checkpoint
from grokctl.checkpoint.ready_receipt import hashed_before, read_ready_receipt
from grokctl.checkpoint.receipt import Receipt
from grokctl.checkpoint.release import Release
from grokctl.errors import Damage
from grokctl.events import Advanced, Observer, Stage
from grokctl.integrity.pieces import Feeder, open_regular
from grokctl.integrity.ready_content import altered, unreadable
from grokctl.os_errors import refusal
from grokctl.system import usable_cores

_BUFFER: Final = 2**20
_STEP: Final = 8 * 2**20
"""Bytes that are hashed at a time."""
_BEHIND: Final = 32 * 2**20
"""Bytes of a file that the hashing stays behind: it must not read what the reshard has not."""
_FARTHEST: Final = 2**30
"""Bytes that it may fall behind: memory keeps the pages so long. Then the reshard waits."""
_POLL_S: Final = 0.2


@dataclass(slots=True)
class _File:
    """One file, and how far it is hashed."""

    record: FileRecord
    handle: int | None
    """None if it cannot be opened."""
    hasher: Any = field(default_factory=hashlib.sha256)
    done: int = 0
    goal: int = 0
    trouble: OSError | None = None

    @property
    def is_behind(self) -> bool:
        return self.done < self.goal and self.trouble is None


class SourceHashing:
    """Threads that hash device files, as a context manager that ends them."""

    receipt: Receipt | None = None
    """A ready checkpoint proves itself by its manifest."""
    identity: str | None = None

    def __init__(self, source: Checkpoint, stage: Stage = Stage.RESHARD) -> None:
        """Open the device files, and start no thread yet.

        Args:
            source: A ready checkpoint, whose manifest has the hashes; of a release, which a
                receipt proves, nothing is hashed. The stamps of its files were taken before, and
                are compared at the end: what changes later is not published.
            stage: That reports the progress.
        """
        self._source = source
        self._stage = stage
        self._changed = Condition()
        self._is_cancelled = Event()
        self._includes_all = False
        records: list[FileRecord] = []
        if not isinstance(source, Release):
            before = hashed_before(source, read_ready_receipt(source))
            records = [record for record in source.tensor_files if record.name not in before]
        self._files = [_opened(source.root, record) for record in records]
        count = min(len(self._files), usable_cores())
        self._threads = [
            Thread(target=self._run, args=(self._files[place::count],), name=f"hash-{place}")
            for place in range(count)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_cancelled.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for file in self._files:
            if file.handle is not None:
                os.close(file.handle)

    def include_all(self) -> None:
        """Hash also the files from which nothing is read: an earlier run has read them."""
        self._includes_all = True

    def follow(self, done: int, total: int, observe: Observer) -> None:
        """Hash as far as the reshard has come; wait if that is much farther.

        Args:
            done: Bytes written so far.
            total: Bytes that will be written.
            observe: Receives progress while it waits.
        """
        with self._changed:
            for file in self._read():
                reached = file.record.nbytes * done // total - _BEHIND
                file.goal = max(file.goal, reached)
            self._changed.notify_all()
        self._catch_up(_FARTHEST, done, observe)

    def finish(self, total: int, observe: Observer) -> list[Damage]:
        """Hash the rest of every file that was read.

        Args:
            total: Bytes that were written.
            observe: Receives progress.

        Returns:
            The files that do not have the hashes of the manifest.

        Raises:
            GrokctlError: The machine refuses to read a file.
        """
        files = self._read()
        with self._changed:
            for file in files:
                file.goal = file.record.nbytes
            self._changed.notify_all()
        self._catch_up(0, total, observe)
        return [damage for file in files if (damage := _damage_to(self._source.root, file))]

    def _read(self) -> list[_File]:
        """The files from which the reshard has read something, or an earlier run may have."""
        if self._includes_all:
            return self._files
        source = self._source
        opened = frozenset() if isinstance(source, Release) else source.opened
        return [file for file in self._files if file.record.name in opened]

    def _catch_up(self, limit: int, done: int, observe: Observer) -> None:
        """Wait until the hashing is at most so many bytes behind."""
        while self._missing() > limit:
            with self._changed:
                self._changed.wait(_POLL_S)
            observe(Advanced(stage=self._stage, done=done, detail="hashing the source"))

    def _missing(self) -> int:
        return sum(file.goal - file.done for file in self._files if file.is_behind)

    def _run(self, files: Sequence[_File]) -> None:
        """Hash some files, each up to its goal: the whole life of a thread."""
        feeder = Feeder(_BUFFER, self._is_cancelled)
        while True:
            with self._changed:
                while not (self._is_cancelled.is_set() or any(file.is_behind for file in files)):
                    self._changed.wait()
            if self._is_cancelled.is_set():
                return
            file = max(files, key=lambda file: file.goal - file.done if file.is_behind else 0)
            end = min(file.goal, file.done + _STEP)
            assert file.handle is not None
            try:
                if not feeder.feed(file.hasher, file.handle, file.done, end):
                    file.trouble = OSError("ends early")
            except OSError as error:
                file.trouble = error
            with self._changed:
                file.done = end
                self._changed.notify_all()


def _opened(root: Path, record: FileRecord) -> _File:
    """A file, or the trouble with it, which matters only if the reshard reads it."""
    try:
        return _File(record, open_regular(root / record.name))
    except OSError as error:
        return _File(record, None, trouble=error)


def _damage_to(root: Path, file: _File) -> Damage | None:
    if file.trouble is None:
        return altered(file.record, file.hasher.hexdigest())
    try:
        return unreadable(root, file.record, file.trouble)
    except OSError as error:
        raise refusal(error) from error
