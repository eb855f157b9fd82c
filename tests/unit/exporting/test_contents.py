"""What an export consists of: refusals that advise, and scales that are checked."""

from dataclasses import replace
from pathlib import Path

import pytest
from models import TINY, Arrays

from grokctl.checkpoint.gguf import TensorType
from grokctl.checkpoint.tensor_source import Storage
from grokctl.errors import PlacementError
from grokctl.exporting.contents import contents_of
from grokctl.exporting.options import EmbeddingType, ExportOptions, ExportType, Format
from grokctl.model.precision import Precision
from grokctl.model.tensors import tensor_specs

POSSIBLE = replace(TINY, emb_size=64)
"""A model that llama.cpp holds; the inputs of `down`, 88, are no whole blocks."""
USUAL = replace(TINY, attn_output_multiplier=TINY.key_size**-0.5)
"""A model that SGLang holds."""


def stored(config, precision, group=32):
    specs = tensor_specs(config)
    groups = {
        spec.name: max(1, spec.shape[-2] // group) if spec.is_quantized else 0 for spec in specs
    }
    return Arrays(Storage(config=config, precision=precision, groups=groups))


def contents(source, kind, form="gguf"):
    options = ExportOptions(
        out=Path("out"),
        format=Format(form),
        type=ExportType(kind),
        embedding=EmbeddingType.F32,
        name="x",
    )
    return contents_of(source, None, options)


@pytest.mark.parametrize(
    ("config", "form", "hint"),
    [
        pytest.param(USUAL, "gguf", "--format hf  # has no such limit", id="heads"),
        pytest.param(POSSIBLE, "hf", "--format gguf  # has a key for it", id="scale"),
        pytest.param(TINY, "gguf", None, id="both-gguf"),
        pytest.param(TINY, "hf", None, id="both-hf"),
    ],
)
def test_another_format_is_advised_only_if_it_holds_the_model(config, form, hint):
    source = stored(config, Precision.INT8)

    with pytest.raises(PlacementError) as caught:
        contents(source, "f32", form)

    assert caught.value.hint == hint


def test_scales_that_are_copied_are_checked_though_other_weights_get_new_groups():
    config, name = POSSIBLE, "layers.0.moe.gate"
    source = stored(config, Precision.INT4)
    source.arrays[f"{name}.scales"][0, 0, 0] = 2.0**-30

    made = contents(source, "q4_0")

    assert made.storage != source.storage
    assert made.narrow == {"layers.0.moe.down"}
    assert (made.fitted.misfits, made.fitted.float32) == (1, {name})
    types = {part.tensor.spec.name: part.type for part in made.parts}
    assert types[name] is TensorType.F32
    assert types["layers.0.moe.up"] is TensorType.Q4_0
