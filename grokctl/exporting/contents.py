"""What an export consists of: its tensors, their files, and the small files beside them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from grokctl.checkpoint.blocks import BLOCK
from grokctl.checkpoint.gguf import TensorType
from grokctl.checkpoint.gguf_model import are_heads_possible, refuse_impossible
from grokctl.checkpoint.gguf_tokenizer import no_tokenizer_metadata, tokenizer_metadata
from grokctl.checkpoint.pieces import Pieces
from grokctl.checkpoint.published import Checkpoint, on_its_source, tensors_of
from grokctl.checkpoint.tensor_source import Storage
from grokctl.errors import PlacementError
from grokctl.exporting.files import ExportFile
from grokctl.exporting.gguf_files import gguf_files, gguf_metadata, gguf_tensors
from grokctl.exporting.hf_files import (
    hf_files,
    hf_small_files,
    hf_tensors,
    is_scale_usual,
    refuse_other_scale,
)
from grokctl.exporting.model_card import CARD, model_card
from grokctl.exporting.options import ExportOptions, ExportType, Format
from grokctl.exporting.scales import FittedScales, fit_scales
from grokctl.exporting.tensors import ExportTensor, block_groups
from grokctl.model.precision import Precision, check_conversion
from grokctl.model.tensors import tensor_specs
from grokctl.resharding.convert import is_stored_alike
from grokctl.text import printable

_PRECISIONS: Final = {
    ExportType.Q8_0: Precision.INT8,
    ExportType.Q4_0: Precision.INT4,
    ExportType.BF16: Precision.BFLOAT16,
    ExportType.F32: Precision.FLOAT32,
}
_LONGEST_PREFIX: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The contents of an export."""

    storage: Storage
    """How the weights are converted, but for those that are float32."""
    parts: tuple[ExportTensor, ...]
    """The tensors, in the order of the files."""
    files: tuple[ExportFile, ...]
    """The files with tensors."""
    small: Mapping[str, bytes] = field(default_factory=dict)
    """The files beside them, by name; without the tokenizer, the sums and the manifest."""
    fitted: FittedScales = field(default_factory=FittedScales)
    """What was done about scales that float16 does not hold."""
    narrow: frozenset[str] = frozenset()
    """Parameters that are float32 because their inputs are no whole blocks."""


def contents_of(source: Checkpoint, pieces: Pieces | None, options: ExportOptions) -> Contents:
    """Decide what an export consists of; reads the scales.

    Args:
        source: Has the tensors.
        pieces: The vocabulary, if there is a tokenizer.
        options: Format, types, and sizes of files.

    Raises:
        PlacementError: The format cannot hold the model, or the type is impossible.
        InvalidValueError: A tensor is larger than a file may be.
        CorruptCheckpointError: A scale is not finite, or the tokenizer is of another model.
    """
    match options.format:
        case Format.GGUF:
            return _gguf(source, pieces, options)
        case Format.HF:
            return _hf(source, pieces, options)


def _gguf(source: Checkpoint, pieces: Pieces | None, options: ExportOptions) -> Contents:
    config, kind, tensors = source.config, TensorType[options.type.name], tensors_of(source)
    other = "--format hf  # has no such limit" if is_scale_usual(config) else None
    refuse_impossible(config, hint=other)
    storage = _storage(source, options.type)
    quantized = [spec for spec in tensor_specs(config) if spec.is_quantized]
    is_packed = storage.precision in {Precision.INT8, Precision.INT4}
    narrow = {
        spec.name
        for spec in quantized
        if is_packed and not block_groups(spec.shape[-2], storage.groups[spec.name])
    }
    packed = [spec for spec in quantized if is_packed and spec.name not in narrow]
    copied = [one for one in map(storage.weight, packed) if is_stored_alike(tensors, one)]
    fitted = fit_scales(tensors, copied)
    wide = narrow | fitted.float32
    types = {spec.name: TensorType.F32 if spec.name in wide else kind for spec in quantized}
    embedding = TensorType[options.embedding.name]
    if config.emb_size % embedding.block[0]:
        embedding = TensorType.F32  # its rows are no whole blocks
    parts = gguf_tensors(storage, types, embedding, fitted)
    tokenizer = no_tokenizer_metadata()
    if pieces is not None:
        tokenizer = tokenizer_metadata(pieces, config.vocab_size)
    name = printable(options.name, limit=255)
    metadata = gguf_metadata(storage, kind, name, tokenizer, fitted, narrow)
    return Contents(
        storage=storage,
        parts=parts,
        files=gguf_files(f"{_prefix(options.name)}-{options.type}", parts, metadata, options.split),
        fitted=fitted,
        narrow=frozenset(narrow),
    )


def _hf(source: Checkpoint, pieces: Pieces | None, options: ExportOptions) -> Contents:
    config, kind = source.config, TensorType[options.type.name]
    embedding = TensorType[options.embedding.name]
    for name, one in (("--type", kind), ("--embedding", embedding)):
        if one not in {TensorType.BF16, TensorType.F32}:
            raise PlacementError(
                f"{name}: expected bf16 or f32 for --format hf, found {one.name.lower()}",
                f"--format hf {name} bf16",
            )
    other = "--format gguf  # has a key for it" if are_heads_possible(config) else None
    refuse_other_scale(config, hint=other)
    if pieces is not None:
        tokenizer_metadata(pieces, config.vocab_size)  # refuses a tokenizer of another model
    storage = _storage(source, options.type)
    parts = hf_tensors(storage, kind, embedding)
    files = hf_files(parts, options.split)
    small = hf_small_files(config, parts, files, pieces, kind)
    small[CARD] = model_card(config, printable(options.name, limit=255), options.type)
    return Contents(storage=storage, parts=parts, files=files, small=small)


def _prefix(name: str) -> str:
    """A model's name as the beginning of a file's, which any program can read."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:_LONGEST_PREFIX].lstrip("._-") or "model"


def _storage(source: Checkpoint, kind: ExportType) -> Storage:
    """How the weights are converted: as they are stored, if the type holds that.

    Raises:
        PlacementError: The source no longer has what the type holds.
    """
    own, precision = tensors_of(source).storage, _PRECISIONS[kind]
    check_conversion(own.precision, precision, hint=on_its_source(source))
    if precision is own.precision is not Precision.INT4:
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
