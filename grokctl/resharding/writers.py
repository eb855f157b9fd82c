"""Device files while they grow: hashed on the way, with a journal for a run that is killed."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.frames import FRAME, Compression, Frames, compress
from grokctl.checkpoint.layout import DeviceLayout
from grokctl.checkpoint.manifest import FileRecord, file_name
from grokctl.checkpoint.tensor_source import (
    LogicalTensor,
    Slices,
    chunks,
    extent,
    index_of,
    overlap,
    within,
)
from grokctl.events import Advanced, Observer, Stage
from grokctl.resharding.convert import Squares
from grokctl.system import usable_cores

_BUFFER: Final = 4 * 2**20
_GLANCE_S: Final = 0.2
_FLUSH_EVERY: Final = 2**30
"""Bytes between two passes that hand files to the disk while more is made."""

Frame = tuple[int, bytes | memoryview]
"""Bytes that it decompresses to, and what is written."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a device's file has come at the end of a tensor."""

    nbytes: int
    sha256: str
    """Of all of it so far: what a later run believes, and not the size."""
    frames: tuple[tuple[int, int], ...]
    """Those since the mark before; none in a plain file."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the journal: a tensor that all device files hold."""

    marks: tuple[Mark, ...]
    """A mark for each device."""
    squares: Squares
    """What converting did to it."""

    def line(self) -> str:
        """As JSON."""
        marks = [[mark.nbytes, mark.sha256, mark.frames] for mark in self.marks]
        squares = [self.squares.error, self.squares.total]
        return json.dumps([marks, squares], separators=(",", ":")) + "\n"

    @classmethod
    def parse(cls, line: bytes, devices: int) -> Self | None:
        """Read a line; None if it is not whole."""
        try:
            marks, (error, total) = json.loads(line)
            found = cls(
                tuple(
                    Mark(int(nbytes), str(digest), tuple((int(a), int(b)) for a, b in frames))
                    for nbytes, digest, frames in marks
                ),
                Squares(float(error), float(total)),
            )
        except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError):
            return None
        is_sound = all(
            0 <= value < math.inf for value in (found.squares.error, found.squares.total)
        )
        return found if is_sound and len(found.marks) == devices else None


class Journal:
    """One line a tensor, in the order of the device files."""

    def __init__(self, path: Path, devices: int) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self._lengths: list[int] = []
        with suppress(OSError), path.open("rb") as file:
            for line in file:
                entry = Entry.parse(line, devices) if line.endswith(b"\n") else None
                if entry is None:
                    break
                self.entries.append(entry)
                self._lengths.append(len(line))

    def keep(self, count: int) -> None:
        """Forget all but the first entries; a kill on the way forgets none of these."""
        del self.entries[count:], self._lengths[count:]
        if self.path.exists():
            os.truncate(self.path, sum(self._lengths))

    def note(self, entry: Entry) -> None:
        """Add a tensor. Not synced: a line that outlives what it speaks of is found out."""
        line = entry.line()
        self.entries.append(entry)
        self._lengths.append(len(line))
        with self.path.open("a") as file:
            file.write(line)


