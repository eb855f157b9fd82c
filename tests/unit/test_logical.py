from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.logical import (
    LogicalTensor,
    ReleaseSource,
    Slices,
    chunks,
    extent,
    logical_tensors,
)
from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.release import open_release
from grokctl.errors import PlacementError
from grokctl.model.config import GrokConfig
from grokctl.model.placement import MESH_SIZES, MeshShape, place
from grokctl.model.tensors import TensorSpec, tensor_specs

# 176 columns divide by 16, rows and columns cross the 128 that are turned at a time
SMALL = replace(
    MINIATURE,
    vocab_size=48,
    emb_size=144,
    widening_factor=1,
    key_size=10,
    num_layers=1,
    pad_token=0,
    eos_token=2,
)
MESHES = [
    pytest.param(mesh, id=mesh.slug)
    for size in MESH_SIZES
    for expert in (1, 2, 4, 8)
    if expert <= size and (mesh := MeshShape(expert, size // expert))
]


@dataclass
class Arrays:
    """A source of random released arrays."""

    config: GrokConfig
    groups: Mapping[str, int]
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.weights, self.scales = {}, {}
        for spec in tensor_specs(self.config):
            groups = self.groups[spec.name]
            if groups:
                self.weights[spec.name] = rng.integers(-127, 128, spec.shape, dtype=np.int8)
                shape = (*spec.shape[:-2], groups, spec.shape[-1])
                self.scales[spec.name] = rng.uniform(0.5, 2, shape).astype(BFLOAT16)
            else:
                self.weights[spec.name] = rng.standard_normal(spec.shape, dtype=np.float32)

    def read(self, tensor: LogicalTensor, slices: Slices):
        arrays = self.scales if tensor.is_scales else self.weights
        return tensor.cut(arrays[tensor.spec.name], slices)

    def dequantised(self, spec: TensorSpec):
        """As the release means it: inputs before outputs, each row with the scale of its group."""
        weight = self.weights[spec.name]
        if spec.name not in self.scales:
            return weight
        scales = self.scales[spec.name].astype(np.float32)
        *lead, inputs, outputs = weight.shape
        rows = weight.reshape(*lead, scales.shape[-2], -1, outputs).astype(np.float32)
        return (rows * scales[..., :, None, :]).reshape(*lead, inputs, outputs)


def released_groups(config: GrokConfig) -> dict[str, int]:
    return {spec.name: spec.scale_groups for spec in tensor_specs(config)}


def by_key(source) -> dict[str, LogicalTensor]:
    return {tensor.key: tensor for tensor in logical_tensors(source)}


def cut_released(array, slices):
    return array[tuple(slice(*bounds) for bounds in slices)]


def as_released(tensor: LogicalTensor, weight, scales):
    """Turn a device's part back: dequantised, inputs before outputs."""
    if scales is None:
        is_matrix = weight.ndim == 2 and tensor.spec.name != "embedding"
        return weight.T if is_matrix else weight
    wide = weight.astype(np.float32) * scales.astype(np.float32)[..., None]
    wide = np.moveaxis(wide, -1, -2)  # (*lead, groups, inputs, outputs)
    return wide.reshape(*wide.shape[:-3], -1, wide.shape[-1])


@pytest.fixture(scope="module")
def source() -> Arrays:
    return Arrays(SMALL, released_groups(SMALL))


@pytest.fixture(scope="module")
def release_source(tmp_path_factory) -> ReleaseSource:
    root = tmp_path_factory.mktemp("release") / "small"
    write_miniature(root, SMALL, tokenizer=False)
    return ReleaseSource(open_release(root))


# --- cutting


def assert_device_holds_its_part(source: Arrays, mesh: MeshShape, device: int) -> None:
    config, tensors = source.config, by_key(source)
    for spec in tensor_specs(config):
        groups = source.groups[spec.name]
        tensor = tensors[f"{spec.name}.weight"]
        slices = tensor.slices(mesh, device, config)
        weight, scales = source.read(tensor, slices), None
        assert weight.shape == extent(slices)
        assert weight.flags.c_contiguous
        assert weight.dtype == tensor.dtype
        if groups:
            twin = tensors[f"{spec.name}.scales"]
            cut = twin.slices(mesh, device, config)
            scales = source.read(twin, cut)
            assert scales.shape == extent(cut)
            assert scales.dtype == BFLOAT16
            assert weight.shape[:-1] == scales.shape
        part = place(spec, scale_groups=groups, mesh=mesh, device=device, config=config)
        expected = cut_released(source.dequantised(spec), part.weight)
        np.testing.assert_array_equal(as_released(tensor, weight, scales), expected)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_device_s_part_means_what_the_release_means(source, mesh):
    for device in range(mesh.size):
        assert_device_holds_its_part(source, mesh, device)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_the_release_says_how_many_scale_rows_there_are(data):
    config = replace(
        SMALL,
        emb_size=data.draw(st.sampled_from([24, 48])),
        widening_factor=4,
        key_size=data.draw(st.sampled_from([2, 6])),
        num_experts=data.draw(st.sampled_from([2, 4])),
    )
    rows = st.sampled_from([1, 2, 3, 4, 6, 8])
    groups = {
        spec.name: data.draw(rows.filter(lambda n, spec=spec: spec.shape[-2] % n == 0))
        if spec.is_quantized
        else 0
        for spec in tensor_specs(config)
    }
    mesh = MeshShape(data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, 2, 4, 8])))
    source = Arrays(config, groups, seed=data.draw(st.integers(0, 5)))

    for device in range(mesh.size):
        try:
            assert_device_holds_its_part(source, mesh, device)
        except PlacementError:
            assert any(count not in {1, 2, 4, 8} for count in groups.values())


