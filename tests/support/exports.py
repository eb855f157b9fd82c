"""What the tests of `export` share: a model that llama.cpp can hold, and how it is made."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.blocks import Q4_0, Q8_0
from grokctl.checkpoint.export_manifest import Export
from grokctl.checkpoint.gguf import TensorType, read_gguf
from grokctl.checkpoint.miniature import MINIATURE
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.checkpoint.receipt import Receipt
from grokctl.checkpoint.release import Release
from grokctl.events import Observer, ignore
from grokctl.export import export
from grokctl.exporting.options import EmbeddingType, ExportOptions, ExportType, Format
from grokctl.exporting.plan import plan_export

WIDE = replace(
    MINIATURE,
    num_layers=11,
    vocab_size=512,
    emb_size=256,
    widening_factor=3,
    num_experts=2,
)
"""13 MB: heads as wide as the embedding, whole blocks everywhere, and layers whose numeric order is
not that of strings."""


def exported(
    source: Release | ReadyCheckpoint,
    out: Path,
    kind: str = "q8_0",
    *,
    embedding: str = "f32",
    form: str = "gguf",
    proof: Receipt | None = None,
    observe: Observer = ignore,
    **options: Any,
) -> Export:
    """Plan and execute; `options` are the plan's."""
    planned = plan_export(
        source,
        ExportOptions(
            out=out,
            format=Format(form),
            type=ExportType(kind),
            embedding=EmbeddingType(embedding),
            name="wide",
            **options,
        ),
    )
    return export(planned, proof=proof, observe=observe)


def tensors_in(*paths: Path) -> dict[str, tuple[TensorType, NDArray[Any]]]:
    """Every tensor of GGUF files: its type, and its values as they are stored."""
    found = {}
    for path in paths:
        header, data = read_gguf(path), path.read_bytes()
        for tensor, offset in zip(header.tensors, header.offsets, strict=True):
            part = data[offset : offset + tensor.nbytes]
            dtype = {TensorType.Q8_0: Q8_0, TensorType.Q4_0: Q4_0, TensorType.BF16: BFLOAT16}.get(
                tensor.type, np.dtype("<f4")
            )
            values, _ = tensor.type.block
            shape = (*tensor.shape[:-1], tensor.shape[-1] // values)
            found[tensor.name] = tensor.type, np.frombuffer(part, dtype).reshape(shape)
    return found


def plain(kind: TensorType, stored: NDArray[Any]) -> NDArray[np.float32]:
    """What stored values mean."""
    if kind in {TensorType.F32, TensorType.BF16}:
        return stored.astype(np.float32)
    scale = stored["scale"].astype(np.float32)[..., None]
    codes = stored["codes"]
    if kind is TensorType.Q4_0:
        codes = np.concatenate([codes & 15, codes >> 4], axis=-1).astype(np.int8) - 8
    wide: NDArray[np.float32] = codes.astype(np.float32) * scale
    return wide.reshape(*wide.shape[:-2], -1)


def gguf_of(export: Export) -> list[Path]:
    """The GGUF files of an export, in order."""
    names: Mapping[str, object] = export.manifest.records
    return sorted(export.root / name for name in names if name.endswith(".gguf"))
