"""Files while they grow: hashed as they are written, with a journal to resume from."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from grokctl.checkpoint.frames import FRAME, SUFFIX, Compression, Frames
from grokctl.checkpoint.manifest import FileRecord
from grokctl.checkpoint.tensor_source import chunks, extent, index_of, overlap, within
from grokctl.events import Advanced, Observer, Stage
from grokctl.resharding.appending import LARGE, Appending
from grokctl.resharding.convert import Squares
from grokctl.resharding.output import Frame, KeptScales, Layout, frames_of
from grokctl.resharding.partial import PartialFolder
from grokctl.resharding.replaced import JOURNAL
from grokctl.system import optional, usable_cores

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BUFFER: Final = 4 * 2**20
_LONGEST_LINE: Final = 2**24
"""Bytes of a line of the journal: the frames of a tensor."""
_PROGRESS_EVERY_S: Final = 0.2
_FLUSH_EVERY: Final = 2**30
"""Bytes written between two background syncs."""


@dataclass(frozen=True, slots=True)
class FileState:
    """A file at the end of a tensor."""

    nbytes: int
    sha256: str
    """Of all bytes so far: a later run trusts this, and not the size."""
    frames: tuple[tuple[int, int], ...]
    """Frames since the previous state; none in an uncompressed file."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the journal: a tensor that is written to the end."""

    states: tuple[FileState, ...]
    """One for each file."""
    squares: Squares
    """The error of its conversion."""

    def line(self) -> str:
        """The line, as JSON."""
        states = [[state.nbytes, state.sha256, state.frames] for state in self.states]
        squares = [self.squares.error, self.squares.total]
        return json.dumps([states, squares], separators=(",", ":")) + "\n"

    @classmethod
    def parse(cls, line: bytes, files: int) -> Self | None:
        """Read a line; None if it is incomplete or invalid."""
        try:
            states, (error, total) = json.loads(line)
            entry = cls(
                tuple(
                    FileState(int(nbytes), str(digest), tuple((int(a), int(b)) for a, b in frames))
                    for nbytes, digest, frames in states
                ),
                Squares(float(error), float(total)),
            )
        except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError):
            return None
        is_valid = all(
            0 <= value < math.inf for value in (entry.squares.error, entry.squares.total)
        )
        return entry if is_valid and len(entry.states) == files else None


