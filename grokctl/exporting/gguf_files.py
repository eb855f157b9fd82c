"""GGUF files of a model: their tensors and their metadata."""

import json
from collections.abc import Collection, Sequence

import numpy as np

from grokctl.checkpoint.gguf import SUFFIX, GgufTensor, TensorType, Value, gguf_header
from grokctl.checkpoint.gguf_model import STORAGE, gguf_name, model_metadata, order_of
from grokctl.checkpoint.tensor_source import Storage
from grokctl.exporting.files import ExportFile, distributed, numbered
from grokctl.exporting.scales import FittedScales
from grokctl.exporting.tensors import ExportTensor
from grokctl.model.precision import Precision
from grokctl.model.tensors import Axis, tensor_specs


def gguf_tensors(
    storage: Storage,
    types: dict[str, TensorType],
    embedding: TensorType,
    fitted: FittedScales,
) -> tuple[ExportTensor, ...]:
    """The tensors of a model in the order of the files.

    Args:
        storage: How the weights are converted.
        types: Of the parameters that the release quantizes.
        embedding: The type of the embedding.
        fitted: The powers of two by which scales are multiplied.
    """
    tensors = []
    for spec in sorted(tensor_specs(storage.config), key=order_of):
        kind = types.get(spec.name, TensorType.F32)
        if spec.axes[0] is Axis.VOCAB:
            kind = embedding
        own = storage.weight(spec)
        if spec.is_quantized and kind is TensorType.F32:
            own = float32_storage(storage).weight(spec)
        tensors.append(
            ExportTensor(
                name=gguf_name(spec),
                tensor=own,
                type=kind,
                shifts=fitted.shifts.get(spec.name, ()),
            )
        )
    return tuple(tensors)


def gguf_files(
    prefix: str,
    tensors: Sequence[ExportTensor],
    metadata: dict[str, Value],
    split: int | None,
) -> tuple[ExportFile, ...]:
    """The files that hold the tensors.

    Args:
        prefix: What their names begin with.
        tensors: In order.
        metadata: Of the model; only the first file has it.
        split: Bytes of tensors in a file at most; None for one file.

    Raises:
        InvalidValueError: A tensor is larger than that.
    """
    described = {one.name: GgufTensor(one.name, one.type, one.shape) for one in tensors}
    parts = distributed(tensors, lambda one: described[one.name].padded_nbytes, split)
    files = []
    for number, part in enumerate(parts):
        values = dict(metadata) if number == 0 else {}
        if len(parts) > 1:
            values["split.no"] = np.uint16(number)
            values["split.count"] = np.uint16(len(parts))
            values["split.tensors.count"] = np.int32(len(tensors))
        own = {one.name for one in part}
        many = len(parts) > 1
        files.append(
            ExportFile(
                number=number,
                name=numbered(prefix, number, len(parts), SUFFIX) if many else prefix + SUFFIX,
                header=gguf_header(values, [described[one.name] for one in part]),
                sizes=tuple(
                    described[one.name].padded_nbytes if one.name in own else 0 for one in tensors
                ),
            )
        )
    return tuple(files)


def gguf_metadata(
    storage: Storage,
    kind: TensorType,
    name: str,
    tokenizer: dict[str, Value],
    fitted: FittedScales,
    narrow: Collection[str],
) -> dict[str, Value]:
    """The metadata of a model, and what grokctl needs to read its weights again.

    Args:
        storage: How the weights are stored, but for those of `float32`.
        kind: The type of most tensors.
        name: Of the model.
        tokenizer: The metadata of the vocabulary.
        fitted: What was done about scales.
        narrow: Parameters that are float32 because their inputs are no whole blocks.
    """
    own = {
        "config": storage.config.to_dict(),
        "precision": storage.precision,
        "groups": {key: groups for key, groups in storage.groups.items() if groups},
        "shifts": dict(sorted(fitted.shifts.items())),
        "float32": sorted({*fitted.float32, *narrow}),
    }
    return {
        **model_metadata(storage.config, kind, name),
        **tokenizer,
        STORAGE: json.dumps(own, separators=(",", ":")),
    }


def float32_storage(storage: Storage) -> Storage:
    """The same model, all of it in float32."""
    return Storage(
        config=storage.config,
        precision=Precision.FLOAT32,
        groups=dict.fromkeys(storage.groups, 0),
    )
