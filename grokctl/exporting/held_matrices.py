"""Matrices of a source in memory, while the pieces of an export are cut from them.

A piece of an export has a few columns of every row. Read alone they are thousands of short reads,
in no order that a disk is fast in. So the rows of a matrix are read whole and once, by whichever
thread needs them first, and stay in memory until later matrices take their place.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from math import prod
from threading import Lock
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.tensor_source import LogicalTensor, RowReader, Slices, Storage, TensorSource
from grokctl.model.config import GrokConfig
from grokctl.model.placement import Slice

_AT_A_TIME: Final = 2**20
"""Bytes that a thread reads at a time: they are in its cache when they are put into place."""
_LINE: Final = 64
"""Bytes of a line of a cache."""


def matrix_nbytes(storage: Storage) -> int:
    """Bytes of the largest matrix of a source."""
    matrices = (tensor for tensor in storage.tensors if tensor.is_matrix)
    return max(prod(one.shape[-2:]) * one.dtype.itemsize for one in matrices)


class HeldMatrices:
    """A source that keeps the matrices which were asked for last; safe among threads."""

    def __init__(self, source: TensorSource, room: int) -> None:
        """Hold nothing yet.

        Args:
            source: Has the matrices.
            room: Bytes of matrices to hold; readings that are under way keep theirs alive.
        """
        self._source = source
        self._room = room
        self._lock = Lock()
        self._held: dict[tuple[str, tuple[int, ...]], _Matrix] = {}

    @property
    def storage(self) -> Storage:
        """How its tensors are stored."""
        return self._source.storage

    @property
    def config(self) -> GrokConfig:
        """The model."""
        return self._source.config

    def read(self, tensor: LogicalTensor, slices: Slices) -> NDArray[Any]:
        """A part of a stored tensor, straight from the source."""
        return self._source.read(tensor, slices)

    @contextmanager
    def reading(
        self, tensor: LogicalTensor, lead: tuple[int, ...], outputs: Slice
    ) -> Iterator[RowReader]:
        """Read some outputs of a matrix out of the whole rows in memory."""
        matrix = self._matrix(tensor, lead)
        with self._source.reading(tensor, lead, (0, tensor.shape[-1])) as read:

            def rows(low: int, high: int) -> NDArray[Any]:
                matrix.load(low, high, read)
                part = matrix.values[low:high, slice(*outputs)]
                part.flags.writeable = False  # others read it, too
                return part

            yield rows

    def _matrix(self, tensor: LogicalTensor, lead: tuple[int, ...]) -> "_Matrix":
        key = (tensor.key, lead)
        with self._lock:
            matrix = self._held.pop(key, None) or _Matrix(tensor)
            rest = self._room - matrix.values.nbytes
            for one in reversed(list(self._held)):  # the last first
                rest -= self._held[one].values.nbytes
                if rest < 0:
                    del self._held[one]
            self._held[key] = matrix
        return matrix


class _Matrix:
    """A matrix, some of whose rows are in memory."""

    def __init__(self, tensor: LogicalTensor) -> None:
        rows, columns = tensor.shape[-2:]
        nbytes = columns * tensor.dtype.itemsize
        # an odd number of lines from one row to the next: else columns would share a few places
        pitch = (-(-nbytes // _LINE) | 1) * _LINE
        wide: NDArray[Any] = np.empty((rows, pitch // tensor.dtype.itemsize), tensor.dtype)
        self.values = wide[:, :columns]
        self._step = max(1, _AT_A_TIME // nbytes)
        self._lock = Lock()
        self._loaded: dict[int, Future[None]] = {}
        """Ranges of rows that are read, or being read."""

    def load(self, low: int, high: int, read: RowReader) -> None:
        """Have rows in memory: reads those that no thread reads, and waits for the others."""
        others = []
        for number in range(low // self._step, -(-high // self._step)):
            own: Future[None] = Future()
            with self._lock:
                done = self._loaded.setdefault(number, own)
            if done is not own:
                others.append(done)
                continue
            try:
                first = number * self._step
                last = min(first + self._step, len(self.values))
                self.values[first:last] = read(first, last)
            except BaseException as error:
                own.set_exception(error)
                raise
            own.set_result(None)
        for done in others:
            done.result()