@pytest.mark.parametrize("mesh", MESHES)
def test_the_released_integers_and_scales_are_kept_to_the_bit(release_source, mesh):
    config = release_source.config
    stored = {tensor.spec.name: tensor.map() for tensor in release_source.release.tensors}
    for tensor in logical_tensors(release_source):
        weight, scales = stored[tensor.spec.name]
        released = scales if tensor.is_scales else weight
        whole = np.zeros(tensor.shape, tensor.dtype).view(f"u{tensor.dtype.itemsize}")
        for device in range(mesh.size):
            slices = tensor.slices(mesh, device, config)
            part = release_source.read(tensor, slices)
            whole[tuple(slice(*bounds) for bounds in slices)] = part.view(whole.dtype)

        released = np.ascontiguousarray(released).view(whole.dtype)
        if tensor.is_scales or tensor.spec.name == "embedding" or released.ndim == 1:
            expected = released
        elif tensor.groups:
            *lead, inputs, outputs = released.shape
            expected = released.reshape(
                *lead, tensor.groups, inputs // tensor.groups, outputs
            ).swapaxes(-1, -2)
        else:
            expected = released.T
        np.testing.assert_array_equal(whole, expected)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_part_is_that_part_of_the_whole(source, data):
    tensor = data.draw(st.sampled_from(logical_tensors(source)))
    slices = []
    for axis, length in enumerate(tensor.shape):
        low = data.draw(st.integers(0, length - 1))
        is_group = tensor.groups > 1 and not tensor.is_scales and axis == len(tensor.shape) - 3
        high = low + 1 if is_group else data.draw(st.integers(low + 1, length))
        slices.append((low, high))
    whole = source.read(tensor, tuple((0, length) for length in tensor.shape))

    part = source.read(tensor, tuple(slices))

    np.testing.assert_array_equal(part, cut_released(whole, slices))
    assert part.flags.c_contiguous


# --- the tensors


def test_every_parameter_has_a_weight_and_every_quantised_one_scales(source):
    keys = [tensor.key for tensor in logical_tensors(source)]

    specs = tensor_specs(SMALL)
    assert len(set(keys)) == len(keys)
    assert [key for key in keys if key.endswith(".weight")] == [
        f"{spec.name}.weight" for spec in specs
    ]
    assert {key for key in keys if key.endswith(".scales")} == {
        f"{spec.name}.scales" for spec in specs if spec.is_quantized
    }


@pytest.mark.parametrize(
    ("key", "shape", "dtype"),
    [
        pytest.param("embedding.weight", (48, 144), np.float32, id="embedding"),
        pytest.param("final_norm.weight", (144,), np.float32, id="norm"),
        pytest.param("layers.0.router.weight", (8, 144), np.float32, id="router"),
        pytest.param("layers.0.attention.query.weight", (1, 160, 144), np.int8, id="query"),
        pytest.param("layers.0.attention.query.scales", (1, 160), BFLOAT16, id="query-scales"),
        pytest.param("layers.0.attention.out.weight", (8, 144, 20), np.int8, id="out"),
        pytest.param("layers.0.attention.out.scales", (8, 144), BFLOAT16, id="out-scales"),
        pytest.param("layers.0.moe.gate.weight", (8, 1, 96, 144), np.int8, id="gate"),
        pytest.param("layers.0.moe.down.weight", (8, 8, 144, 12), np.int8, id="down"),
        pytest.param("layers.0.moe.down.scales", (8, 8, 144), BFLOAT16, id="down-scales"),
    ],
)
def test_weights_are_outputs_first_and_groups_before_them(source, key, shape, dtype):
    tensor = by_key(source)[key]

    assert tensor.shape == shape
    assert tensor.dtype == dtype


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

    joined = np.concatenate([cut_released(array, part).ravel() for part in parts])
    np.testing.assert_array_equal(joined, cut_released(array, slices).ravel())
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


@pytest.mark.parametrize("limit", [1, 100, 1000, 20_000, 10**9])
@pytest.mark.parametrize("mesh", [MeshShape(1, 1), MeshShape(1, 4), MeshShape(2, 8)])
def test_the_bytes_of_all_chunks_are_the_bytes_of_the_cut(release_source, mesh, limit):
    device = mesh.size - 1
    for tensor in logical_tensors(release_source)[:7]:
        slices = tensor.slices(mesh, device, release_source.config)
        whole = release_source.read(tensor, slices)

        parts = chunks(slices, itemsize=tensor.dtype.itemsize, limit=limit)
        if len(parts) > 20_000:
            continue
        joined = b"".join(release_source.read(tensor, part).tobytes() for part in parts)

        assert joined == whole.tobytes()
