import re
from collections import Counter
from dataclasses import replace
from math import prod

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.miniature import MINIATURE
from grokctl.errors import PlacementError, UsageError
from grokctl.model.config import GROK_1, GrokConfig
from grokctl.model.placement import MESH_SIZES, MeshShape, Placed, check_mesh, mesh_for, place
from grokctl.model.tensors import TensorSpec, tensor_specs

MESHES = [
    MeshShape(expert, size // expert)
    for size in MESH_SIZES
    for expert in MESH_SIZES
    if expert <= size
]
ALL_MESHES = [pytest.param(mesh, id=mesh.slug) for mesh in MESHES]


def passes(mesh: MeshShape, config: GrokConfig) -> bool:
    try:
        check_mesh(mesh, config)
    except PlacementError:
        return False
    return True


def spec_named(config: GrokConfig, name: str) -> TensorSpec:
    return next(spec for spec in tensor_specs(config) if spec.name == name)


def placed(spec, mesh, config, *, scale_groups=None) -> list[Placed]:
    groups = spec.scale_groups if scale_groups is None else scale_groups
    return [
        place(spec, scale_groups=groups, mesh=mesh, device=device, config=config)
        for device in range(mesh.size)
    ]


def assert_tiled(shape: tuple[int, ...], slices: list[tuple[tuple[int, int], ...]]) -> None:
    """Different slices tile the tensor exactly once, and each lies on equally many devices."""
    copies = Counter(slices)
    covered = np.zeros(shape, np.int8)
    for part in copies:
        assert all(
            0 <= low < high <= length for (low, high), length in zip(part, shape, strict=True)
        )
        covered[tuple(slice(*bounds) for bounds in part)] += 1
    assert (covered == 1).all()
    assert len(set(copies.values())) == 1


@st.composite
def configs(draw: st.DrawFn) -> GrokConfig:
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 12, 16]))
    experts = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
    return replace(
        GROK_1,
        num_layers=1,
        num_kv_heads=kv_heads,
        num_q_heads=kv_heads * draw(st.integers(1, 12)),
        key_size=draw(st.sampled_from([2, 4, 6])),
        num_experts=experts,
        num_selected_experts=1,
        emb_size=draw(st.integers(2, 24)),
        widening_factor=draw(st.sampled_from([1, 3, 4, 6, 8])),
        vocab_size=draw(st.sampled_from([3, 8, 40, 48, 50, 64])),
    )


# --- tiling


@settings(deadline=None, max_examples=60)
@given(config=configs())
def test_over_a_mesh_that_passes_the_slices_tile_every_tensor(config):
    for mesh in filter(lambda mesh: passes(mesh, config), MESHES):
        for spec in tensor_specs(config):
            parts = placed(spec, mesh, config, scale_groups=0)

            assert_tiled(spec.shape, [part.weight for part in parts])
            assert all(part.scales is None for part in parts)
            assert {part.shape for part in parts} == {parts[0].shape}


