"""Scales in float16: exact, meaningless, folded, or their weights as float32; never rounded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, Arrays

from grokctl.checkpoint.gguf import TensorType
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.tensor_source import Storage
from grokctl.errors import CorruptCheckpointError
from grokctl.exporting.scales import PARTNERS, fit_scales
from grokctl.exporting.tensors import ExportTensor, to_float16
from grokctl.model.precision import Precision
from grokctl.model.tensors import tensor_specs

SPECS = {spec.name: spec for spec in tensor_specs(TINY)}
GROUPS = {name: spec.shape[-2] // 32 if spec.is_quantized else 0 for name, spec in SPECS.items()}
INT8 = Storage(config=TINY, precision=Precision.INT8, groups=GROUPS)
WEIGHTS = [INT8.weight(spec) for spec in SPECS.values() if spec.is_quantized]
LAYER = "layers.0"
SMALL, LARGE = 2.0**-17, 65280.0


def source_of(changes) -> Arrays:
    """Random weights, in which some scales are others: by slot, a value or an array."""
    source = Arrays(INT8)
    for slot, value in changes.items():
        source.arrays[f"{LAYER}.{slot}.scales"][..., 0, 0] = value
    return source


def fitted(changes):
    return fit_scales(source_of(changes), WEIGHTS)


@pytest.mark.parametrize(
    "value", [0.0, -0.0, SMALL, -SMALL, LARGE, -LARGE, 1.0, -1.5, SMALL * 1.9921875, 2.0**-24]
)
def test_what_float16_holds_is_left_alone(value):
    found = fitted({"moe.gate": value})

    assert (found.misfits, dict(found.shifts), found.float32) == (0, {}, frozenset())
    assert found.checked == sum(source_of({}).arrays[w.key[:-6] + "scales"].size for w in WEIGHTS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scales_that_are_not_finite_are_refused(value):
    with pytest.raises(CorruptCheckpointError, match=r"layers.0.moe.up.scales.*not finite"):
        fitted({"moe.up": value})


@pytest.mark.parametrize("value", [SMALL * 0.99609375, 65536.0, -(2.0**20), 2.0**-130])
def test_a_gate_that_does_not_fit_is_float32(value):
    found = fitted({"moe.gate": value})

    assert found.float32 == {f"{LAYER}.moe.gate"}
    assert (found.misfits, dict(found.shifts)) == (TINY.num_experts, {})


@pytest.mark.parametrize(("first", "second"), PARTNERS.items())
@pytest.mark.parametrize("value", [SMALL * 0.99609375, -(2.0**18)])
@pytest.mark.parametrize("is_second", [False, True])
def test_a_pair_is_folded_by_opposite_powers(first, second, value, is_second):
    found = fitted({second if is_second else first: value})

    assert found.shifts.keys() == {f"{LAYER}.{first}", f"{LAYER}.{second}"}
    ours, other = found.shifts[f"{LAYER}.{first}"], found.shifts[f"{LAYER}.{second}"]
    assert ours == tuple(-one for one in other)
    sign = (-1 if is_second else 1) * (1 if abs(value) < 1 else -1)
    assert all(one * sign > 0 for one in ours)
    assert not found.float32


def test_a_fold_is_as_small_as_it_can_be():
    found = fitted({"attention.value": 2.0**16})

    assert found.shifts == {f"{LAYER}.attention.value": (-1,), f"{LAYER}.attention.out": (1,)}


def test_each_expert_is_folded_by_itself():
    source = source_of({})
    source.arrays[f"{LAYER}.moe.up.scales"][1, 0, 0] = 2.0**17

    found = fit_scales(source, WEIGHTS)

    assert found.shifts[f"{LAYER}.moe.up"] == (0, -2)
    assert found.shifts[f"{LAYER}.moe.down"] == (0, 2)


def test_a_pair_that_cannot_be_folded_is_float32_where_it_does_not_fit():
    source = source_of({"attention.value": 2.0**16})
    source.arrays[f"{LAYER}.attention.value.scales"][0, 1] = SMALL / 2**7

    found = fit_scales(source, WEIGHTS)

    assert (dict(found.shifts), found.float32) == ({}, {f"{LAYER}.attention.value"})


@pytest.mark.parametrize("value", [SMALL / 3, 1e30])
def test_a_scale_of_zeros_means_nothing(value):
    source = source_of({"moe.gate": value})
    weight = source.arrays[f"{LAYER}.moe.gate.weight"]
    weight[:, :32, 0] = 0

    found = fit_scales(source, WEIGHTS)

    assert (found.misfits, found.float32) == (TINY.num_experts, frozenset())
    part = ExportTensor(name="x", tensor=WEIGHTS[0], type=TensorType.Q8_0)
    assert part.tensor.spec.name == f"{LAYER}.moe.gate"
    for piece in part.pieces(0, padding=0, limit=10**6):
        memory = np.empty(piece.nbytes, np.uint8)
        piece.make(source, memory)
        assert not memory[:2].any()


def test_a_scale_of_zeros_is_never_written_as_infinite():
    largest = np.array([3e38], BFLOAT16)

    with np.errstate(over="ignore"):
        assert to_float16(largest, 3, is_checked=True) == 0  # infinite even in float32


def test_a_scale_of_one_integer_means_something_wherever_that_lies(monkeypatch):
    monkeypatch.setattr("grokctl.exporting.scales._ROWS", 5 * TINY.ffn_size)
    source = source_of({"moe.gate": 1e30})
    weight = source.arrays[f"{LAYER}.moe.gate.weight"]
    weight[:, :32, 0] = 0
    weight[1, 3, 0] = 1

    assert fit_scales(source, WEIGHTS).float32 == {f"{LAYER}.moe.gate"}


@settings(max_examples=60)
@given(st.data())
def test_whatever_the_scales_are_nothing_is_rounded(data):
    bits = st.integers(0, 2**16 - 1).filter(lambda one: one & 0x7F80 != 0x7F80)
    source = source_of({})
    for weight in WEIGHTS:
        scales = source.arrays[weight.key[:-6] + "scales"]
        for place in data.draw(st.lists(st.integers(0, scales.size - 1), max_size=2)):
            scales.reshape(-1)[place] = np.uint16(data.draw(bits)).view(BFLOAT16)

    found = fit_scales(source, WEIGHTS)

    for weight in WEIGHTS:
        name = weight.spec.name
        scales = source.arrays[f"{name}.scales"].astype(np.float32)
        scales = scales.reshape(-1, *scales.shape[-2:])
        shifts = np.array(found.shifts.get(name, (0,) * len(scales)), np.float64)
        folded = scales.astype(np.float64) * np.exp2(shifts)[:, None, None]
        with np.errstate(over="ignore"):
            is_exact = (folded.astype(np.float16).astype(np.float64) == folded).all()
        assert is_exact == (name not in found.float32)
