"""Estimate the time of a plan from a short trial of its work and of the disk."""

import hashlib
import itertools
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Final

import numpy as np

from grokctl.machine.disks import write_rate
from grokctl.resharding.appending import LARGE, Appending
from grokctl.resharding.output import OutputPlan, Piece
from grokctl.resharding.publish import disk_of

_DISK_S: Final = 2.0
_LARGEST_TRIAL: Final = 2**31
"""Bytes that are written to measure a disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Measured rates, and the space of the result."""

    work_rate: float
    """Bytes a second that are read, converted, hashed and compressed, counted uncompressed."""
    disk_rate: float | None
    """Bytes a second that reach the disk; None if it cannot be written."""
    nbytes: int
    """Bytes of all files, after compression."""
    free_nbytes: int
    """Free bytes on the destination's disk."""

    def seconds(self, plan: OutputPlan) -> float:
        """The time of the whole plan: work and disk overlap, and the slower one decides."""
        disk = self.nbytes / self.disk_rate if self.disk_rate else 0.0
        return max(plan.bytes_out / self.work_rate, disk)


def estimate(plan: OutputPlan) -> Estimate:
    """Measure a small part of a plan; leaves no files.

    Raises:
        CorruptCheckpointError: The source changed.
    """
    folder = disk_of(plan.out, plan.kind)
    work_rate, ratio = _measure_work(plan)
    nbytes = round(plan.bytes_out * ratio)
    free = shutil.disk_usage(folder).free
    return Estimate(
        work_rate=work_rate,
        disk_rate=_measure_disk(
            folder,
            min(nbytes, free // 4, _LARGEST_TRIAL),
            is_large=any(layout.nbytes >= LARGE for layout in plan.layouts),
        ),
        nbytes=nbytes,
        free_nbytes=free,
    )


def _measure_work(plan: OutputPlan) -> tuple[float, float]:
    """Bytes a second, and the compression ratio."""
    pieces, source = plan.trial(), plan.reader()

    arrays = [np.empty(plan.array_nbytes, np.uint8) for _ in range(plan.jobs)]
    free: SimpleQueue[int] = SimpleQueue()
    for index, array in enumerate(arrays):
        array.fill(1)  # page faults would cost time
        free.put(index)

    def make(piece: Piece) -> tuple[int, int]:
        index = free.get()
        try:
            memory = arrays[index][: piece.nbytes]
            piece.make(source, memory)
            distinct = {
                id(own): own for own in piece.frames(memory.data, plan.compression).values()
            }
            written = 0
            for _, frame in itertools.chain.from_iterable(distinct.values()):
                hashlib.sha256(frame)
                written += len(frame)
            return piece.nbytes, written
        finally:
            free.put(index)

    started = time.perf_counter()
    with ThreadPoolExecutor(plan.jobs) as pool:
        sizes = list(pool.map(make, pieces))
    plain, written = (sum(column) for column in zip(*sizes, strict=True))
    return plain / (time.perf_counter() - started), written / plain


class _Appended:
    """A file that is written as large ones are."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._end = Appending(handle, 0, is_large=True)

    def write(self, data: memoryview) -> int:
        self._end.append(data)
        self._end.settle()
        return len(data)

    def fileno(self) -> int:
        return self._handle


def _measure_disk(folder: Path, nbytes: int, *, is_large: bool) -> float | None:
    """Write and sync a temporary file for two seconds at most."""
    with suppress(OSError), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        own = _Appended(file.fileno()) if is_large else file
        return write_rate(own, nbytes, seconds=_DISK_S)[0]
    return None