@settings(deadline=None, max_examples=60)
@given(config=configs(), data=st.data())
def test_scale_rows_are_exactly_those_that_cover_a_device_s_inputs(config, data):
    mesh = data.draw(st.sampled_from([mesh for mesh in MESHES if passes(mesh, config)]))
    spec = data.draw(st.sampled_from([spec for spec in tensor_specs(config) if spec.is_quantized]))
    inputs = spec.shape[-2]
    groups = data.draw(st.sampled_from([n for n in range(1, 33) if inputs % n == 0]))
    width = inputs // groups

    shares = {part.weight[-2] for part in placed(spec, mesh, config, scale_groups=0)}
    is_cut = any(
        low // width != (high - 1) // width and (low % width or high % width)
        for low, high in shares
    )
    if is_cut:
        with pytest.raises(PlacementError, match=re.escape(spec.name)):
            placed(spec, mesh, config, scale_groups=groups)
        return

    parts = placed(spec, mesh, config, scale_groups=groups)

    for part in parts:
        low, high = part.weight[-2]
        first, last = part.scales[-2]
        assert set(range(first, last)) == {row // width for row in range(low, high)}
        assert part.scales[:-2] == part.weight[:-2]
        assert part.scales[-1] == part.weight[-1]
        assert last - first == 1 or (high - low) == (last - first) * width
    shape = (*spec.shape[:-2], groups, spec.shape[-1])
    assert_tiled(shape, [part.scales for part in parts])


@pytest.mark.parametrize("mesh", ALL_MESHES)
def test_the_released_scale_rows_follow_the_split_of_the_inputs(mesh):
    config = replace(MINIATURE, num_layers=1)
    parts = placed(spec_named(config, "layers.0.moe.down"), mesh, config)

    for device, part in enumerate(parts):
        row = mesh.coordinates(device)[1]
        if mesh.model <= 8:
            kept = 8 // mesh.model
            assert part.scales[1] == (row * kept, (row + 1) * kept)
        else:
            shared = row // (mesh.model // 8)
            assert part.scales[1] == (shared, shared + 1)


def test_devices_along_the_expert_axis_differ_in_experts_alone():
    mesh = MeshShape(2, 8)
    config = replace(MINIATURE, num_layers=1)

    for spec in tensor_specs(config):
        parts = placed(spec, mesh, config)
        for near, far in zip(parts[:8], parts[8:], strict=True):
            if ".moe." in spec.name:
                assert (near.weight[0], far.weight[0]) == ((0, 4), (4, 8))
                assert near.weight[1:] == far.weight[1:]
            else:
                assert near == far


@pytest.mark.parametrize("name", ["final_norm", "layers.0.router", "layers.0.norms.pre_moe"])
@pytest.mark.parametrize("mesh", ALL_MESHES)
def test_norms_and_the_router_are_whole_on_every_device(name, mesh):
    spec = spec_named(MINIATURE, name)
    whole = tuple((0, length) for length in spec.shape)

    assert {part.weight for part in placed(spec, mesh, MINIATURE)} == {whole}


# --- refusals


@settings(deadline=None)
@given(config=configs(), expert=st.integers(0, 40), model=st.integers(0, 40))
def test_a_mesh_refused_names_one_that_works(config, expert, model):
    mesh = MeshShape(expert, model)
    assume(not passes(mesh, config))

    with pytest.raises(PlacementError, match=re.escape(f"mesh {mesh} cannot")) as caught:
        check_mesh(mesh, config)

    found = re.fullmatch(r"--devices (\d+) --mesh (\S+)", caught.value.hint)
    better = MeshShape.parse(found[2])
    assert better.size == int(found[1])
    check_mesh(better, config)
    distance = abs(better.size - mesh.size)
    assert all(abs(other.size - mesh.size) >= distance for other in MESHES if passes(other, config))


@settings(deadline=None)
@given(config=configs())
def test_one_device_holds_every_model(config):
    check_mesh(MeshShape(1, 1), config)


@pytest.mark.parametrize(
    ("changes", "mesh", "problem"),
    [
        pytest.param({}, MeshShape(1, 3), "3 devices", id="a-size-that-is-none"),
        pytest.param({}, MeshShape(1, 32), "32 devices", id="too-many"),
        pytest.param({}, MeshShape(1, 0), "0 devices", id="none"),
        pytest.param({}, MeshShape(-1, -8), "8 devices", id="negative"),
        pytest.param({}, MeshShape(16, 1), "8 experts do not divide by 16", id="experts"),
        pytest.param({"num_q_heads": 8}, MeshShape(1, 16), "8 query heads", id="query-heads"),
        pytest.param({"emb_size": 64}, MeshShape(1, 16), "344 feed-forward", id="columns"),
        pytest.param({"vocab_size": 1000}, MeshShape(1, 16), "1000 vocabulary", id="vocabulary"),
        pytest.param(
            {"num_kv_heads": 3, "num_q_heads": 48}, MeshShape(1, 2), "3 key-value", id="key-heads"
        ),
    ],
)
def test_a_refusal_says_what_does_not_divide(changes, mesh, problem):
    with pytest.raises(PlacementError, match=problem):
        check_mesh(mesh, replace(MINIATURE, **changes))


def test_scale_rows_that_do_not_line_up_with_the_inputs_are_refused():
    config = replace(MINIATURE, emb_size=36)  # 192 columns
    spec = spec_named(config, "layers.0.moe.down")

    with pytest.raises(PlacementError, match=r"layers\.0\.moe\.down: inputs 0 to 96 cut its 3"):
        place(spec, scale_groups=3, mesh=MeshShape(1, 2), device=0, config=config)


# --- meshes as text


@pytest.mark.parametrize(
    ("text", "mesh"),
    [
        pytest.param("model=8", MeshShape(1, 8), id="model"),
        pytest.param("expert=2,model=8", MeshShape(2, 8), id="both"),
        pytest.param("expert=1,model=4", MeshShape(1, 4), id="one-group"),
        pytest.param("expert=2, model=8", MeshShape(2, 8), id="space-after-the-comma"),
    ],
)
def test_a_mesh_is_read(text, mesh):
    assert MeshShape.parse(text) == mesh


@pytest.mark.parametrize(
    "text",
    [
        "", "8", "model", "model=", "model=-8", "model=8,", "model=8,expert=2", "expert=2",
        "model=8.0", "model=0x8", "model=8\n", "tensor=8", "expert=2;model=8", "model=1000",
        "model=8model=8", "model=٨", "model=1 6",
    ],
)  # fmt: skip
def test_anything_else_is_no_mesh(text):
    with pytest.raises(UsageError, match="expected the form") as caught:
        MeshShape.parse(text)

    assert caught.value.hint == "--mesh model=8"


@pytest.mark.parametrize("mesh", ALL_MESHES)
def test_a_mesh_is_read_as_it_is_written(mesh):
    assert MeshShape.parse(str(mesh)) == mesh
    assert re.fullmatch(r"\d+(x\d+)?", mesh.slug)


def test_every_mesh_has_a_folder_name_of_its_own():
    assert len({mesh.slug for mesh in MESHES}) == len(MESHES)


def test_devices_stand_in_rows_of_the_model_axis():
    mesh = MeshShape(2, 4)

    assert [mesh.coordinates(device) for device in range(mesh.size)] == [
        (0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3),
    ]  # fmt: skip


# --- Grok-1


@pytest.mark.parametrize("devices", MESH_SIZES)
def test_grok_1_runs_on_every_number_of_devices(devices):
    assert mesh_for(devices, GROK_1) == MeshShape(1, devices)


def bytes_of_a_grok_1_device(mesh: MeshShape) -> int:
    """From the published numbers, without specs or slices."""
    expert, model = mesh.expert, mesh.model
    rows = max(1, 8 // model)
    key_heads = max(1, 8 // model)
    experts, columns, query = 8 // expert, 32768 // model, 6144 // model
    in_and_out = 2 * experts * (6144 * columns + 2 * columns)
    down = experts * (columns * 6144 + 2 * rows * 6144)
    keys_and_values = 2 * (6144 * 128 * key_heads + 2 * 128 * key_heads)
    queries = 6144 * query + 2 * query
    out = query * 6144 + 2 * rows * 6144
    floats = 4 * (4 * 6144 + 6144 * 8)
    layer = in_and_out + down + keys_and_values + queries + out + floats
    return 4 * (131072 // model * 6144 + 6144) + 64 * layer


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, id=mesh.slug) for mesh in MESHES if mesh.expert <= 8]
)
def test_a_device_holds_as_many_bytes_of_grok_1_as_its_share(mesh):
    expected = bytes_of_a_grok_1_device(mesh)

    for device in {0, mesh.size // 2, mesh.size - 1}:
        found = 0
        for spec in tensor_specs(GROK_1):
            part = place(
                spec, scale_groups=spec.scale_groups, mesh=mesh, device=device, config=GROK_1
            )
            found += prod(part.shape) * (1 if spec.is_quantized else 4)
            if part.scales is not None:
                found += 2 * prod(stop - start for start, stop in part.scales)
        assert found == expected


def test_sixteen_devices_share_each_key_head_of_grok_1_by_two():
    mesh = MeshShape(1, 16)
    keys = placed(spec_named(GROK_1, "layers.0.attention.key"), mesh, GROK_1)
    values = placed(spec_named(GROK_1, "layers.0.attention.value"), mesh, GROK_1)
    queries = placed(spec_named(GROK_1, "layers.0.attention.query"), mesh, GROK_1)
    outs = placed(spec_named(GROK_1, "layers.0.attention.out"), mesh, GROK_1)

    for device in range(16):
        head = device // 2
        assert keys[device].weight == ((0, 6144), (head * 128, (head + 1) * 128))
        assert values[device] == keys[device]
        low, high = queries[device].weight[1]
        assert high - low == 3 * 128
        assert {column // 128 // 6 for column in range(low, high)} == {head}
        assert outs[device].weight[0] == (low, high)
