"""What an export consists of: refusals that advise, scales that are checked, and the tokenizer."""

from dataclasses import replace
from pathlib import Path

import pytest
from models import TINY, Arrays

from grokctl.checkpoint.gguf import TensorType
from grokctl.checkpoint.pieces import Pieces, PieceType, TokenPiece
from grokctl.checkpoint.tensor_source import Storage
from grokctl.errors import CorruptCheckpointError, PlacementError
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


def contents(source, kind, form="gguf", *, embedding="f32", pieces=None):
    options = ExportOptions(
        out=Path("out"),
        format=Format(form),
        type=ExportType(kind),
        embedding=EmbeddingType(embedding),
        name="x",
    )
    return contents_of(source, pieces, options)


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


@pytest.mark.parametrize(("width", "kind"), [(48, TensorType.F32), (64, TensorType.Q8_0)])
def test_an_embedding_whose_rows_are_no_whole_blocks_is_float32(width, kind):
    config = replace(POSSIBLE, emb_size=width, key_size=2, num_q_heads=width // 2)

    made = contents(stored(config, Precision.INT8), "f32", embedding="q8_0")

    assert made.parts[0].name == "token_embd.weight"
    assert made.parts[0].type is kind


@pytest.mark.parametrize(("config", "form"), [(POSSIBLE, "gguf"), (USUAL, "hf")])
def test_a_tokenizer_of_another_model_is_refused(config, form):
    count = config.vocab_size + 1
    own = tuple(TokenPiece(f"p{number}", 0.0, PieceType.NORMAL) for number in range(count))
    pieces = Pieces(
        pieces=own, unknown_id=0, begin_id=1, end_id=2, pad_id=None, has_dummy_prefix=True
    )

    with pytest.raises(CorruptCheckpointError, match=f"has {count} pieces"):
        contents(stored(config, Precision.INT8), "f32", form, pieces=pieces)