class DeviceWriter:
    """One device's file: appended in order by one thread, hashed on the way."""

    def __init__(self, layout: DeviceLayout, folder: Path, compression: Compression | None) -> None:
        self.layout = layout
        self.name = file_name(layout, compression)
        self._compression = compression
        self._hasher = hashlib.sha256()
        self._frames: list[tuple[int, int]] = []
        self._slices = {held.tensor.key: held.slices for held in layout.tensors}
        self._marked = 0
        """Frames before the last mark."""
        self._scales: dict[str, NDArray[Any]] = {}
        self.nbytes = 0
        """Written so far."""
        self.plain_nbytes = 0
        """The same, decompressed."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._handle = os.open(folder / self.name, flags, 0o666)

    def believable(self, marks: Sequence[Mark]) -> Sequence[Mark]:
        """Marks as far as they are where tensors end."""
        plain = packed = 0
        for number, (mark, held) in enumerate(zip(marks, self.layout.tensors, strict=False)):
            if self._compression is None:
                is_sound = mark.nbytes == held.end and not mark.frames
            else:
                plain += sum(size for size, _ in mark.frames)
                packed += sum(size for _, size in mark.frames)
                is_sound = (plain, packed) == (held.end, mark.nbytes)
            if not is_sound:
                return marks[:number]
        return marks[: len(self.layout.tensors)]

    def hash_again(self, marks: Sequence[Mark], is_cancelled: Event) -> list[Any]:
        """Hash what an earlier run left, as far as it is what the journal says.

        Returns:
            The hasher as it was at every mark that holds.
        """
        hashers: list[Any] = []
        hasher = hashlib.sha256()
        buffer = memoryview(bytearray(_BUFFER))
        position = 0
        for mark in marks:
            while position < mark.nbytes:
                if is_cancelled.is_set():
                    return hashers
                count = os.preadv(self._handle, [buffer[: mark.nbytes - position]], position)
                if not count:
                    return hashers
                hasher.update(buffer[:count])
                position += count
                self.nbytes = position
            if hasher.hexdigest() != mark.sha256:
                break
            hashers.append(hasher.copy())
        return hashers

    def go_on(self, hasher: Any, marks: Sequence[Mark]) -> None:
        """Drop everything behind the last mark, or begin; `hasher` is the one at that mark."""
        self._frames = [frame for mark in marks for frame in mark.frames]
        self._marked = len(self._frames)
        self.nbytes = marks[-1].nbytes if marks else 0
        self.plain_nbytes = self.layout.tensors[len(marks) - 1].end if marks else 0
        os.ftruncate(self._handle, self.nbytes)
        if marks:
            self._hasher = hasher
        else:
            header = self.layout.header
            self.append(frames_of(header, len(header), self._compression))

    def append(self, frames: Iterable[Frame]) -> int:
        """Write and hash; return how many bytes that is, decompressed."""
        before = self.plain_nbytes
        for plain, data in frames:
            rest = memoryview(data)
            self._hasher.update(rest)
            while rest:
                count = os.pwrite(self._handle, rest, self.nbytes)
                rest = rest[count:]
                self.nbytes += count
            self.plain_nbytes += plain
            if self._compression is not None:
                self._frames.append((plain, len(data)))
        return self.plain_nbytes - before

    def keep_scales(self, weight: LogicalTensor, slices: Slices, scales: NDArray[Any]) -> None:
        """Remember scales that were made with a weight, until their own place comes.

        Args:
            weight: Which weight.
            slices: Which part of its scales.
            scales: Of that extent.
        """
        key = replace(weight, is_scales=True).key
        own = self._slices[key]
        kept = self._scales.get(key)
        if kept is None:
            kept = self._scales[key] = np.empty(extent(own), scales.dtype)
        both = overlap(slices, own)
        part = scales.reshape(extent(slices))[index_of(within(both, slices))]
        kept[index_of(within(both, own))] = part

    def append_scales(self, key: str) -> int:
        """Write scales that were kept."""
        scales = self._scales.pop(key)
        whole = tuple((0, length) for length in scales.shape)
        parts = (
            scales[index_of(part)].reshape(-1).view(np.uint8).data
            for part in chunks(whole, itemsize=scales.dtype.itemsize, limit=FRAME)
        )
        return sum(self.append(frames_of(part, len(part), self._compression)) for part in parts)

    def mark(self) -> Mark:
        """How far it is, at the end of a tensor."""
        frames = tuple(self._frames[self._marked :])
        self._marked = len(self._frames)
        return Mark(self.nbytes, self._hasher.hexdigest(), frames)

    def sync(self) -> None:
        """Wait until the disk has it."""
        os.fdatasync(self._handle)

    def record(self) -> FileRecord:
        """What the manifest says of it."""
        frames = Frames(tuple(self._frames)) if self._compression is not None else None
        return FileRecord(
            name=self.name, nbytes=self.nbytes, sha256=self._hasher.hexdigest(), frames=frames
        )

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


def frames_of(data: bytes | memoryview, size: int, compression: Compression | None) -> list[Frame]:
    """What is written of some bytes: themselves, or frames of `size` of them each."""
    whole = memoryview(data)
    if compression is None:
        return [(len(whole), whole)]
    parts = (whole[start : start + size] for start in range(0, len(whole), size))
    return [(len(part), compress(part, compression)) for part in parts]


def resume(writers: Sequence[DeviceWriter], journal: Journal, observe: Observer) -> int:
    """Go on behind the last tensor that all files hold, byte for byte, or begin.

    Args:
        writers: Just opened.
        journal: Of an earlier run, or empty; forgets what does not hold.
        observe: Receives progress in bytes while what is kept is hashed.

    Returns:
        How many tensors are done.
    """
    marks = [
        writer.believable([entry.marks[place] for entry in journal.entries])
        for place, writer in enumerate(writers)
    ]
    is_cancelled = Event()
    with ThreadPoolExecutor(min(len(writers), usable_cores())) as pool:
        try:
            jobs = [
                pool.submit(writer.hash_again, own, is_cancelled)
                for writer, own in zip(writers, marks, strict=True)
            ]
            while wait(jobs, timeout=_GLANCE_S).not_done:
                done = sum(writer.nbytes for writer in writers)
                detail = "hashes what is there already"
                observe(Advanced(stage=Stage.RESHARD, done=done, detail=detail))
        except BaseException:
            is_cancelled.set()
            raise
    hashers = [job.result() for job in jobs]
    done = min(map(len, hashers))
    journal.keep(done)
    for writer, own, found in zip(writers, marks, hashers, strict=True):
        writer.go_on(found[done - 1] if done else None, own[:done])
    return done


class Flusher:
    """Hands files to the disk while more is made, so that the last sync is short."""

    def __init__(self, writers: Sequence[DeviceWriter]) -> None:
        self._writers = writers
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._busy: Future[None] | None = None
        self._flushed = 0

    def poke(self, written: int) -> None:
        """Begin a pass if enough was written since the last.

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
        """Wait until the disk has everything.

        Raises:
            OSError: It does not take it. Systems say so once, so no pass goes unasked.
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
