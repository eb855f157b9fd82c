"""Arrays made by some threads and appended to device files by others, in order, in bounded memory.

Each worker makes one array at a time. Every device file has its own thread, which waits for the
arrays in the order of the file, hashes and writes them. The number of arrays is fixed: a new one
is made when all devices have taken their parts of an old one.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any, Final, Self

import numpy as np

from grokctl.checkpoint.frames import Compression
from grokctl.checkpoint.tensor_source import LogicalTensor, TensorSource
from grokctl.model.placement import Slice
from grokctl.resharding.convert import NOTHING, Squares
from grokctl.resharding.slices import Cut, CutResult
from grokctl.resharding.writers import DeviceWriter, FileState, Frame, frames_of

_POLL_S: Final = 0.1
"""Seconds to wait for an array before checking for failures."""


class _Array:
    """Memory that is reused."""

    def __init__(self, nbytes: int, free: "SimpleQueue[_Array]") -> None:
        self.memory = np.empty(nbytes, np.uint8)
        self._free = free
        self._lock = Lock()
        self._users = 0

    def lend(self, users: int) -> None:
        """Lend it to this many devices."""
        self._users = users

    def give_back(self) -> None:
        """One of them has taken its part."""
        with self._lock:
            self._users -= 1
            is_free = not self._users
        if is_free:
            self._free.put(self)


@dataclass(frozen=True, slots=True)
class _Filled:
    frames: dict[int, list[Frame]]
    """Device -> frames to write."""
    result: CutResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A completed step, in the order of the files."""

    tensor: LogicalTensor
    nbytes: int = 0
    """Bytes added to device files, before compression."""
    squares: Squares = NOTHING
    states: tuple[FileState, ...] = ()
    """Of every device file, when the tensor is complete."""


@dataclass(frozen=True, slots=True)
class _Pending:
    futures: list[Future[Any]]
    finish: Callable[[list[Any]], Progress]


class Pipeline:
    """The threads and arrays of one run, as a context manager that ends them."""

    def __init__(
        self,
        source: TensorSource,
        writers: Sequence[DeviceWriter],
        *,
        compression: Compression | None,
        jobs: int,
        arrays: int,
        array_nbytes: int,
    ) -> None:
        """Allocate the arrays, and start no thread yet.

        Args:
            source: Has the values.
            writers: Of the device files, each at its position.
            compression: Of the device files.
            jobs: Arrays that are made at a time.
            arrays: Number of arrays.
            array_nbytes: Bytes of each array.
        """
        self._source = source
        self._writers = {writer.layout.device: writer for writer in writers}
        self._compression = compression
        self._free: SimpleQueue[_Array] = SimpleQueue()
        for _ in range(arrays):
            self._free.put(_Array(array_nbytes, self._free))
        self._pending: deque[_Pending] = deque()
        self._workers = ThreadPoolExecutor(jobs, thread_name_prefix="make")
        self._appenders = {
            device: ThreadPoolExecutor(1, thread_name_prefix=f"write-{device}")
            for device in self._writers
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.shutdown(cancel_futures=True)
        for appender in self._appenders.values():
            appender.shutdown(cancel_futures=True)

    def add(self, cut: Cut) -> Iterator[Progress]:
        """Schedule an array for its devices; waits until there is memory for it.

        Yields:
            Steps that completed meanwhile.

        Raises:
            GrokctlError: The source changed.
            OSError: A device file cannot be written.
        """
        while True:
            yield from self.finished()
            try:
                array = self._free.get(timeout=_POLL_S)
                break
            except Empty:
                continue
        array.lend(len(cut.devices))
        filled = self._workers.submit(self._make, cut, array)
        appended = [
            self._appenders[device].submit(self._append, device, cut, filled, array)
            for device in cut.devices
        ]
        self._pending.append(
            _Pending(
                appended,
                lambda counts: Progress(
                    tensor=cut.tensor, nbytes=sum(counts), squares=filled.result().result.squares
                ),
            )
        )

    def add_scales(self, tensor: LogicalTensor) -> None:
        """Append the scales that were made with their weight to every device file."""
        appended = [
            appender.submit(self._writers[device].append_scales, tensor.key)
            for device, appender in self._appenders.items()
        ]
        self._pending.append(
            _Pending(appended, lambda counts: Progress(tensor=tensor, nbytes=sum(counts)))
        )

    def end_tensor(self, tensor: LogicalTensor) -> None:
        """Record the state of every device file at the end of a tensor."""
        states: list[Future[Any]] = [
            appender.submit(self._writers[device].end_tensor)
            for device, appender in self._appenders.items()
        ]
        self._pending.append(
            _Pending(states, lambda ended: Progress(tensor=tensor, states=tuple(ended)))
        )

    def finished(self) -> Iterator[Progress]:
        """Steps that completed since the last call."""
        while self._pending and all(future.done() for future in self._pending[0].futures):
            yield self._finish()

    def drain(self) -> Iterator[Progress]:
        """All remaining steps; waits for them."""
        while self._pending:
            yield self._finish()

    def _finish(self) -> Progress:
        first = self._pending.popleft()
        return first.finish([future.result() for future in first.futures])

    def _make(self, cut: Cut, array: _Array) -> _Filled:
        memory = array.memory[: cut.nbytes]
        result = cut.make(self._source, memory)
        frames = frames_by_outputs(cut, memory.data, self._compression)
        return _Filled({device: frames[outputs] for device, outputs in cut.devices.items()}, result)

    def _append(self, device: int, cut: Cut, future: "Future[_Filled]", array: _Array) -> int:
        try:
            filled, writer = future.result(), self._writers[device]
            count = writer.append(filled.frames.pop(device))  # freed once written
            if filled.result.scales is not None:
                writer.keep_scales(cut.tensor, cut.scales_slices, filled.result.scales)
            return count
        finally:
            array.give_back()


def frames_by_outputs(
    cut: Cut, memory: memoryview, compression: Compression | None
) -> dict[Slice, list[Frame]]:
    """Outputs of some device -> the frames of a filled array that are written for them."""
    return {
        outputs: frames_of(memory[begin:end], cut.frame_nbytes(outputs), compression)
        for outputs, (begin, end) in cut.places.items()
    }
