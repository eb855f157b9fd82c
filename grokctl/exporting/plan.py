"""Plan an export: its tensors, files and memory. `--dry-run` prints it, execution follows it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Final

from grokctl.checkpoint.blocks import BLOCK
from grokctl.checkpoint.frames import Compression
from grokctl.checkpoint.pieces import Pieces, parse_pieces
from grokctl.checkpoint.published import Checkpoint, tensors_of
from grokctl.checkpoint.ready import SUMS, ReadyCheckpoint
from grokctl.checkpoint.release import Release
from grokctl.checkpoint.tensor_source import Storage, TensorSource
from grokctl.events import Stage
from grokctl.exporting.contents import Contents, contents_of
from grokctl.exporting.files import ExportFile
from grokctl.exporting.held_matrices import HeldMatrices, matrix_nbytes
from grokctl.exporting.options import EmbeddingType, ExportOptions, ExportType
from grokctl.exporting.scales import FittedScales
from grokctl.exporting.tensors import ExportPiece, ExportTensor
from grokctl.linked_files import read_linked
from grokctl.marks import MARK
from grokctl.paths import EXPORT_MANIFEST, LARGEST_TOKENIZER, PRIVATE, TOKENIZER
from grokctl.resharding.memory_limits import allowed_nbytes, memory_limits, peak_nbytes
from grokctl.resharding.plan import spread
from grokctl.resharding.publish import check_tokenizer
from grokctl.resharding.replaced import JOURNAL, FolderKind
from grokctl.system import usable_cores

_LARGEST_ARRAY: Final = 2**26
"""Bytes: of the longest rows, two thousand outputs."""
_MOST_WAITING: Final = 4
_PIECES: Final = 3
"""Pieces of a large matrix, at least: more threads than that work on several."""
_SAMPLES: Final = 4
"""Matrices, from all over the model, that are made to measure the work."""


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """Everything that an export will read and write."""

    source: Checkpoint
    options: ExportOptions
    contents: Contents
    """The tensors, their files, and the small files beside them."""
    jobs: int
    arrays: int
    """Arrays in memory at a time: being filled, waiting, or being written."""
    array_nbytes: int
    """Bytes of an array at most."""
    held_nbytes: int
    """Bytes of the source's matrices in memory at a time; 0 if pieces read them row by row."""

    @cached_property
    def kind(self) -> FolderKind:
        """The kind of folder that is published."""
        names = {layout.name for layout in self.layouts} | self.small.keys()
        names |= {SUMS, TOKENIZER, EXPORT_MANIFEST, JOURNAL, MARK, PRIVATE}
        return FolderKind(
            name="export",
            words="an export",
            manifest=EXPORT_MANIFEST,
            is_own_name=lambda name: name in names,
        )

    @property
    def storage(self) -> Storage:
        """How the weights are converted, but for those that are float32."""
        return self.contents.storage

    @property
    def parts(self) -> tuple[ExportTensor, ...]:
        """The tensors, in the order of the files."""
        return self.contents.parts

    @property
    def layouts(self) -> tuple[ExportFile, ...]:
        """The files with tensors."""
        return self.contents.files

    @property
    def small(self) -> Mapping[str, bytes]:
        """The files beside them, without the tokenizer, the sums and the manifest."""
        return self.contents.small

    @property
    def fitted(self) -> FittedScales:
        """What was done about scales that float16 does not hold."""
        return self.contents.fitted

    @property
    def float32(self) -> list[str]:
        """Parameters that the release quantizes, and that are float32 in spite of the type."""
        return sorted(self.contents.narrow | self.fitted.float32)

    @property
    def stage(self) -> Stage:
        """The stage that reports the progress."""
        return Stage.EXPORT

    @cached_property
    def tensors(self) -> TensorSource:
        """The source as a source of tensors."""
        return tensors_of(self.source)

    @property
    def out(self) -> Path:
        """The folder to publish."""
        return self.options.out

    @property
    def precision(self) -> str:
        """The type of the weights, for errors."""
        return self.options.type

    @property
    def compression(self) -> Compression | None:
        """Exports are never compressed."""
        return None

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The names of the tensors, in the order of the files."""
        return tuple(part.name for part in self.parts)

    @property
    def bytes_out(self) -> int:
        """Bytes of all files with tensors."""
        return sum(layout.nbytes for layout in self.layouts)

    @cached_property
    def bytes_in(self) -> int:
        """Bytes of the source's tensors."""
        return sum(prod(own.shape) * own.dtype.itemsize for own in self.tensors.storage.tensors)

    @property
    def peak_bytes(self) -> int:
        """Bytes of memory for reading, converting and writing, at most."""
        return self.held_nbytes + peak_nbytes(
            self.jobs, self.arrays, self.array_nbytes, is_compressed=False
        )

    @property
    def is_lossless(self) -> bool | None:
        """Whether no value is rounded; None if only writing shows that."""
        options, own = self.options, self.tensors.storage
        is_exact = options.type in {ExportType.Q8_0, ExportType.F32} or own == self.storage
        if options.embedding is EmbeddingType.F32 or not is_exact:
            return is_exact
        return None

    def pieces(self, index: int) -> Iterator[ExportPiece]:
        """The pieces of a tensor, by its place in the order of the files."""
        part = self.parts[index]
        (layout,) = (layout for layout in self.layouts if layout.sizes[index])
        padding = layout.sizes[index] - part.nbytes
        return part.pieces(layout.number, padding=padding, limit=self.array_nbytes)

    def made_with(self, index: int) -> None:
        """Scales are in the blocks of their weights."""
        del index

    def reader(self) -> TensorSource:
        """The source as pieces read it."""
        if not self.held_nbytes:
            return self.tensors
        return HeldMatrices(self.tensors, self.held_nbytes)

    def trial(self) -> list[ExportPiece]:
        """The first matrices of weights from all over the model."""
        matrices = [place for place, part in enumerate(self.parts) if part.tensor.is_matrix]
        return [
            piece
            for index in spread(matrices, _SAMPLES)
            for piece in self.pieces(index)
            if piece.matrix == self.parts[index].matrices[0]
        ]


