"""What a plan promises to those who execute it: files that grow side by side, piece by piece."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.frames import Compression, compress
from grokctl.checkpoint.published import Checkpoint
from grokctl.checkpoint.tensor_source import LogicalTensor, Slices, TensorSource
from grokctl.events import Stage
from grokctl.resharding.convert import NOTHING, Squares
from grokctl.resharding.replaced import FolderKind

Frame = tuple[int, bytes | memoryview]
"""Bytes before compression, and the data to write."""


@dataclass(frozen=True, slots=True)
class KeptScales:
    """Scales that were made with their weight, and are written after it."""

    tensor: LogicalTensor
    """The scales."""
    slices: Slices
    """The part of them."""
    values: NDArray[Any]
    """bfloat16 `(groups, outputs)` of all outputs."""


@dataclass(frozen=True, slots=True)
class PieceResult:
    """The results of making a piece, in addition to its bytes."""

    squares: Squares = NOTHING
    scales: KeptScales | None = None
    """If the weight was quantized."""


class Piece(Protocol):
    """An array that is made once, and appended to one or several files."""

    @property
    def key(self) -> str:
        """The name of its tensor."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        ...

    @property
    def files(self) -> Collection[int]:
        """The numbers of the files that get a part of it."""
        ...

    def make(self, source: TensorSource, memory: NDArray[np.uint8]) -> PieceResult:
        """Fill its memory.

        Raises:
            CorruptCheckpointError: The source changed.
        """
        ...

    def frames(
        self, memory: memoryview, compression: Compression | None
    ) -> Mapping[int, list[Frame]]:
        """What each file gets of the filled memory, by number; equal parts are one object."""
        ...


class Layout(Protocol):
    """A file that is planned to the last byte, before compression."""

    @property
    def number(self) -> int:
        """Its number, by which pieces know it."""
        ...

    @property
    def name(self) -> str:
        """Its name, without the suffix of compressed files."""
        ...

    @property
    def header(self) -> bytes:
        """Its first bytes."""
        ...

    @property
    def ends(self) -> Sequence[int]:
        """Where each tensor of the plan ends: that of the one before it if it has no part of it."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        ...

    @property
    def slices(self) -> Mapping[str, Slices]:
        """The part of each tensor in it, by key; only where scales are made with their weights."""
        ...


class OutputPlan(Protocol):
    """Files to write, all at a time; every tensor is written to the end before the next begins."""

    @property
    def kind(self) -> FolderKind:
        """The kind of folder that is published."""
        ...

    @property
    def stage(self) -> Stage:
        """The stage that reports the progress."""
        ...

    @property
    def source(self) -> Checkpoint:
        """The checkpoint that is read."""
        ...

    @property
    def tensors(self) -> TensorSource:
        """The source as a source of tensors."""
        ...

    @property
    def out(self) -> Path:
        """The folder to publish."""
        ...

    @property
    def layouts(self) -> Sequence[Layout]:
        """The files."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """The names of the tensors, in the order of every file."""
        ...

    @property
    def precision(self) -> str:
        """The precision of the result, for errors."""
        ...

    @property
    def bytes_out(self) -> int:
        """Bytes of all files, before compression."""
        ...

    @property
    def compression(self) -> Compression | None:
        """The compression of the files."""
        ...

    @property
    def jobs(self) -> int:
        """Threads that make pieces."""
        ...

    @property
    def arrays(self) -> int:
        """Pieces in memory at a time."""
        ...

    @property
    def array_nbytes(self) -> int:
        """Bytes of a piece at most."""
        ...

    def pieces(self, index: int) -> Iterator[Piece]:
        """The pieces of a tensor, in the order of every file.

        Args:
            index: The tensor's place in the order of the files.
        """
        ...

    def made_with(self, index: int) -> int | None:
        """The earlier tensor that brings this one along as `KeptScales`; None if none does."""
        ...

    def reader(self) -> TensorSource:
        """The source as pieces read it."""
        ...

    def trial(self) -> Iterable[Piece]:
        """Pieces that stand for the work of all."""
        ...


def frames_of(data: bytes | memoryview, size: int, compression: Compression | None) -> list[Frame]:
    """The frames of some bytes: one as it is, or compressed ones of `size` bytes each."""
    whole = memoryview(data)
    if compression is None:
        return [(len(whole), whole)]
    parts = (whole[start : start + size] for start in range(0, len(whole), size))
    return [(len(part), compress(part, compression)) for part in parts]
