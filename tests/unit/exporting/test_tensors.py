"""Every value of an exported tensor is that of its source, wherever it lies."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, Arrays

from grokctl.checkpoint.blocks import BLOCK, Q4_0, Q8_0
from grokctl.checkpoint.gguf import TensorType
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.tensor_source import Storage
from grokctl.exporting.tensors import ExportTensor
from grokctl.model.precision import Precision
from grokctl.model.tensors import tensor_specs
from grokctl.resharding.convert import NOTHING

SPECS = tensor_specs(TINY)
WEIGHTS = [spec for spec in SPECS if spec.is_quantized]
LIMITS = st.sampled_from([1, 3000, 10**4, 10**6])


def stored(precision, group=None):
    """How TINY is stored; its inputs are 64, 96 and 128."""
    groups = dict.fromkeys((spec.name for spec in SPECS), 0)
    for spec in WEIGHTS:
        whole = spec.shape[-2]
        size = whole if group is None or whole % group else group
        groups[spec.name] = whole // size if precision in {"int8", "int4"} else 0
    return Storage(config=TINY, precision=Precision(precision), groups=groups)


def made(source, part, limit, padding=0):
    """The bytes of a tensor, and its rounding error."""
    data, squares = [], NOTHING
    for piece in part.pieces(3, padding=padding, limit=limit):
        memory = np.full(piece.nbytes, 0xA5, np.uint8)
        squares += piece.make(source, memory).squares
        ((file, frames),) = piece.frames(memory.data, None).items()
        assert file == 3
        data += [bytes(frame) for _, frame in frames]
    return b"".join(data), squares


def values_of(data, part):
    """What the bytes of a tensor mean, `(*lead, outputs, inputs)`."""
    if part.type is TensorType.Q8_0:
        blocks = np.frombuffer(data, Q8_0)
        wide = blocks["codes"] * blocks["scale"].astype(np.float32)[:, None]
    elif part.type is TensorType.Q4_0:
        blocks = np.frombuffer(data, Q4_0)
        codes = np.concatenate([blocks["codes"] & 15, blocks["codes"] >> 4], axis=1)
        wide = (codes.astype(np.float32) - 8) * blocks["scale"].astype(np.float32)[:, None]
    else:
        wide = np.frombuffer(data, BFLOAT16 if part.type is TensorType.BF16 else "<f4")
    return wide.astype(np.float32).reshape(part.shape)


def turned(values):
    return np.swapaxes(values, -1, -2)


@settings(max_examples=40)
@given(
    spec=st.sampled_from(WEIGHTS),
    group=st.sampled_from([32, 64, None]),
    limit=LIMITS,
    seed=st.integers(0, 9),
)
def test_q8_0_is_the_same_integers_and_scales(spec, group, limit, seed):
    source = Arrays(stored("int8", group), seed)
    source.arrays[f"{spec.name}.weight"].flat[::7] = -128
    part = ExportTensor(name="x", tensor=source.storage.weight(spec), type=TensorType.Q8_0)

    data, squares = made(source, part, limit)

    np.testing.assert_array_equal(values_of(data, part), turned(source.values(spec)))
    codes = np.frombuffer(data, Q8_0)["codes"].reshape(part.shape)
    np.testing.assert_array_equal(codes, turned(source.arrays[f"{spec.name}.weight"]))
    assert squares == NOTHING


@settings(max_examples=15)
@given(spec=st.sampled_from(WEIGHTS), limit=LIMITS)
def test_scales_are_folded_by_powers_of_two_and_nothing_else_changes(spec, limit):
    source = Arrays(stored("int8", 32))
    plain = ExportTensor(name="x", tensor=source.storage.weight(spec), type=TensorType.Q8_0)
    count = len(plain.matrices)
    shifts = tuple(range(-2, count - 2))
    part = replace(plain, shifts=shifts)

    data, _ = made(source, part, limit)

    factors = np.exp2(np.array(shifts, np.float32)).reshape(*spec.shape[:-2], 1, 1)
    np.testing.assert_array_equal(
        values_of(data, part), turned(source.values(spec)) * (factors if count > 1 else factors[0])
    )


@settings(max_examples=40)
@given(
    spec=st.sampled_from([*WEIGHTS, *(spec for spec in SPECS if spec.name.endswith("router"))]),
    precision=st.sampled_from(["int8", "int4", "bf16", "float32"]),
    limit=LIMITS,
    data=st.data(),
)
def test_floats_are_integer_times_scale(spec, precision, limit, data):
    source = Arrays(stored(precision, 32))
    kind = data.draw(st.sampled_from([TensorType.F32, TensorType.BF16]))
    if not spec.is_quantized:
        kind = TensorType.F32
    target = stored("bf16" if kind is TensorType.BF16 else "float32")
    part = ExportTensor(name="x", tensor=target.weight(spec), type=kind)

    found, squares = made(source, part, limit)

    values = turned(source.values(spec))
    if kind is TensorType.BF16:
        wanted = values.astype(BFLOAT16).astype(np.float32)
        assert squares.error == pytest.approx(float(((wanted - values) ** 2).sum()), rel=1e-3)
    else:
        wanted = values
        assert not squares.error
    np.testing.assert_array_equal(values_of(found, part), wanted)


@settings(max_examples=20)
@given(spec=st.sampled_from(WEIGHTS), group=st.sampled_from([32, 64]), limit=LIMITS)
def test_q4_0_from_int4_is_exact(spec, group, limit):
    source = Arrays(stored("int4", group))
    part = ExportTensor(name="x", tensor=source.storage.weight(spec), type=TensorType.Q4_0)

    data, squares = made(source, part, limit)

    np.testing.assert_array_equal(values_of(data, part), turned(source.values(spec)))
    assert squares == NOTHING


@settings(max_examples=20)
@given(
    spec=st.sampled_from(WEIGHTS),
    precision=st.sampled_from(["int8", "float32", "bf16", "int4"]),
    limit=LIMITS,
    exponent=st.sampled_from([0, -30]),
)
def test_q4_0_from_anything_else_says_what_it_loses(spec, precision, limit, exponent):
    source = Arrays(stored(precision, 48 if precision == "int4" else 32))
    for key, values in source.arrays.items():
        if values.dtype.kind not in "iu":  # scales that float16 holds only roughly, or not at all
            source.arrays[key] = (values.astype(np.float32) * 2.0**exponent).astype(values.dtype)
    target = stored("int4", 32).weight(spec)
    part = ExportTensor(name="x", tensor=target, type=TensorType.Q4_0)

    data, squares = made(source, part, limit)

    values = turned(source.values(spec)).astype(np.float64)
    lost = float(((values_of(data, part) - values) ** 2).sum())
    if precision == "int4" and spec.shape[-2] % 48:
        return  # its one group is of whole blocks, and halves of it are not rounded again
    assert squares.error == pytest.approx(lost, rel=2e-3)
    assert squares.total == pytest.approx(float((values**2).sum()), rel=1e-3)
    assert exponent or squares.relative_rms < 0.15


@pytest.mark.parametrize("kind", [TensorType.F32, TensorType.BF16, TensorType.Q8_0])
@pytest.mark.parametrize("limit", [1, 1000, 10**6])
def test_the_embedding_keeps_its_orientation_and_its_loss_is_measured(kind, limit):
    source = Arrays(stored("int8"))
    (spec,) = (spec for spec in SPECS if spec.name == "embedding")
    part = ExportTensor(name="x", tensor=source.storage.weight(spec), type=kind)

    data, squares = made(source, part, limit)

    values, found = source.values(spec), values_of(data, part)
    lost = float(((found - values) ** 2).sum())
    assert squares.error == pytest.approx(lost, rel=1e-3)
    assert squares.total == pytest.approx(float((values**2).sum()), rel=1e-3)
    assert squares.relative_rms < {TensorType.F32: 1e-9, TensorType.BF16: 3e-3}.get(kind, 6e-3)
    if kind is TensorType.Q8_0:
        blocks = np.frombuffer(data, Q8_0)
        largest = np.abs(values.reshape(-1, BLOCK)).max(axis=1)
        np.testing.assert_allclose(blocks["scale"], largest / 127, rtol=1e-3)


def test_norms_are_copied_and_padding_is_zeros():
    source = Arrays(stored("int8"))
    (spec,) = (spec for spec in SPECS if spec.name == "final_norm")
    part = ExportTensor(name="x", tensor=source.storage.weight(spec), type=TensorType.F32)

    data, _ = made(source, part, 1, padding=20)

    assert data == source.values(spec).tobytes() + bytes(20)


def test_only_the_last_piece_is_padded():
    source = Arrays(stored("int8"))
    spec = WEIGHTS[0]
    part = ExportTensor(name="x", tensor=source.storage.weight(spec), type=TensorType.Q8_0)

    data, _ = made(source, part, 2000, padding=14)

    assert data == made(source, part, 10**6)[0] + bytes(14)


def test_an_expert_alone_is_that_of_the_stack():
    source = Arrays(stored("int8"))
    (spec,) = (spec for spec in WEIGHTS if spec.name.endswith("moe.down"))
    whole = ExportTensor(name="x", tensor=stored("bf16").weight(spec), type=TensorType.BF16)
    parts = [replace(whole, lead=(expert,)) for expert in range(TINY.num_experts)]

    data = [made(source, part, 4000)[0] for part in parts]

    assert [part.shape for part in parts] == [spec.shape[:0:-1]] * TINY.num_experts
    assert b"".join(data) == made(source, whole, 4000)[0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["embedding", "final_norm"])
def test_values_that_are_not_finite_show_in_the_sums(name, value):
    source = Arrays(stored("int8"))
    (spec,) = (spec for spec in SPECS if spec.name == name)
    source.arrays[f"{name}.weight"].flat[5] = value
    part = ExportTensor(name="x", tensor=source.storage.weight(spec), type=TensorType.F32)

    _, squares = made(source, part, 10**6)

    assert not np.isfinite(squares.total)


@pytest.mark.parametrize("kind", [TensorType.Q8_0, TensorType.Q4_0])
def test_blocks_are_whole_however_few_rows_are_copied_at_a_time(monkeypatch, kind):
    source = Arrays(stored("int8" if kind is TensorType.Q8_0 else "int4", 32))
    spec = WEIGHTS[0]
    part = ExportTensor(name="x", tensor=source.storage.weight(spec), type=kind)
    wanted, _ = made(source, part, 10**6)

    monkeypatch.setattr("grokctl.exporting.tensors._TALL", 50 * spec.shape[-1])

    assert made(source, part, 10**6)[0] == wanted
