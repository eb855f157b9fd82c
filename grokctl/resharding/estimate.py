"""Estimate the time of a reshard from a short trial of its work and of the disk."""

import hashlib
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
from grokctl.resharding.pipeline import frames_by_outputs
from grokctl.resharding.plan import ReshardPlan
from grokctl.resharding.publish import disk_of
from grokctl.resharding.slices import Cut, cuts_of

_DISK_S: Final = 2.0
_LARGEST_TRIAL: Final = 2**31
"""Bytes that are written to measure a disk."""
_SAMPLES: Final = 12
"""Arrays, from all over the model, that are made to measure the work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Measured rates, and the space of a reshard."""

    work_rate: float
    """Bytes a second that are read, converted, hashed and compressed, counted uncompressed."""
    disk_rate: float | None
    """Bytes a second that reach the disk; None if it cannot be written."""
    nbytes: int
    """Bytes of all device files, after compression."""
    free_nbytes: int
    """Free bytes on the destination's disk."""

    def seconds(self, plan: ReshardPlan) -> float:
        """The time of the whole plan: work and disk overlap, and the slower one decides."""
        disk = self.nbytes / self.disk_rate if self.disk_rate else 0.0
        return max(plan.bytes_out / self.work_rate, disk)


def estimate(plan: ReshardPlan) -> Estimate:
    """Measure a small part of a plan; leaves no files.

    Raises:
        CorruptCheckpointError: The source changed.
    """
    folder = disk_of(plan.out)
    work_rate, ratio = _measure_work(plan)
    nbytes = round(plan.bytes_out * ratio)
    free = shutil.disk_usage(folder).free
    return Estimate(
        work_rate=work_rate,
        disk_rate=_measure_disk(folder, min(nbytes, free // 4, _LARGEST_TRIAL)),
        nbytes=nbytes,
        free_nbytes=free,
    )


def _measure_work(plan: ReshardPlan) -> tuple[float, float]:
    """Bytes a second, and the compression ratio."""
    tensors = plan.layouts[0].tensors
    matrices = [index for index, item in enumerate(tensors) if item.tensor.is_matrix]
    samples = sorted({matrices[n * len(matrices) // _SAMPLES] for n in range(_SAMPLES)})
    cuts = [next(cuts_of(plan.layouts, index, limit=plan.array_nbytes)) for index in samples]

    arrays = [np.empty(plan.array_nbytes, np.uint8) for _ in range(plan.jobs)]
    free: SimpleQueue[int] = SimpleQueue()
    for index, array in enumerate(arrays):
        array.fill(1)  # page faults would cost time
        free.put(index)

    def make(cut: Cut) -> tuple[int, int]:
        index = free.get()
        try:
            memory = arrays[index][: cut.nbytes]
            cut.make(plan.tensors, memory)
            written = 0
            for frames in frames_by_outputs(cut, memory.data, plan.compression).values():
                for _, frame in frames:
                    hashlib.sha256(frame)
                    written += len(frame)
            return cut.nbytes, written
        finally:
            free.put(index)

    started = time.perf_counter()
    with ThreadPoolExecutor(plan.jobs) as pool:
        sizes = list(pool.map(make, cuts))
    plain, written = (sum(column) for column in zip(*sizes, strict=True))
    return plain / (time.perf_counter() - started), written / plain


def _measure_disk(folder: Path, nbytes: int) -> float | None:
    """Write and sync a temporary file for two seconds at most."""
    with suppress(OSError), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        return write_rate(file, nbytes, seconds=_DISK_S)[0]
    return None
