from contextlib import suppress
from dataclasses import replace
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    MESHES,
    TINY,
    Arrays,
    can_hold,
    meshes,
    models,
    plain_values,
    put_together,
    storages,
)

from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.tensor_source import (
    LogicalTensor,
    ReleaseSource,
    Slices,
    Storage,
    chunks,
    extent,
    index_of,
)
from grokctl.errors import PlacementError
from grokctl.model.placement import MeshShape, place
from grokctl.model.precision import Precision
from grokctl.model.tensors import tensor_specs

# 96 columns divide by 16, and rows cross 64 elements
SMALL = replace(
    MINIATURE, vocab_size=48, emb_size=144, widening_factor=1, key_size=10, num_layers=1
)
ALL_MESHES = [pytest.param(mesh, id=mesh.slug) for mesh in MESHES if can_hold(mesh, SMALL)]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> ReleaseSource:
    root = tmp_path_factory.mktemp("release") / "small"
    write_miniature(root, SMALL, tokenizer=False)
    return ReleaseSource(open_release(root))


def whole_of(tensor: LogicalTensor) -> Slices:
    return tuple((0, length) for length in tensor.shape)


def stored_in(precision: Precision, group: int = 2) -> Storage:
    groups = {
        Precision.INT8: lambda spec: spec.scale_groups,
        Precision.INT4: lambda spec: spec.shape[-2] // group if spec.is_quantized else 0,
    }.get(precision, lambda _: 0)
    return Storage(
        config=SMALL,
        precision=precision,
        groups={spec.name: groups(spec) for spec in tensor_specs(SMALL)},
    )


def by_key(storage: Storage) -> dict[str, LogicalTensor]:
    return {tensor.key: tensor for tensor in storage.tensors}


# --- what a device holds


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_devices_hold_every_element_once_and_replicas_are_equal(data):
    config = data.draw(models())
    mesh, precision = data.draw(meshes(config)), data.draw(st.sampled_from(Precision))
    storage = data.draw(storages(config, mesh, precision))
    arrays = Arrays(storage)

    parts = {
        (tensor.key, device): np.ascontiguousarray(
            arrays.read(tensor, tensor.slices(mesh, device, config))
        )
        for tensor in storage.tensors
        for device in range(mesh.size)
    }

    for key, found in put_together(storage, mesh, parts).items():
        bits = f"u{found.dtype.itemsize}"
        np.testing.assert_array_equal(found.view(bits), arrays.arrays[key].view(bits))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_device_s_part_with_its_own_scales_means_what_the_whole_means(data):
    config = data.draw(models())
    mesh, precision = data.draw(meshes(config)), data.draw(st.sampled_from(Precision))
    storage = data.draw(storages(config, mesh, precision))
    arrays, device = Arrays(storage), data.draw(st.integers(0, mesh.size - 1))

    for spec in tensor_specs(config):
        groups = storage.groups[spec.name]
        weight = storage.weight(spec)
        part, scales = arrays.read(weight, weight.slices(mesh, device, config)), None
        if groups:
            twin = storage.scales(spec)
            scales = arrays.read(twin, twin.slices(mesh, device, config))
        placed = place(spec, scale_groups=groups, mesh=mesh, device=device, config=config)
        expected = arrays.values(spec)[index_of(placed.weight)]
        np.testing.assert_array_equal(plain_values(weight, part, scales), expected)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_scale_rows_that_no_device_s_inputs_line_up_with_are_refused_and_others_fit(data):
    mesh = data.draw(st.sampled_from(MESHES[:5]))
    rows = {
        spec.name: data.draw(
            st.integers(1, 12).filter(lambda n, spec=spec: spec.shape[-2] % n == 0)
        )
        if spec.is_quantized
        else 0
        for spec in tensor_specs(TINY)
    }
    storage = Storage(config=TINY, precision=Precision.INT8, groups=rows)

    for tensor in storage.tensors:
        with suppress(PlacementError):
            slices = tensor.slices(mesh, mesh.size - 1, TINY)
            assert all(0 <= low < high for low, high in slices)
            continue
        assert tensor.groups % mesh.model
        assert mesh.model % tensor.groups


