"""How long a reshard will take: a short try of its work and of the disk it writes to."""

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
from grokctl.resharding.slices import Cut, cuts_of

_DISK_S: Final = 2.0
_LARGEST_TRY: Final = 2**31
"""Bytes that are written to try a disk."""
_SAMPLES: Final = 12
"""Arrays that are made to try the work, from all over the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a plan will take here."""

    work_rate: float
    """Bytes a second that are read, converted, hashed and compressed, as they are written plain."""
    disk_rate: float | None
    """Bytes a second that reach the disk; None where nothing can be written."""
    nbytes: int
    """Of all device files, compressed."""
    free_nbytes: int
    """Where they will be written."""

    def seconds(self, plan: ReshardPlan) -> float:
        """For all of it: the slower of work and disk, which go on side by side."""
        disk = self.nbytes / self.disk_rate if self.disk_rate else 0.0
        return max(plan.bytes_out / self.work_rate, disk)


def estimate(plan: ReshardPlan) -> Estimate:
    """Try a little of a plan; nothing stays.

    Raises:
        CorruptCheckpointError: The source is not what it was.
    """
    folder = plan.out.parent
    while not folder.is_dir():
        folder = folder.parent
    work_rate, ratio = _try_work(plan)
    nbytes = round(plan.bytes_out * ratio)
    free = shutil.disk_usage(folder).free
    return Estimate(
        work_rate=work_rate,
        disk_rate=_try_disk(folder, min(nbytes, free // 4, _LARGEST_TRY)),
        nbytes=nbytes,
        free_nbytes=free,
    )


def _try_work(plan: ReshardPlan) -> tuple[float, float]:
    """Bytes a second, and what is left of a byte by compression."""
    tensors = plan.layouts[0].tensors
    matrices = [place for place, held in enumerate(tensors) if held.tensor.is_matrix]
    places = sorted({matrices[n * len(matrices) // _SAMPLES] for n in range(_SAMPLES)})
    cuts = [next(cuts_of(plan.layouts, place, limit=plan.array_nbytes)) for place in places]

    arrays = [np.empty(plan.array_nbytes, np.uint8) for _ in range(plan.jobs)]
    free: SimpleQueue[int] = SimpleQueue()
    for number, array in enumerate(arrays):
        array.fill(1)  # its pages would cost time
        free.put(number)

    def make(cut: Cut) -> tuple[int, int]:
        number = free.get()
        try:
            memory = arrays[number][: cut.nbytes]
            cut.make(plan.tensors, memory)
            written = 0
            for frames in frames_by_outputs(cut, memory.data, plan.compression).values():
                for _, frame in frames:
                    hashlib.sha256(frame)
                    written += len(frame)
            return cut.nbytes, written
        finally:
            free.put(number)

    started = time.perf_counter()
    with ThreadPoolExecutor(plan.jobs) as pool:
        sizes = list(pool.map(make, cuts))
    plain, written = (sum(column) for column in zip(*sizes, strict=True))
    return plain / (time.perf_counter() - started), written / plain


def _try_disk(folder: Path, nbytes: int) -> float | None:
    """Write, sync and forget a file for two seconds at most."""
    with suppress(OSError), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        return write_rate(file, nbytes, seconds=_DISK_S)[0]
    return None
