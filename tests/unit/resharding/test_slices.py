from collections import Counter
from math import prod

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import TINY, Arrays, meshes, models, plain_values, put_together, storages

from grokctl.checkpoint.frames import FRAME
from grokctl.checkpoint.layout import device_layouts
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.quantization import rounded
from grokctl.checkpoint.tensor_source import Storage, index_of
from grokctl.errors import PlacementError
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision, check_conversion
from grokctl.model.tensors import tensor_specs
from grokctl.resharding.convert import NOTHING, Squares, is_stored_alike
from grokctl.resharding.slices import cuts_of, is_scales_of_quantized

pytestmark = pytest.mark.heavy

SMALL_FRAME = 300
"""Bytes: less than most of these small tensors, more than most of their rows."""
LIMITS = st.one_of(st.integers(1, 3000), st.sampled_from([1, 10**4, 10**6, 2**25]))
LARGE = st.just(2**25)
CONVERSIONS = [
    (source, target)
    for source in Precision
    for target in Precision
    if target is not Precision.INT8 or source is Precision.INT8
]


@pytest.fixture(autouse=True, scope="module")
def small_frames():
    """Frames that are to these models what a megabyte is to Grok-1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grokctl.resharding.slices.FRAME", SMALL_FRAME)
        yield


@st.composite
def devices_of(draw: st.DrawFn, mesh: MeshShape) -> frozenset[int]:
    """Those of one host, or any others, or all."""
    every = range(mesh.size)
    return draw(
        st.one_of(
            st.just(frozenset(every)),
            st.frozensets(st.sampled_from(every), min_size=1),
        )
    )


def layouts_of(storage: Storage, mesh: MeshShape, devices: frozenset[int]):
    layouts = device_layouts(storage, mesh)
    return tuple(layout for layout in layouts if layout.device in devices)


def make_all(source, layouts, limit):
    """What every device's file gets of every tensor, and what came with it."""
    files = {(held.tensor.key, layout.device): [] for layout in layouts for held in layout.tensors}
    squares = Counter()
    errors = {}
    scales = {}
    for index, held in enumerate(layouts[0].tensors):
        key = held.tensor.key
        total = NOTHING
        for cut in cuts_of(layouts, index, limit=limit):
            memory = np.full(cut.nbytes, 0xA5, np.uint8)
            made = cut.make(source, memory)
            total += made.squares
            for device, outputs in cut.devices.items():
                begin, end = cut.places[outputs]
                files[key, device].append((memory[begin:end].tobytes(), cut.frame_nbytes(outputs)))
            if made.scales is not None:
                scales.setdefault(key, []).append((made.scales.slices, made.scales.values))
        errors[key] = total
        squares[key] += 1
    return files, errors, scales


def joined(files) -> dict:
    return {place: b"".join(part for part, _ in parts) for place, parts in files.items()}


def frames(files) -> dict:
    """Where frames begin in what each device gets of a tensor."""
    return {
        place: [
            min(size, len(part) - start)
            for part, size in parts
            for start in range(0, len(part), size)
        ]
        for place, parts in files.items()
    }


def as_arrays(files, layouts):
    held = {(h.tensor.key, layout.device): h for layout in layouts for h in layout.tensors}
    return {
        place: np.frombuffer(data, held[place].tensor.dtype).reshape(
            [high - low for low, high in held[place].slices]
        )
        for place, data in joined(files).items()
    }


@st.composite
def jobs(draw: st.DrawFn, conversions=tuple(CONVERSIONS)):
    """A source, and how it is to be stored on which mesh."""
    config = draw(models())
    mesh = draw(meshes(config))
    source, target = draw(st.sampled_from(conversions))
    own = draw(storages(config, MeshShape(1, 1), source))
    wanted = draw(storages(config, mesh, target))
    if source is target and (target is Precision.INT8 or draw(st.booleans())):
        own = wanted
    return Arrays(own, draw(st.integers(0, 9))), wanted, mesh