@pytest.mark.parametrize("mesh", [MeshShape(1, 2), MeshShape(1, 16)], ids=str)
def test_int4_groups_that_a_split_would_cut_are_refused(mesh):
    storage = stored_in(Precision.INT4, group=SMALL.q_size)
    spec = next(spec for spec in tensor_specs(SMALL) if spec.name.endswith("attention.out"))

    with pytest.raises(PlacementError, match=f"not whole int4 groups of {SMALL.q_size}") as caught:
        storage.weight(spec).slices(mesh, 0, SMALL)

    assert str(caught.value).startswith(spec.name)


@pytest.mark.parametrize("mesh", ALL_MESHES)
def test_the_released_integers_and_scales_are_kept_to_the_bit(source, mesh):
    stored = {tensor.spec.name: tensor.map() for tensor in source.release.tensors}
    parts = {
        (tensor.key, device): source.read(tensor, tensor.slices(mesh, device, source.config))
        for tensor in source.storage.tensors
        for device in range(mesh.size)
    }

    found = put_together(source.storage, mesh, parts)

    for tensor in source.storage.tensors:
        released = np.ascontiguousarray(stored[tensor.spec.name][tensor.is_scales])
        bits = f"u{tensor.dtype.itemsize}"
        np.testing.assert_array_equal(found[tensor.key].view(bits), released.view(bits))


# --- a release as a source


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_part_of_a_release_is_that_part_of_the_whole(source, data):
    tensor = data.draw(st.sampled_from(source.storage.tensors))
    slices = tuple(
        (low := data.draw(st.integers(0, length - 1)), data.draw(st.integers(low + 1, length)))
        for length in tensor.shape
    )
    whole = source.read(tensor, whole_of(tensor))

    part = source.read(tensor, slices)

    np.testing.assert_array_equal(part, whole[index_of(slices)])
    assert part.flags.c_contiguous
    assert part.flags.owndata


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_rows_of_a_release_are_those_rows_of_the_whole_however_narrow(source, data):
    tensor = data.draw(st.sampled_from([t for t in source.storage.tensors if t.is_matrix]))
    *stack, inputs, outputs = tensor.shape
    lead = tuple(data.draw(st.integers(0, length - 1)) for length in stack)
    left = data.draw(st.integers(0, outputs - 1))
    right = data.draw(st.integers(left + 1, outputs))
    stops = sorted(data.draw(st.sets(st.integers(1, inputs), min_size=1, max_size=4)))
    whole = source.read(tensor, whole_of(tensor))[lead]

    with source.reading(tensor, lead, (left, right)) as read:
        for low, high in zip([0, *stops], stops, strict=False):
            np.testing.assert_array_equal(read(low, high), whole[low:high, left:right])


def test_a_part_of_a_release_is_kept_when_more_is_read(source):
    tensor = source.storage.tensors[0]
    first = source.read(tensor, ((0, 4), (0, 8)))
    before = first.copy()

    source.read(tensor, ((4, 8), (0, 8)))

    np.testing.assert_array_equal(first, before)


# --- the tensors


@pytest.mark.parametrize("precision", Precision)
def test_every_parameter_has_a_weight_and_scales_follow_integers(precision):
    keys = [tensor.key for tensor in stored_in(precision).tensors]

    expected = []
    for spec in tensor_specs(SMALL):
        expected.append(f"{spec.name}.weight")
        if spec.is_quantized and precision in {Precision.INT8, Precision.INT4}:
            expected.append(f"{spec.name}.scales")
    assert keys == expected


@pytest.mark.parametrize(
    ("precision", "key", "shape", "dtype"),
    [
        pytest.param("int8", "embedding.weight", (48, 144), np.float32, id="embedding"),
        pytest.param("int4", "final_norm.weight", (144,), np.float32, id="norm"),
        pytest.param("bf16", "layers.0.router.weight", (144, 8), np.float32, id="router"),
        pytest.param("int8", "layers.0.attention.query.weight", (144, 160), np.int8, id="query"),
        pytest.param(
            "int8", "layers.0.attention.query.scales", (1, 160), BFLOAT16, id="query-scales"
        ),
        pytest.param("int8", "layers.0.attention.out.scales", (8, 144), BFLOAT16, id="out-scales"),
        pytest.param("int8", "layers.0.moe.gate.weight", (8, 144, 96), np.int8, id="gate"),
        pytest.param("int8", "layers.0.moe.down.weight", (8, 96, 144), np.int8, id="down"),
        pytest.param("int8", "layers.0.moe.down.scales", (8, 8, 144), BFLOAT16, id="down-scales"),
        pytest.param("int4", "layers.0.moe.down.weight", (8, 48, 144), np.uint8, id="down-int4"),
        pytest.param(
            "int4", "layers.0.moe.down.scales", (8, 48, 144), BFLOAT16, id="down-int4-scales"
        ),
        pytest.param("bf16", "layers.0.moe.up.weight", (8, 144, 96), BFLOAT16, id="up-bf16"),
        pytest.param("float32", "layers.0.moe.up.weight", (8, 144, 96), np.float32, id="up-f32"),
    ],
)
def test_weights_keep_the_orientation_of_the_release(precision, key, shape, dtype):
    tensor = by_key(stored_in(Precision(precision)))[key]

    assert tensor.shape == shape
    assert tensor.dtype == dtype


