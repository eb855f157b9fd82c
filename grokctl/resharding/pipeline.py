"""Arrays made by some threads and appended to device files by others, in order, in bounded memory.

Workers make one array each; every device file has a thread of its own that waits for the arrays
in the order of the file, hashes and writes them. There is a fixed number of arrays: who wants to
make another waits until all devices have what they get of one.
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
from grokctl.resharding.slices import Cut, Made
from grokctl.resharding.writers import DeviceWriter, Frame, Mark, frames_of

_GLANCE_S: Final = 0.1
"""How long to wait for an array before looking whether something failed."""


class _Array:
    """Memory that is used again and again."""

    def __init__(self, nbytes: int, free: "SimpleQueue[_Array]") -> None:
        self.memory = np.empty(nbytes, np.uint8)
        self._free = free
        self._lock = Lock()
        self._users = 0

    def lend(self, users: int) -> None:
        """To so many devices."""
        self._users = users

    def give_back(self) -> None:
        """One of them has what it gets."""
        with self._lock:
            self._users -= 1
            is_free = not self._users
        if is_free:
            self._free.put(self)


@dataclass(frozen=True, slots=True)
class _Made:
    frames: dict[int, list[Frame]]
    """What is written, by device."""
    made: Made


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Something that came to its end; these come in the order of the files."""

    tensor: LogicalTensor
    nbytes: int = 0
    """That device files grew, decompressed."""
    squares: Squares = NOTHING
    marks: tuple[Mark, ...] = ()
    """Of every device, when the tensor is whole."""


@dataclass(frozen=True, slots=True)
class _Pending:
    futures: list[Future[Any]]
    finish: Callable[[list[Any]], Progress]


class Pipeline:
    """The threads and arrays of one run; a context manager, so that none outlives it."""

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
        """Make the arrays and no thread yet.

        Args:
            source: What arrays are cut from.
            writers: Of the devices' files, each where it goes on.
            compression: Of what is written.
            jobs: Arrays that are made at a time.
            arrays: How many there are.
            array_nbytes: Bytes of each.
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
        """Have an array made and given to its devices; waits until there is memory for it.

        Yields:
            What came to its end meanwhile.

        Raises:
            GrokctlError: The source is not what it was.
            OSError: A device's file cannot be written.
        """
        while True:
            yield from self.settled()
            try:
                array = self._free.get(timeout=_GLANCE_S)
                break
            except Empty:
                continue
        array.lend(len(cut.devices))
        promised = self._workers.submit(self._make, cut, array)
        appended = [
            self._appenders[device].submit(self._append, device, cut, promised, array)
            for device in cut.devices
        ]
        self._pending.append(
            _Pending(
                appended,
                lambda counts: Progress(
                    tensor=cut.tensor, nbytes=sum(counts), squares=promised.result().made.squares
                ),
            )
        )

    def add_scales(self, tensor: LogicalTensor) -> None:
        """Have every device's file continued with the scales that were made with its weight."""
        appended = [
            appender.submit(self._writers[device].append_scales, tensor.key)
            for device, appender in self._appenders.items()
        ]
        self._pending.append(
            _Pending(appended, lambda counts: Progress(tensor=tensor, nbytes=sum(counts)))
        )

    def mark(self, tensor: LogicalTensor) -> None:
        """Have every device's file marked behind a tensor."""
        marks: list[Future[Any]] = [
            appender.submit(self._writers[device].mark)
            for device, appender in self._appenders.items()
        ]
        self._pending.append(
            _Pending(marks, lambda found: Progress(tensor=tensor, marks=tuple(found)))
        )

    def settled(self) -> Iterator[Progress]:
        """What has come to its end since the last time."""
        while self._pending and all(future.done() for future in self._pending[0].futures):
            yield self._settle()

    def drain(self) -> Iterator[Progress]:
        """What comes to its end until nothing is left."""
        while self._pending:
            yield self._settle()

    def _settle(self) -> Progress:
        first = self._pending.popleft()
        return first.finish([future.result() for future in first.futures])

    def _make(self, cut: Cut, array: _Array) -> _Made:
        memory = array.memory[: cut.nbytes]
        made = cut.make(self._source, memory)
        frames = frames_by_outputs(cut, memory.data, self._compression)
        return _Made({device: frames[outputs] for device, outputs in cut.devices.items()}, made)

    def _append(self, device: int, cut: Cut, promised: "Future[_Made]", array: _Array) -> int:
        try:
            found, writer = promised.result(), self._writers[device]
            count = writer.append(found.frames.pop(device))  # nobody needs them after this
            if found.made.scales is not None:
                writer.keep_scales(cut.tensor, cut.scales_slices, found.made.scales)
            return count
        finally:
            array.give_back()


def frames_by_outputs(
    cut: Cut, memory: memoryview, compression: Compression | None
) -> dict[Slice, list[Frame]]:
    """What is written of a finished array, for each range of outputs that some device gets."""
    return {
        outputs: frames_of(memory[begin:end], cut.frame_nbytes(outputs), compression)
        for outputs, (begin, end) in cut.places.items()
    }
