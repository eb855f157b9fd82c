"""Pieces made by some threads and appended to files by others, in order, in bounded memory.

Each worker makes one piece at a time. Every file has its own thread, which waits for the pieces in
the order of the file, hashes and writes them. The number of arrays is fixed: a new piece is made
when all files have taken their parts of an old one.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any, Final, Self

import numpy as np

from grokctl.resharding.convert import NOTHING, Squares
from grokctl.resharding.output import Frame, OutputPlan, Piece, PieceResult
from grokctl.resharding.writers import FileState, FileWriter

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
        """Lend it to this many files."""
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
    """Frames to write, by file."""
    result: PieceResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A completed step, in the order of the files."""

    key: str
    """The name of the tensor."""
    nbytes: int = 0
    """Bytes added to files, before compression."""
    squares: Squares = NOTHING
    states: tuple[FileState, ...] = ()
    """Of every file, when the tensor is complete."""


@dataclass(frozen=True, slots=True)
class _Pending:
    futures: list[Future[Any]]
    finish: Callable[[list[Any]], Progress]


class Pipeline:
    """The threads and arrays of one run, as a context manager that ends them."""

    def __init__(self, plan: OutputPlan, writers: Sequence[FileWriter]) -> None:
        """Allocate the arrays, and start no thread yet.

        Args:
            plan: Has the source of the values, and the numbers of threads and arrays.
            writers: Of its files, each at its position.
        """
        self._source = plan.reader()
        self._writers = {writer.layout.number: writer for writer in writers}
        self._compression = plan.compression
        self._free: SimpleQueue[_Array] = SimpleQueue()
        for _ in range(plan.arrays):
            self._free.put(_Array(plan.array_nbytes, self._free))
        self._pending: deque[_Pending] = deque()
        self._workers = ThreadPoolExecutor(plan.jobs, thread_name_prefix="make")
        self._appenders = {
            number: ThreadPoolExecutor(1, thread_name_prefix=f"write-{number}")
            for number in self._writers
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.shutdown(cancel_futures=True)
        for appender in self._appenders.values():
            appender.shutdown(cancel_futures=True)

    def add(self, piece: Piece) -> Iterator[Progress]:
        """Schedule a piece for its files; waits until there is memory for it.

        Yields:
            Steps that completed meanwhile.

        Raises:
            GrokctlError: The source changed.
            OSError: A file cannot be written.
        """
        while True:
            yield from self.finished()
            try:
                array = self._free.get(timeout=_POLL_S)
                break
            except Empty:
                continue
        array.lend(len(piece.files))
        filled = self._workers.submit(self._make, piece, array)
        appended = [
            self._appenders[number].submit(self._append, number, filled, array)
            for number in piece.files
        ]
        self._pending.append(
            _Pending(
                appended,
                lambda counts: Progress(
                    key=piece.key, nbytes=sum(counts), squares=filled.result().result.squares
                ),
            )
        )

    def add_scales(self, key: str) -> None:
        """Append the scales that were made with their weight to every file."""
        appended = [
            appender.submit(self._writers[number].append_scales, key)
            for number, appender in self._appenders.items()
        ]
        self._pending.append(
            _Pending(appended, lambda counts: Progress(key=key, nbytes=sum(counts)))
        )

    def end_tensor(self, key: str) -> None:
        """Record the state of every file at the end of a tensor."""
        states: list[Future[Any]] = [
            appender.submit(self._writers[number].end_tensor)
            for number, appender in self._appenders.items()
        ]
        self._pending.append(_Pending(states, lambda ended: Progress(key=key, states=tuple(ended))))

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

    def _make(self, piece: Piece, array: _Array) -> _Filled:
        memory = array.memory[: piece.nbytes]
        result = piece.make(self._source, memory)
        return _Filled(dict(piece.frames(memory.data, self._compression)), result)

    def _append(self, number: int, future: "Future[_Filled]", array: _Array) -> int:
        try:
            filled, writer = future.result(), self._writers[number]
            count = writer.append(filled.frames.pop(number))  # freed once written
            if filled.result.scales is not None:
                writer.keep_scales(filled.result.scales)
            return count
        finally:
            array.give_back()