def test_only_weights_of_inputs_and_outputs_are_ever_converted():
    found = {key for key, tensor in by_key(stored_in(Precision.INT8)).items() if tensor.is_matrix}

    quantised = {f"{spec.name}.weight" for spec in tensor_specs(SMALL) if spec.is_quantized}
    assert found == quantised | {"layers.0.router.weight"}


@pytest.mark.parametrize("precision", Precision)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_what_is_stored_of_a_part_is_that_part_again(precision, data):
    tensor = data.draw(st.sampled_from([t for t in stored_in(precision).tensors if t.is_matrix]))
    step = 2 if tensor.precision is Precision.INT4 else 1
    released = []
    for axis, length in enumerate(tensor.spec.shape):
        size = step if axis == len(tensor.spec.shape) - 2 else 1
        low = data.draw(st.integers(0, length // size - 1))
        released.append((low * size, data.draw(st.integers(low + 1, length // size)) * size))

    stored = tensor.stored(tuple(released))

    *lead, (low, high), outputs = stored
    assert (*lead, (low * step, high * step), outputs) == tuple(released)
    assert prod(extent(stored)) * step == prod(extent(tuple(released)))
    assert all(high <= length for (_, high), length in zip(stored, tensor.shape, strict=True))


# --- chunks


@st.composite
def boxes(draw: st.DrawFn) -> Slices:
    axes = draw(st.integers(1, 4))
    return tuple(
        (low := draw(st.integers(0, 3)), low + draw(st.integers(1, 7))) for _ in range(axes)
    )


@settings(deadline=None, max_examples=300)
@given(slices=boxes(), itemsize=st.sampled_from([1, 2, 4]), limit=st.integers(1, 600))
def test_chunks_follow_each_other_in_c_order_and_respect_the_limit(slices, itemsize, limit):
    array = np.arange(10**4).reshape(10, 10, 10, 10)[(0,) * (4 - len(slices))]

    parts = chunks(slices, itemsize=itemsize, limit=limit)

    joined = np.concatenate([array[index_of(part)].ravel() for part in parts])
    np.testing.assert_array_equal(joined, array[index_of(slices)].ravel())
    assert sum(prod(extent(part)) for part in parts) == prod(extent(slices))
    for part in parts:
        is_row = prod(extent(part)[:-1]) == 1 and part[-1] == slices[-1]
        assert is_row or prod(extent(part)) * itemsize <= limit


def test_what_fits_is_one_chunk():
    slices = ((0, 4), (2, 8))

    assert list(chunks(slices, itemsize=4, limit=96)) == [slices]


def test_chunks_are_no_smaller_than_they_need_to_be():
    parts = chunks(((0, 10), (0, 6)), itemsize=1, limit=25)

    assert [extent(part) for part in parts] == [(4, 6), (4, 6), (2, 6)]


@pytest.mark.parametrize("limit", [100, 1000, 20_000, 10**9])
@pytest.mark.parametrize("mesh", [MeshShape(1, 1), MeshShape(1, 4), MeshShape(2, 8)], ids=str)
def test_the_bytes_of_all_chunks_are_the_bytes_of_the_cut(source, mesh, limit):
    for tensor in source.storage.tensors[:7]:
        slices = tensor.slices(mesh, mesh.size - 1, source.config)
        whole = source.read(tensor, slices)

        parts = chunks(slices, itemsize=tensor.dtype.itemsize, limit=limit)
        joined = b"".join(whole_part(whole, slices, part) for part in parts)

        assert joined == whole.tobytes()


def whole_part(whole, slices: Slices, part: Slices) -> bytes:
    inner = tuple(
        slice(low - start, high - start)
        for (low, high), (start, _) in zip(part, slices, strict=True)
    )
    return whole[inner].tobytes()
