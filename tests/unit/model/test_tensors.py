import json
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from places import DATA

from grokctl.model.config import GROK_1
from grokctl.model.tensors import SHARDS, Axis, layer_files, layer_order, tensor_specs

ORACLE = json.loads((DATA / "tensors.json").read_text())
FIRST_INDEX = {
    0: 2,
    1: 14,
    2: 146,
    3: 278,
    4: 410,
    5: 542,
    6: 674,
    7: 734,
    8: 746,
    9: 758,
    10: 26,
    11: 38,
    12: 50,
    13: 62,
    14: 74,
    15: 86,
    16: 98,
    17: 110,
    18: 122,
    19: 134,
    20: 158,
    21: 170,
    22: 182,
    23: 194,
    24: 206,
    25: 218,
    26: 230,
    27: 242,
    28: 254,
    29: 266,
    30: 290,
    31: 302,
    32: 314,
    33: 326,
    34: 338,
    35: 350,
    36: 362,
    37: 374,
    38: 386,
    39: 398,
    40: 422,
    41: 434,
    42: 446,
    43: 458,
    44: 470,
    45: 482,
    46: 494,
    47: 506,
    48: 518,
    49: 530,
    50: 554,
    51: 566,
    52: 578,
    53: 590,
    54: 602,
    55: 614,
    56: 626,
    57: 638,
    58: 650,
    59: 662,
    60: 686,
    61: 698,
    62: 710,
    63: 722,
}


def test_every_tensor_of_grok_1_is_where_the_reference_code_puts_it():
    found = [[spec.index, spec.path, list(spec.shape)] for spec in tensor_specs(GROK_1)]

    assert found == [
        [index, f"{module}/{name}", shape] for index, module, name, shape, _dtype in ORACLE
    ]


def test_layers_lie_in_string_order():
    specs = tensor_specs(GROK_1)

    first = {layer: min(s.index for s in specs if s.layer == layer) for layer in range(64)}

    assert first == FIRST_INDEX


@pytest.mark.parametrize(
    ("layers", "order"),
    [
        pytest.param(1, (0,), id="one"),
        pytest.param(10, tuple(range(10)), id="ten-are-in-order"),
        pytest.param(11, (0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9), id="the-eleventh-is-the-third"),
    ],
)
def test_layer_order_is_that_of_strings(layers, order):
    assert layer_order(layers) == order


def test_indices_names_and_files_are_unique_and_in_order():
    specs = tensor_specs(GROK_1)

    assert [spec.index for spec in specs] == list(range(770))
    assert len({spec.name for spec in specs}) == len({spec.path for spec in specs}) == 770
    assert [spec.file for spec in specs] == sorted(spec.file for spec in specs)
    assert specs[769].file == "tensor00769_000"


def test_names_carry_the_layers_own_number():
    specs = tensor_specs(GROK_1)

    assert specs[26].name == "layers.10.moe.gate"
    assert (specs[0].name, specs[0].layer) == ("embedding", None)
    assert (specs[1].name, specs[1].layer) == ("final_norm", None)
    assert specs[769].path == "transformer/decoder_layer_9/router/w"


def test_448_tensors_are_quantized_and_322_are_not():
    specs = tensor_specs(GROK_1)

    assert sum(spec.is_quantized for spec in specs) == 448
    assert sum(not spec.is_quantized for spec in specs) == 322


def test_only_row_parallel_tensors_have_eight_scale_rows():
    specs = tensor_specs(GROK_1)

    rows = {spec.path.split("/", 2)[-1]: spec.scale_groups for spec in specs if spec.layer == 10}

    assert {path for path, groups in rows.items() if groups == SHARDS} == {
        "moe/linear_1/w",
        "multi_head_attention/linear/w",
    }
    assert {path for path, groups in rows.items() if groups == 1} == {
        "moe/linear/w",
        "moe/linear_v/w",
        "multi_head_attention/key/w",
        "multi_head_attention/query/w",
        "multi_head_attention/value/w",
    }


def test_scales_have_the_leading_and_the_last_axis_of_their_weight():
    shapes = {spec.name: spec.scales_shape for spec in tensor_specs(GROK_1) if spec.is_quantized}

    assert shapes["layers.0.moe.gate"] == (8, 1, 32768)
    assert shapes["layers.0.moe.down"] == (8, 8, 6144)
    assert shapes["layers.0.attention.out"] == (8, 6144)
    assert shapes["layers.0.attention.key"] == (1, 1024)


def test_parameters_count_to_316_billion():
    total = 0
    for spec in tensor_specs(GROK_1):
        count = 1
        for length in spec.shape:
            count *= length
        total += count

    assert total == 315_684_820_992


def test_axes_name_every_dimension():
    for spec in tensor_specs(GROK_1):
        assert len(spec.axes) == len(spec.shape)

    by_name = {spec.name: spec.axes for spec in tensor_specs(GROK_1)}
    assert by_name["layers.3.moe.down"] == (Axis.EXPERTS, Axis.FFN, Axis.EMBED)
    assert by_name["layers.3.attention.out"] == (Axis.Q_HEADS, Axis.EMBED)
    assert by_name["layers.3.router"] == (Axis.EMBED, Axis.ROUTES)


def test_a_smaller_model_has_smaller_tensors_in_the_same_order():
    small = tensor_specs(replace(GROK_1, num_layers=2, emb_size=64, key_size=8, num_q_heads=16))

    assert len(small) == 26
    assert [spec.path for spec in small[:14]] == [spec.path for spec in tensor_specs(GROK_1)[:14]]
    assert {spec.name: spec.shape for spec in small}["layers.1.attention.query"] == (64, 128)


@given(num_layers=st.integers(1, 130), data=st.data())
def test_the_files_of_layers_are_those_of_their_tensors(num_layers, data):
    specs = tensor_specs(replace(GROK_1, num_layers=num_layers))
    layers = data.draw(st.sets(st.integers(0, num_layers - 1)))

    files = layer_files(len(specs), layers)

    assert files == {spec.file for spec in specs if spec.layer in layers}


@given(num_layers=st.integers(1, 130), beyond=st.integers(0, 10_000))
def test_layers_that_a_model_has_not_are_refused(num_layers, beyond):
    num_tensors = len(tensor_specs(replace(GROK_1, num_layers=num_layers)))

    with pytest.raises(ValueError, match=f"layers are 0 to {num_layers - 1}$"):
        layer_files(num_tensors, {0, num_layers + beyond})


@given(num_tensors=st.integers(0, 2000))
def test_only_whole_layers_make_a_model(num_tensors):
    one, two = (len(tensor_specs(replace(GROK_1, num_layers=layers))) for layers in (1, 2))
    assume(num_tensors < one or (num_tensors - one) % (two - one))

    with pytest.raises(ValueError, match="no whole layers"):
        layer_files(num_tensors, {0})