class Journal:
    """A file with one line per tensor, in the order of all files."""

    def __init__(self, folder: PartialFolder, files: int) -> None:
        """Read the entries of an earlier run, up to the first that makes no sense.

        Raises:
            OSError: It may be another user's, or cannot be read.
        """
        self.entries: list[Entry] = []
        self._lengths: list[int] = []
        self._file = os.fdopen(folder.open(JOURNAL, os.O_APPEND), "a+b", buffering=0)
        with os.fdopen(os.dup(self._file.fileno()), "rb") as file:
            file.seek(0)
            while line := file.readline(_LONGEST_LINE):
                entry = Entry.parse(line, files) if line.endswith(b"\n") else None
                if entry is None:
                    break
                self.entries.append(entry)
                self._lengths.append(len(line))

    @property
    def is_begun(self) -> bool:
        """Whether the file has any bytes."""
        return os.fstat(self._file.fileno()).st_size > 0

    def truncate(self, count: int) -> None:
        """Delete all entries after the first `count`; a kill meanwhile loses none of those."""
        del self.entries[count:], self._lengths[count:]
        self._file.truncate(sum(self._lengths))

    def append(self, entry: Entry) -> None:
        """Add a tensor. Not synced: a line without its data does not match the hashes."""
        line = entry.line().encode()
        self.entries.append(entry)
        self._lengths.append(len(line))
        rest = memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class FileWriter:
    """One file: appended in order by one thread, and hashed as it is written."""

    def __init__(
        self, layout: Layout, folder: PartialFolder, compression: Compression | None
    ) -> None:
        self.layout = layout
        self.name = layout.name if compression is None else layout.name + SUFFIX
        self._compression = compression
        self._hasher = hashlib.sha256()
        self._frames: list[tuple[int, int]] = []
        self._recorded = 0
        """Frames before the end of the last tensor."""
        self._scales: dict[str, NDArray[Any]] = {}
        self.nbytes = 0
        """Bytes written so far."""
        self.plain_nbytes = 0
        """The same before compression."""
        self._handle = folder.open(self.name)
        self._end = Appending(self._handle, 0, is_large=False)

    def plausible(self, states: Sequence[FileState]) -> Sequence[FileState]:
        """The first states of a journal, up to one that does not match the layout."""
        plain = packed = 0
        for count, (state, end) in enumerate(zip(states, self.layout.ends, strict=False)):
            if self._compression is None:
                matches = state.nbytes == end and not state.frames
            else:
                plain += sum(size for size, _ in state.frames)
                packed += sum(size for _, size in state.frames)
                matches = (plain, packed) == (end, state.nbytes)
            if not matches:
                return states[:count]
        return states[: len(self.layout.ends)]

    def rehash(self, states: Sequence[FileState], is_cancelled: Event) -> list[Any]:
        """Hash the file of an earlier run, as far as it matches the journal.

        Returns:
            The hasher at every state that matches.
        """
        hashers: list[Any] = []
        hasher = hashlib.sha256()
        buffer = memoryview(bytearray(_BUFFER))
        position = 0
        for state in states:
            while position < state.nbytes:
                if is_cancelled.is_set():
                    return hashers
                count = os.preadv(self._handle, [buffer[: state.nbytes - position]], position)
                if not count:
                    return hashers
                hasher.update(buffer[:count])
                position += count
                self.nbytes = position
            if hasher.hexdigest() != state.sha256:
                break
            hashers.append(hasher.copy())
        return hashers

    def resume(self, hasher: Any, states: Sequence[FileState]) -> None:
        """Truncate the file to the last state, or begin it; `hasher` is the one at that state."""
        self._frames = [frame for state in states for frame in state.frames]
        self._recorded = len(self._frames)
        self.nbytes = states[-1].nbytes if states else 0
        self.plain_nbytes = self.layout.ends[len(states) - 1] if states else 0
        os.ftruncate(self._handle, self.nbytes)
        is_large = self.layout.nbytes >= LARGE
        self._end = Appending(self._handle, self.nbytes, is_large=is_large)
        if states:
            self._hasher = hasher
        else:
            header = self.layout.header
            self.append(frames_of(header, len(header), self._compression))

    def append(self, frames: Iterable[Frame]) -> int:
        """Write and hash frames; return their bytes before compression."""
        before = self.plain_nbytes
        for plain, data in frames:
            self._hasher.update(data)
            self._end.append(memoryview(data))
            self.nbytes += len(data)
            self.plain_nbytes += plain
            if self._compression is not None:
                self._frames.append((plain, len(data)))
        return self.plain_nbytes - before

    def keep_scales(self, scales: KeptScales) -> None:
        """Keep scales that were made with their weight until it is their turn in the file."""
        key = scales.tensor.key
        own = self.layout.slices[key]
        kept = self._scales.get(key)
        if kept is None:
            kept = self._scales[key] = np.empty(extent(own), scales.values.dtype)
        both = overlap(scales.slices, own)
        part = scales.values.reshape(extent(scales.slices))[index_of(within(both, scales.slices))]
        kept[index_of(within(both, own))] = part

    def append_scales(self, key: str) -> int:
        """Write the scales of `keep_scales`."""
        scales = self._scales.pop(key)
        whole = tuple((0, length) for length in scales.shape)
        parts = (
            scales[index_of(part)].reshape(-1).view(np.uint8).data
            for part in chunks(whole, itemsize=scales.dtype.itemsize, limit=FRAME)
        )
        return sum(self.append(frames_of(part, len(part), self._compression)) for part in parts)

    def end_tensor(self) -> FileState:
        """The state of the file at the end of a tensor, which is then in it."""
        self._end.settle()
        frames = tuple(self._frames[self._recorded :])
        self._recorded = len(self._frames)
        return FileState(self.nbytes, self._hasher.hexdigest(), frames)

    def sync(self) -> None:
        """Wait until the file is on disk."""
        with optional():
            os.fdatasync(self._handle)

    def record(self) -> FileRecord:
        """Its entry in the manifest."""
        frames = Frames(tuple(self._frames)) if self._compression is not None else None
        return FileRecord(
            name=self.name, nbytes=self.nbytes, sha256=self._hasher.hexdigest(), frames=frames
        )

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


def resume(writers: Sequence[FileWriter], journal: Journal, stage: Stage, observe: Observer) -> int:
    """Continue after the last tensor that all files contain, byte for byte, or begin.

    Args:
        writers: Just opened.
        journal: Of an earlier run, or empty; entries that do not match are deleted.
        stage: That reports the progress.
        observe: Receives progress in bytes while the files are hashed.

    Returns:
        The number of tensors that are done.
    """
    states = [
        writer.plausible([entry.states[place] for entry in journal.entries])
        for place, writer in enumerate(writers)
    ]
    is_cancelled = Event()
    with ThreadPoolExecutor(min(len(writers), usable_cores())) as pool:
        try:
            jobs = [
                pool.submit(writer.rehash, own, is_cancelled)
                for writer, own in zip(writers, states, strict=True)
            ]
            while wait(jobs, timeout=_PROGRESS_EVERY_S).not_done:
                done = sum(writer.nbytes for writer in writers)
                detail = "hashing existing files"
                observe(Advanced(stage=stage, done=done, detail=detail))
        except BaseException:
            is_cancelled.set()
            raise
    hashers = [job.result() for job in jobs]
    done = min(map(len, hashers))
    journal.truncate(done)
    for writer, own, known in zip(writers, states, hashers, strict=True):
        writer.resume(known[done - 1] if done else None, own[:done])
    return done


class Flusher:
    """Syncs files in the background, so that the last sync is short."""

    def __init__(self, writers: Sequence[FileWriter]) -> None:
        self._writers = writers
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._busy: Future[None] | None = None
        self._flushed = 0

    def advance(self, written: int) -> None:
        """Begin a sync if enough was written since the last one.

        Raises:
            OSError: The last one failed.
        """
        if self._busy is not None and self._busy.done():
            self._busy.result()
            self._busy = None
        if self._busy is None and written - self._flushed >= _FLUSH_EVERY:
            self._flushed = written
            self._busy = self._pool.submit(self._pass)

    def finish(self) -> None:
        """Wait until everything is on disk.

        Raises:
            OSError: A sync failed. The system reports this only once, so every result is checked.
        """
        if self._busy is not None:
            self._busy.result()
        self._pool.submit(self._pass).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _pass(self) -> None:
        for writer in self._writers:
            writer.sync()