# --- which parts


@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_cuts_are_what_every_device_holds_in_the_order_of_its_file(data):
    source, wanted, mesh = data.draw(jobs([(Precision.INT8,) * 2, (Precision.BFLOAT16,) * 2]))
    source = Arrays(wanted)
    layouts = layouts_of(wanted, mesh, data.draw(devices_of(mesh)))

    files, errors, scales = make_all(source, layouts, data.draw(LIMITS))

    found = joined(files)
    for layout in layouts:
        for held in layout.tensors:
            whole = source.arrays[held.tensor.key]
            expected = np.ascontiguousarray(whole[index_of(held.slices)]).tobytes()
            assert found[held.tensor.key, layout.device] == expected
    assert {squares.error for squares in errors.values()} == {0.0}
    assert not scales


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_what_several_devices_hold_is_made_once(data):
    config = data.draw(models())
    mesh, precision = data.draw(meshes(config)), data.draw(st.sampled_from(Precision))
    storage = data.draw(storages(config, mesh, precision))
    layouts = layouts_of(storage, mesh, data.draw(devices_of(mesh)))
    limit = data.draw(LIMITS)

    for index, first in enumerate(layouts[0].tensors):
        times = np.zeros(first.tensor.shape, int)
        for cut in cuts_of(layouts, index, limit=limit):
            times[index_of(cut.slices)] += 1
        wanted = np.zeros_like(times)
        for layout in layouts:
            wanted[index_of(layout.tensors[index].slices)] = 1
        np.testing.assert_array_equal(times, wanted)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_an_array_is_no_larger_than_asked_for_unless_it_is_one_row_or_group(data):
    config = data.draw(models())
    mesh, precision = data.draw(meshes(config)), data.draw(st.sampled_from(Precision))
    storage = data.draw(storages(config, mesh, precision))
    limit = data.draw(LIMITS)
    layouts = device_layouts(storage, mesh)

    for index, held in enumerate(layouts[0].tensors):
        for cut in cuts_of(layouts, index, limit=limit):
            *lead, (low, high), (left, right) = [(0, 1), *cut.slices]
            row = (right - left) * cut.tensor.dtype.itemsize
            assert all(b - a == 1 for a, b in lead) or cut.nbytes <= limit
            if cut.tensor.is_matrix and precision is Precision.INT4 and cut.tensor.groups:
                half = cut.tensor.width // 2
                sizes = {cut.frame_nbytes(part) // (part[1] - part[0]) for part in cut.places}
                assert not any(at % half for at in (low, high, *sizes))
            if cut.tensor.is_matrix:
                least = max(cut.frame_nbytes(outputs) for outputs in cut.devices.values())
                assert cut.nbytes <= max(limit, least * len(layouts))
            else:
                assert cut.nbytes <= max(limit, row)
            assert cut.nbytes == (high - low) * row * prod(b - a for a, b in lead)
            assert cut.tensor == held.tensor


@pytest.mark.parametrize("mesh", [MeshShape(1, 1), MeshShape(1, 8), MeshShape(2, 8)], ids=str)
@pytest.mark.parametrize("precision", Precision)
def test_frames_of_grok_1_are_a_megabyte_or_a_little_less_and_the_same_for_any_limit(
    monkeypatch, mesh, precision
):
    monkeypatch.setattr("grokctl.resharding.slices.FRAME", FRAME)
    group = 64 if precision is Precision.INT4 else None
    storage = Storage(
        config=GROK_1,
        precision=precision,
        groups={
            spec.name: spec.shape[-2] // group
            if group and spec.is_quantized
            else spec.scale_groups * (precision is Precision.INT8)
            for spec in tensor_specs(GROK_1)
        },
    )
    layouts = device_layouts(storage, mesh)
    names = [held.tensor.key for held in layouts[0].tensors]

    for name in ("embedding", "layers.0.moe.down", "layers.0.moe.up", "layers.0.attention.key"):
        index = names.index(f"{name}.weight")
        seen = []
        for limit in (FRAME, 3 * FRAME, 2**25):
            sizes = {device: [] for device in range(mesh.size)}
            for cut in cuts_of(layouts, index, limit=limit):
                for device, outputs in cut.devices.items():
                    begin, end = cut.places[outputs]
                    size = cut.frame_nbytes(outputs)
                    sizes[device] += [min(size, end - at) for at in range(begin, end, size)]
            seen.append(sizes)
        assert seen[0] == seen[1] == seen[2]
        for layout in layouts:
            sizes = seen[0][layout.device]
            assert sum(sizes) == layout.tensors[index].nbytes
            assert max(sizes) <= FRAME
            assert len(sizes) < 2.5 * layout.tensors[index].nbytes / FRAME + 8


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_frames_do_not_depend_on_the_limit_nor_on_who_else_is_written(data):
    source, wanted, mesh = data.draw(jobs())
    everyone = device_layouts(wanted, mesh)
    some = layouts_of(wanted, mesh, data.draw(devices_of(mesh)))

    # what a plan with frames never goes below
    least = SMALL_FRAME
    whole, *_ = make_all(source, everyone, least)
    less, *_ = make_all(source, some, data.draw(st.one_of(st.integers(least, 9000), LARGE)))

    expected = frames(whole)
    for place, sizes in frames(less).items():
        assert sizes == expected[place]


# --- which values


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_what_devices_hold_together_means_what_the_source_means(data):
    source, wanted, mesh = data.draw(jobs())
    layouts = device_layouts(wanted, mesh)

    files, errors, _ = make_all(source, layouts, data.draw(LIMITS))

    whole = put_together(wanted, mesh, as_arrays(files, layouts))
    for spec in tensor_specs(source.config):
        tensor, values = wanted.weight(spec), source.values(spec)
        found = plain_values(tensor, whole[tensor.key], whole.get(f"{spec.name}.scales"))
        change = found.astype(np.float64) - values
        if is_stored_alike(source, tensor) or tensor.precision is Precision.FLOAT32:
            np.testing.assert_array_equal(found, values)
        elif tensor.precision is Precision.BFLOAT16:
            np.testing.assert_array_equal(found, rounded(values).astype(np.float32))
        else:
            *lead, inputs, outputs = values.shape
            largest = np.abs(values.reshape(*lead, tensor.groups, -1, outputs)).max(axis=-2)
            bound = np.repeat(largest, inputs // tensor.groups, axis=-2)
            assert (np.abs(change) <= 0.2 * bound + 1e-30).all()
        expected = np.sqrt((change**2).sum() / (values.astype(np.float64) ** 2).sum())
        if not tensor.is_matrix or is_stored_alike(source, tensor):
            expected = 0
        recorded = errors[tensor.key].relative_rms
        assert recorded == float(f"{recorded:.3g}")
        assert recorded == pytest.approx(expected, rel=0.006, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_neither_limit_nor_mesh_nor_company_changes_what_a_device_gets(data):
    source, wanted, mesh = data.draw(jobs())
    some = layouts_of(wanted, mesh, data.draw(devices_of(mesh)))

    whole, *_ = make_all(source, device_layouts(wanted, MeshShape(1, 1)), 2**25)
    part, *_ = make_all(source, some, data.draw(LIMITS))

    parts, wholes = (
        as_arrays(part, some),
        as_arrays(whole, device_layouts(wanted, MeshShape(1, 1))),
    )
    for layout in some:
        for held in layout.tensors:
            key, place = held.tensor.key, index_of(held.slices)
            np.testing.assert_array_equal(
                parts[key, layout.device].view(np.uint8),
                np.ascontiguousarray(wholes[key, 0][place]).view(np.uint8),
            )


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_scales_that_come_with_a_weight_are_those_that_are_made_alone(data):
    source, wanted, mesh = data.draw(jobs([(source, Precision.INT4) for source in Precision]))
    layouts = layouts_of(wanted, mesh, data.draw(devices_of(mesh)))

    files, _, along = make_all(source, layouts, data.draw(LIMITS))

    alone = as_arrays(files, layouts)
    for tensor in wanted.tensors:
        if not tensor.is_scales:
            continue
        weight = wanted.weight(tensor.spec)
        assert is_scales_of_quantized(source, tensor) == (weight.key in along)
        if weight.key not in along:
            continue
        whole = np.zeros(tensor.shape, BFLOAT16)
        for slices, scales in along[weight.key]:
            whole[index_of(slices)] = scales
        for layout in layouts:
            held = next(held for held in layout.tensors if held.tensor == tensor)
            np.testing.assert_array_equal(
                alone[tensor.key, layout.device], whole[index_of(held.slices)]
            )


def in_inputs(tensor, slices):
    """Slices of a stored weight as those of the release, where int4 has two inputs a row."""
    if tensor.precision is not Precision.INT4:
        return slices
    *lead, (low, high), outputs = slices
    return (*lead, (2 * low, 2 * high), outputs)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_only_what_the_devices_hold_is_read(data):
    source, wanted, mesh = data.draw(jobs())
    assume(mesh.size > 1)
    device = data.draw(st.integers(0, mesh.size - 1))
    (layout,) = layouts_of(wanted, mesh, frozenset({device}))

    make_all(source, [layout], 2**25)

    held = {held.tensor.key: held for held in layout.tensors}
    for key, slices in source.reads:
        if key.endswith(".weight"):
            tensor = held[key].tensor
            stored = source.storage.weight(tensor.spec)
            allowed = in_inputs(tensor, held[key].slices)
            if stored.precision is Precision.INT4:  # a row is read whole, also for one of its two
                *lead, (low, high), outputs = allowed
                allowed = (*lead, (low - low % 2, high + high % 2), outputs)
            asked = in_inputs(stored, slices)
            assert all(
                low <= first < last <= high
                for (low, high), (first, last) in zip(allowed, asked, strict=True)
            )


def test_the_largest_row_is_an_array_of_its_own():
    storage = Storage(
        config=TINY,
        precision=Precision.BFLOAT16,
        groups=dict.fromkeys((spec.name for spec in tensor_specs(TINY)), 0),
    )
    layouts = device_layouts(storage, MeshShape(1, 1))
    (index,) = (
        place
        for place, held in enumerate(layouts[0].tensors)
        if held.tensor.key == "layers.0.moe.up.weight"
    )

    cuts = list(cuts_of(layouts, index, limit=1))

    row = TINY.ffn_size * 2
    assert row > SMALL_FRAME // 2
    assert {cut.nbytes for cut in cuts} == {row}
    assert len(cuts) == TINY.num_experts * TINY.emb_size


# --- what is recorded


@settings(max_examples=100)
@given(error=st.floats(0, 1e6), total=st.floats(1e-6, 1e9))
def test_an_error_is_told_to_three_digits(error, total):
    found = Squares(error, total).relative_rms

    assert found == pytest.approx(np.sqrt(error / total), rel=0.006)
    assert found == float(f"{found:.3g}")


def test_a_tensor_of_zeros_has_no_error():
    assert NOTHING.relative_rms == 0
    assert Squares(0.0, 1.0).relative_rms == 0


def test_int8_is_made_from_nothing_but_int8():
    for source in Precision:
        if source is Precision.INT8:
            check_conversion(source, Precision.INT8)
            continue
        with pytest.raises(PlacementError, match=f"{source} weights no longer hold") as caught:
            check_conversion(source, Precision.INT8, hint="CHECKPOINT its-source")
        assert caught.value.hint == "CHECKPOINT its-source"