def plan_export(source: Checkpoint, options: ExportOptions) -> ExportPlan:
    """Decide every byte that will be written; reads the scales, and writes no file.

    Args:
        source: Opened, so its structure is sound; ready checkpoints should be streamed.
        options: Format, type, destination and limits.

    Raises:
        PlacementError: The format cannot hold the model, or the type is impossible.
        UsageError: The source has only a part of the model, or a file would be too small.
        CorruptCheckpointError: A scale is not finite, or the tokenizer is none.
    """
    if isinstance(source, ReadyCheckpoint):
        source.check_whole()
    contents = contents_of(source, pieces_of(source), options)
    held_nbytes = _held_nbytes(source, options)
    jobs, arrays, array_nbytes = memory_limits(
        lambda limit: _largest_piece(contents.parts, limit),
        is_compressed=False,
        jobs=options.jobs,
        max_memory=allowed_nbytes(options.max_memory) - held_nbytes,
        most_nbytes=_LARGEST_ARRAY,
        most_waiting=_MOST_WAITING,
    )
    return ExportPlan(
        source=source,
        options=options,
        contents=contents,
        jobs=jobs,
        arrays=arrays,
        array_nbytes=array_nbytes,
        held_nbytes=held_nbytes,
    )


def pieces_of(source: Checkpoint) -> Pieces | None:
    """The vocabulary of a source, if it has a tokenizer."""
    check_tokenizer(source)
    if source.tokenizer is None:
        return None
    return parse_pieces(read_linked(source.tokenizer, source.root, most=LARGEST_TOKENIZER)[0])


def _held_nbytes(source: Checkpoint, options: ExportOptions) -> int:
    """Bytes of matrices to hold: those that threads work on, if they leave half of the memory."""
    if not isinstance(source, Release | ReadyCheckpoint):
        return 0  # a GGUF has the order of an export
    threads = options.jobs or usable_cores()
    nbytes = (2 + threads // _PIECES) * matrix_nbytes(tensors_of(source).storage)
    return nbytes if nbytes <= allowed_nbytes(options.max_memory) // 2 else 0


def _largest_piece(parts: Sequence[ExportTensor], limit: int) -> int:
    """Bytes of the largest piece under a limit."""
    distinct = {(part.type, part.tensor.spec.shape): part for part in parts}
    return max(
        piece.nbytes
        for part in distinct.values()
        for piece in part.pieces(0, padding=BLOCK, limit=limit)
    )
