"""Plan an export: its tensors, files and memory. `--dry-run` prints it, execution follows it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Final

from grokctl.checkpoint.blocks import BLOCK
from grokctl.checkpoint.frames import Compression
from grokctl.checkpoint.gguf import TensorType, Value
from grokctl.checkpoint.gguf_model import refuse_impossible
from grokctl.checkpoint.gguf_tokenizer import no_tokenizer_metadata, tokenizer_metadata
from grokctl.checkpoint.pieces import Pieces, parse_pieces
from grokctl.checkpoint.published import Checkpoint, tensors_of
from grokctl.checkpoint.ready import SUMS, ReadyCheckpoint
from grokctl.checkpoint.tensor_source import Storage, TensorSource
from grokctl.events import Stage
from grokctl.exporting.files import ExportFile
from grokctl.exporting.gguf_files import gguf_files, gguf_metadata, gguf_tensors
from grokctl.exporting.options import ExportOptions, ExportType
from grokctl.exporting.scales import FittedScales, fit_scales
from grokctl.exporting.tensors import ExportPiece, ExportTensor, block_groups
from grokctl.linked_files import read_linked
from grokctl.marks import MARK
from grokctl.model.config import GrokConfig
from grokctl.model.precision import Precision, check_conversion
from grokctl.model.tensors import tensor_specs
from grokctl.paths import EXPORT_MANIFEST, LARGEST_TOKENIZER, PRIVATE, TOKENIZER
from grokctl.resharding.memory_limits import memory_limits, peak_nbytes
from grokctl.resharding.plan import spread
from grokctl.resharding.publish import check_tokenizer
from grokctl.resharding.replaced import JOURNAL, FolderKind

_PRECISIONS: Final = {
    ExportType.Q8_0: Precision.INT8,
    ExportType.Q4_0: Precision.INT4,
    ExportType.BF16: Precision.BFLOAT16,
    ExportType.F32: Precision.FLOAT32,
}


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """Everything that an export will read and write."""

    source: Checkpoint
    options: ExportOptions
    storage: Storage
    """How the weights are converted, but for those of `fitted.float32`."""
    fitted: FittedScales
    """What was done about scales that float16 does not hold."""
    narrow: frozenset[str]
    """Parameters that are float32 because their inputs are no whole blocks."""
    parts: tuple[ExportTensor, ...]
    """The tensors, in the order of the files."""
    layouts: tuple[ExportFile, ...]
    """The files with tensors."""
    jobs: int
    arrays: int
    """Arrays in memory at a time: being filled, waiting, or being written."""
    array_nbytes: int
    """Bytes of an array at most."""

    @cached_property
    def kind(self) -> FolderKind:
        """The kind of folder that is published."""
        names = {layout.name for layout in self.layouts}
        names |= {SUMS, TOKENIZER, EXPORT_MANIFEST, JOURNAL, MARK, PRIVATE}
        return FolderKind(
            name="export",
            words="an export",
            manifest=EXPORT_MANIFEST,
            is_own_name=lambda name: name in names,
        )

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
        return peak_nbytes(self.jobs, self.arrays, self.array_nbytes, is_compressed=False)

    @property
    def is_lossless(self) -> bool | None:
        """Whether no value is rounded; None if only writing shows that."""
        options, own = self.options, self.tensors.storage
        is_exact = (
            options.type in {ExportType.Q8_0, ExportType.F32}
            or own == self.storage
            or self.storage.precision is own.precision is Precision.BFLOAT16
        )
        if TensorType[options.embedding.name] is TensorType.F32 or not is_exact:
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

    def samples(self) -> list[int]:
        """Places of weights from all over the model."""
        return spread([place for place, part in enumerate(self.parts) if part.tensor.is_matrix])


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
    tensors = tensors_of(source)
    config = tensors.config
    refuse_impossible(config)
    storage = _storage(tensors.storage, options.type)
    quantized = [spec for spec in tensor_specs(config) if spec.is_quantized]
    packed = storage.precision in {Precision.INT8, Precision.INT4}
    narrow = {
        spec.name
        for spec in quantized
        if packed and not block_groups(spec.shape[-2], storage.groups[spec.name])
    }
    fitted = FittedScales()
    if storage == tensors.storage:
        checked = [spec for spec in quantized if packed and spec.name not in narrow]
        fitted = fit_scales(tensors, [storage.weight(spec) for spec in checked])
    types = {
        spec.name: TensorType.F32
        if spec.name in narrow | fitted.float32
        else TensorType[options.type.name]
        for spec in quantized
    }
    parts = gguf_tensors(storage, types, _embedding(config, options), fitted)
    layouts = gguf_files(
        f"{options.name}-{options.type}",
        parts,
        gguf_metadata(
            storage,
            TensorType[options.type.name],
            options.name,
            _tokenizer(source, config),
            fitted,
            narrow,
        ),
        options.split,
    )
    jobs, arrays, array_nbytes = memory_limits(
        lambda limit: _largest_piece(parts, limit),
        is_compressed=False,
        jobs=options.jobs,
        max_memory=options.max_memory,
    )
    return ExportPlan(
        source=source,
        options=options,
        storage=storage,
        fitted=fitted,
        narrow=frozenset(narrow),
        parts=parts,
        layouts=layouts,
        jobs=jobs,
        arrays=arrays,
        array_nbytes=array_nbytes,
    )


def pieces_of(source: Checkpoint) -> Pieces | None:
    """The vocabulary of a source, if it has a tokenizer."""
    check_tokenizer(source)
    if source.tokenizer is None:
        return None
    return parse_pieces(read_linked(source.tokenizer, source.root, most=LARGEST_TOKENIZER)[0])


def _tokenizer(source: Checkpoint, config: GrokConfig) -> dict[str, Value]:
    pieces = pieces_of(source)
    if pieces is None:
        return no_tokenizer_metadata()
    return tokenizer_metadata(pieces, config.vocab_size)


def _embedding(config: GrokConfig, options: ExportOptions) -> TensorType:
    """The type of the embedding; float32 if its rows are no whole blocks."""
    kind = TensorType[options.embedding.name]
    return TensorType.F32 if config.emb_size % kind.block[0] else kind


def _storage(own: Storage, kind: ExportType) -> Storage:
    """How the weights are converted: as they are stored, if the type holds that.

    Raises:
        PlacementError: The source no longer has what the type holds.
    """
    precision = _PRECISIONS[kind]
    check_conversion(own.precision, precision)
    if precision is Precision.INT8:
        return own
    groups = dict.fromkeys(own.groups, 0)
    if precision is Precision.INT4:
        specs = [spec for spec in tensor_specs(own.config) if spec.is_quantized]
        widths = {spec.name: spec.shape[-2] for spec in specs}
        if own.precision is Precision.INT4 and all(
            block_groups(width, own.groups[name]) for name, width in widths.items()
        ):
            return own
        groups |= {name: width // BLOCK for name, width in widths.items() if width % BLOCK == 0}
    return Storage(config=own.config, precision=precision, groups=groups)


def _largest_piece(parts: tuple[ExportTensor, ...], limit: int) -> int:
    """Bytes of the largest piece under a limit."""
    distinct = {(part.type, part.tensor.spec.shape): part for part in parts}
    return max(
        piece.nbytes
        for part in distinct.values()
        for piece in part.pieces(0, padding=BLOCK, limit=limit)
    )
