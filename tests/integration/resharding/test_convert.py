"""Any mesh and any precision from any other, compressed or not, whole or one host's part."""

import json
import shutil
import subprocess
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import zstandard
from cuts import contents, cut, device_files, header_of, partial_of
from models import plain_values, put_together

from grokctl.checkpoint.frames import FRAME, SUFFIX, Compression
from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.quantization import rounded
from grokctl.checkpoint.ready import ReadyCheckpoint, open_ready
from grokctl.checkpoint.release import Release, open_release
from grokctl.checkpoint.tensor_source import ReleaseSource, index_of
from grokctl.errors import CorruptCheckpointError, ExitCode, PlacementError, UsageError
from grokctl.events import Finished, Stage
from grokctl.integrity.published import verify_ready
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.model.tensors import tensor_specs
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard

ONE, FOUR, EIGHT, SIXTEEN, HOSTS = (
    MeshShape(*sides) for sides in ((1, 1), (1, 4), (1, 8), (1, 16), (2, 8))
)
MESHES = [pytest.param(mesh, id=mesh.slug) for mesh in (ONE, FOUR, EIGHT, SIXTEEN, HOSTS)]
ZSTD = Compression(1)
PACKINGS = [
    pytest.param(mesh, packing, id=f"{mesh.slug}-{packing}")
    for mesh, packing in (
        *((mesh, None) for mesh in (ONE, FOUR, EIGHT, SIXTEEN, HOSTS)),
        (FOUR, ZSTD),
        (HOSTS, ZSTD),
    )
]


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Release:
    """One that every mesh can hold in any precision."""
    root = tmp_path_factory.mktemp("release") / "small"
    write_miniature(root, replace(MINIATURE, num_layers=1, emb_size=96), tokenizer=False)
    (root / "tokenizer.model").write_bytes(b"any bytes")
    return open_release(root)


@pytest.fixture(scope="module")
def direct(release, tmp_path_factory):
    """What is cut from the release, once; read only."""
    folder, made = tmp_path_factory.mktemp("direct"), {}

    def make(mesh: MeshShape, precision=Precision.INT8, compression=None) -> ReadyCheckpoint:
        key = f"{precision}-{mesh.slug}-{compression}"
        if key not in made:
            options = {"precision": precision, "compression": compression}
            cut(release, mesh, folder / key, **options)
            made[key] = open_ready(folder / key, is_streamed=True)
        return made[key]

    return make


def parts_of(checkpoint: ReadyCheckpoint) -> dict:
    """What each device's file holds, as the safetensors library reads it."""
    found = {}
    for device in checkpoint.manifest.devices:
        record = checkpoint.manifest.record_of(device)
        data = (checkpoint.root / record.name).read_bytes()
        if record.frames is not None:
            reader = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True)
            data = reader.read()
        for held in checkpoint.layouts[device].tensors:
            found[held.tensor.key, device] = None
        for key, entry in safetensors.deserialize(data):
            held = next(h for h in checkpoint.layouts[device].tensors if h.tensor.key == key)
            assert entry["shape"] == [high - low for low, high in held.slices]
            array = np.frombuffer(entry["data"], held.tensor.dtype).reshape(entry["shape"])
            found[key, device] = array
    return found


def values_in(checkpoint: ReadyCheckpoint) -> dict[str, np.ndarray]:
    """Every parameter as float32, put together from all files without our reader."""
    whole = put_together(checkpoint.storage, checkpoint.mesh, parts_of(checkpoint))
    return {
        spec.name: plain_values(
            checkpoint.storage.weight(spec),
            whole[f"{spec.name}.weight"],
            whole.get(f"{spec.name}.scales"),
        )
        for spec in tensor_specs(checkpoint.config)
    }


@pytest.fixture(scope="module")
def released(release) -> dict[str, np.ndarray]:
    """Every parameter as the release means it."""
    source = ReleaseSource(release)
    found = {}
    for tensor in release.tensors:
        weight, scales = tensor.map()
        found[tensor.spec.name] = plain_values(source.storage.weight(tensor.spec), weight, scales)
    return found


# --- values


@pytest.mark.parametrize(("mesh", "compression"), PACKINGS)
@pytest.mark.parametrize("precision", Precision)
def test_files_mean_what_the_release_means_and_the_manifest_says_how_nearly(
    direct, released, mesh, precision, compression
):
    checkpoint = direct(mesh, precision, compression)
    manifest = json.loads((checkpoint.root / "grokctl.json").read_bytes())

    found = values_in(checkpoint)

    for spec in tensor_specs(checkpoint.config):
        values, wide = released[spec.name], found[spec.name]
        match precision if spec.is_quantized else Precision.FLOAT32:
            case Precision.INT8 | Precision.FLOAT32:
                np.testing.assert_array_equal(wide, values)
            case Precision.BFLOAT16:
                np.testing.assert_array_equal(wide, rounded(values).astype(np.float32))
        said = manifest["tensors"][f"{spec.name}.weight"].get("relative_rms_error")
        assert (said is not None) == spec.is_quantized
        if spec.is_quantized:
            change = wide.astype(np.float64) - values
            real = np.sqrt((change**2).sum() / (values.astype(np.float64) ** 2).sum())
            assert said == pytest.approx(float(f"{real:.3g}"), rel=1e-12)
            assert (said > 0) == (precision in {Precision.INT4, Precision.BFLOAT16})
            assert said < 0.11


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("compression", [None, ZSTD], ids=str)
def test_our_reader_reads_what_the_library_reads(direct, precision, compression):
    checkpoint = direct(HOSTS, precision, compression)
    parts = parts_of(checkpoint)

    for mapped in (checkpoint, open_ready(checkpoint.root)):
        for device in (0, 7, 15):
            for held in checkpoint.layouts[device].tensors:
                found = mapped.read(held.tensor, held.slices)
                expected = parts[held.tensor.key, device]
                assert found.dtype == expected.dtype
                assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("precision", Precision)
def test_a_device_file_opens_with_the_plain_library(direct, precision):
    checkpoint = direct(FOUR, precision)

    for device in range(4):
        path = checkpoint.root / checkpoint.manifest.record_of(device).name
        with safetensors.safe_open(path, framework="numpy") as file:
            assert set(file.keys()) == {tensor.key for tensor in checkpoint.storage.tensors}
            assert file.metadata() == {
                "format": "grokctl-ready",
                "mesh": "model=4",
                "device": str(device),
                "precision": str(precision),
            }
            for held in checkpoint.layouts[device].tensors:
                found = file.get_slice(held.tensor.key)
                assert tuple(found.get_shape()) == tuple(b - a for a, b in held.slices)
                assert held.offset % 4 == 0


# --- compressed


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4])
@pytest.mark.parametrize("mesh", [ONE, HOSTS], ids=str)
def test_plain_decompression_gives_the_plain_device_file(direct, precision, mesh, tmp_path):
    packed, plain = direct(mesh, precision, ZSTD), direct(mesh, precision)
    for record in packed.files:
        if not record.name.endswith(SUFFIX):
            continue
        path = packed.root / record.name
        with path.open("rb") as file:
            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            data = reader.read()
        assert data == (plain.root / record.name.removesuffix(SUFFIX)).read_bytes()
        if shutil.which("zstd"):
            target = tmp_path / "plain"
            command = ["zstd", "-d", "-q", "-f", "-o", str(target), str(path)]
            subprocess.run(command, check=True)
            assert target.read_bytes() == data


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
@pytest.mark.parametrize("compression", [None, ZSTD], ids=str)
@pytest.mark.parametrize("precision", Precision)
def test_the_sums_hold_and_cover_every_other_file(direct, precision, compression):
    root = direct(FOUR, precision, compression).root
    command = ["sha256sum", "-c", "--strict", "SHA256SUMS"]

    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    assert found.returncode == 0
    named = {line.split(":")[0] for line in found.stdout.splitlines()}
    assert named == {path.name for path in root.iterdir()} - {"SHA256SUMS", ".grokctl"}
    assert verify_ready(open_ready(root)).damage == ()


# --- any to any


@pytest.mark.parametrize("precision", Precision)
def test_from_mesh_to_mesh_and_back_gives_the_files_of_the_direct_way(direct, precision, tmp_path):
    for number, chain in enumerate([(EIGHT, FOUR, SIXTEEN, EIGHT), (HOSTS, ONE, HOSTS, FOUR)]):
        first = SIXTEEN if precision is Precision.INT4 else chain[0]
        source = direct(first, precision)
        for step, mesh in enumerate(chain[1:]):
            root = tmp_path / f"{number}-{step}"
            cut(source, mesh, root)
            source = open_ready(root, is_streamed=True)
            if precision is Precision.INT4:  # its groups are those of the mesh that it came from
                assert source.storage.groups == direct(first, precision).storage.groups
                continue
            assert device_files(root) == device_files(direct(mesh, precision).root)
            if precision is Precision.INT8:
                assert contents(root) == contents(direct(mesh).root)
        if precision is Precision.INT4:
            cut(source, first, tmp_path / f"{number}-back")
            again, before = tmp_path / f"{number}-back", direct(first, precision).root
            assert device_files(again) == device_files(before)


@pytest.mark.parametrize(("mesh", "compression"), PACKINGS)
@pytest.mark.parametrize(
    "precision", [Precision.INT4, Precision.BFLOAT16, Precision.FLOAT32], ids=str
)
def test_from_an_int8_checkpoint_comes_what_comes_from_the_release(
    direct, mesh, precision, compression, tmp_path
):
    source = direct(HOSTS, compression=compression)

    root = cut(source, mesh, tmp_path / "out", precision=precision).root

    assert contents(root) == contents(direct(mesh, precision).root)


@pytest.mark.parametrize("mesh", [ONE, SIXTEEN], ids=str)
@pytest.mark.parametrize("precision", Precision)
def test_compressed_to_plain_and_plain_to_compressed(direct, precision, mesh, tmp_path):
    packed = cut(direct(mesh, precision), mesh, tmp_path / "packed", compression=ZSTD)
    plain = cut(direct(mesh, precision, ZSTD), mesh, tmp_path / "plain")

    assert device_files(packed.root) == device_files(direct(mesh, precision, ZSTD).root)
    assert device_files(plain.root) == device_files(direct(mesh, precision).root)


def test_another_level_gives_other_files_of_the_same_content(direct, tmp_path):
    high = cut(direct(FOUR), FOUR, tmp_path / "high", compression=Compression(12))

    assert device_files(high.root) != device_files(direct(FOUR, compression=ZSTD).root)
    again = cut(open_ready(high.root, is_streamed=True), FOUR, tmp_path / "again")
    assert contents(again.root) == contents(direct(FOUR).root)


@pytest.mark.parametrize("source", [Precision.BFLOAT16, Precision.FLOAT32, Precision.INT4])
@pytest.mark.parametrize("target", [Precision.INT4, Precision.BFLOAT16, Precision.FLOAT32])
def test_any_precision_but_int8_comes_from_any_other(direct, source, target, tmp_path):
    """Wherever it was cut for, and whatever that loses, the manifest says it against the source."""
    origin = direct(HOSTS, source)
    out = cut(origin, FOUR, tmp_path / "out", precision=target)

    before, after = values_in(origin), values_in(out)

    manifest = json.loads((out.root / "grokctl.json").read_bytes())
    assert manifest["source"]["precision"] == source
    for spec in tensor_specs(out.config):
        change = after[spec.name].astype(np.float64) - before[spec.name]
        said = manifest["tensors"][f"{spec.name}.weight"].get("relative_rms_error")
        if not spec.is_quantized:
            assert not change.any()
            continue
        real = np.sqrt((change**2).sum() / (before[spec.name].astype(np.float64) ** 2).sum())
        assert said == pytest.approx(float(f"{real:.3g}"), rel=1e-12)
        if target is Precision.FLOAT32 or source is target:
            assert real == 0


@pytest.mark.parametrize("source", [Precision.BFLOAT16, Precision.FLOAT32, Precision.INT4])
def test_int8_comes_from_nothing_but_int8(direct, source, tmp_path):
    with pytest.raises(PlacementError, match=f"{source} weights no longer hold them") as caught:
        plan_reshard(
            direct(FOUR, source), ReshardOptions(mesh=FOUR, out=tmp_path, precision=Precision.INT8)
        )

    assert caught.value.exit_code is ExitCode.PLACEMENT
    assert caught.value.hint.startswith("CHECKPOINT ")  # the typed command, on its source


@pytest.mark.parametrize("target", [Precision.BFLOAT16, Precision.FLOAT32])
def test_int4_becomes_floats_also_where_arrays_begin_within_a_pair(tmp_path, target):
    # as the rows of Grok-1 do in bfloat16: a megabyte holds 85 of them
    config = replace(MINIATURE, num_layers=1, emb_size=1368, key_size=32, widening_factor=1)
    config = replace(config, num_experts=2, vocab_size=64)
    assert FRAME // (config.emb_size * 2) % 2 == 1
    assert FRAME // (config.emb_size * 2) < min(config.q_size, config.ffn_size)
    write_miniature(tmp_path / "release", config, tokenizer=False)
    release = open_release(tmp_path / "release")
    source = cut(release, ONE, tmp_path / "int4", precision=Precision.INT4)

    out = cut(source, ONE, tmp_path / "out", precision=target, max_memory=1)

    before, after = values_in(source), values_in(out)
    for spec in tensor_specs(config):
        expected = before[spec.name]
        if target is Precision.BFLOAT16 and spec.is_quantized:
            expected = rounded(expected).astype(np.float32)
        np.testing.assert_array_equal(after[spec.name], expected)


# --- groups of int4


@pytest.mark.parametrize("mesh", [ONE, FOUR, SIXTEEN], ids=str)
@pytest.mark.parametrize("size", [2, 4, 16])
def test_groups_are_as_large_as_asked_for(release, direct, tmp_path, mesh, size):
    from_release = cut(release, mesh, tmp_path / "one", precision=Precision.INT4, group_size=size)
    from_ready = cut(
        direct(EIGHT), mesh, tmp_path / "two", precision=Precision.INT4, group_size=size
    )

    for spec in tensor_specs(from_release.config):
        groups = from_release.storage.groups[spec.name]
        assert groups == (spec.shape[-2] // size if spec.is_quantized else 0)
    assert contents(from_release.root) == contents(from_ready.root)


def test_int4_moves_to_another_mesh_with_groups_that_fit_it(direct, tmp_path):
    source = direct(ONE, Precision.INT4)
    with pytest.raises(PlacementError) as caught:
        plan_reshard(source, ReshardOptions(mesh=SIXTEEN, out=tmp_path / "out"))
    assert caught.value.exit_code is ExitCode.PLACEMENT

    out = cut(source, SIXTEEN, tmp_path / "out", group_size=16)

    assert {out.storage.weight(s).width for s in tensor_specs(out.config) if s.is_quantized} == {16}
    before, after = values_in(source), values_in(out)
    for spec in tensor_specs(out.config):
        if spec.is_quantized:
            change = np.abs(after[spec.name] - before[spec.name]).max()
            assert change <= 0.2 * np.abs(before[spec.name]).max()


@pytest.mark.parametrize("size", [64, 3, 1, 0, -4, 10**30, 32])
def test_groups_that_do_not_fit_a_device_are_refused_with_the_nearest_that_do(
    release, tmp_path, size
):
    options = {"mesh": SIXTEEN, "out": tmp_path, "precision": Precision.INT4}
    with pytest.raises(PlacementError, match=f"int4 groups of {size} do not divide") as caught:
        plan_reshard(release, ReshardOptions(group_size=size, **options))

    asked, nearest = caught.value.hint.split()
    assert asked == "--group-size"
    assert (
        plan_reshard(release, ReshardOptions(group_size=int(nearest), **options)).storage.precision
        is Precision.INT4
    )


def test_a_group_size_is_for_int4_alone(release, tmp_path):
    with pytest.raises(
        UsageError, match="group_size 64: expected precision int4, found bf16"
    ) as caught:
        plan_reshard(
            release,
            ReshardOptions(mesh=ONE, out=tmp_path, precision=Precision.BFLOAT16, group_size=64),
        )

    assert caught.value.hint == "--precision int4"


def test_an_odd_number_of_inputs_cannot_be_int4(tmp_path):
    root = tmp_path / "odd"
    config = replace(MINIATURE, num_layers=1, emb_size=64, widening_factor=1, vocab_size=64)
    write_miniature(root, config, tokenizer=False)
    release = open_release(root)
    assert config.ffn_size // 16 == 3

    with pytest.raises(PlacementError, match="expected an even number of inputs") as caught:
        plan_reshard(release, ReshardOptions(mesh=SIXTEEN, out=tmp_path, precision=Precision.INT4))
    planned = plan_reshard(
        release, ReshardOptions(mesh=EIGHT, out=tmp_path, precision=Precision.INT4)
    )

    assert caught.value.hint == "--precision int8"
    assert min(t.width for t in planned.storage.tensors if t.groups) == 2


# --- some devices


@pytest.mark.parametrize(
    ("precision", "compression"),
    [(Precision.INT8, None), (Precision.INT4, ZSTD), (Precision.BFLOAT16, None)],
    ids=str,
)
@pytest.mark.parametrize("mesh", [SIXTEEN, HOSTS], ids=str)
def test_hosts_that_write_their_own_files_write_those_of_the_whole(
    release, direct, mesh, precision, compression, tmp_path
):
    hosts = [frozenset(range(8)), frozenset(range(8, 15)), frozenset({15})]
    whole = direct(mesh, precision, compression)

    found = {}
    for number, devices in enumerate(hosts):
        part = cut(
            release,
            mesh,
            tmp_path / str(number),
            devices=devices,
            precision=precision,
            compression=compression,
        )
        assert part.manifest.devices == tuple(sorted(devices))
        assert not part.is_whole
        assert len(device_files(part.root)) == len(devices)
        assert verify_ready(open_ready(part.root)).damage == ()
        found |= device_files(part.root)

    assert found == device_files(whole.root)


def test_devices_that_lie_apart_are_cut_together(direct, tmp_path):
    part = cut(direct(FOUR), SIXTEEN, tmp_path / "out", devices=frozenset({1, 4, 5, 12}))

    whole = device_files(direct(SIXTEEN).root)
    assert device_files(part.root).items() <= whole.items()


def test_a_part_is_no_source_of_another_cut(release, tmp_path):
    part = cut(release, FOUR, tmp_path / "part", devices=frozenset({1, 2}))

    with pytest.raises(
        UsageError, match="expected the files of all devices, found 1, 2 of 4"
    ) as caught:
        plan_reshard(part, ReshardOptions(mesh=ONE, out=tmp_path / "out"))

    assert caught.value.hint.startswith("grokctl reshard ")


def test_what_lies_on_another_host_cannot_be_read_and_what_is_here_can(release, direct, tmp_path):
    part = cut(release, FOUR, tmp_path / "part", devices=frozenset({1, 2}))
    whole = direct(FOUR)

    for held in part.layouts[3].tensors:
        if held.slices in {h.slices for h in part.layouts[1].tensors if h.tensor == held.tensor}:
            found = part.read(held.tensor, held.slices)  # every device has it
            assert found.tobytes() == whole.read(held.tensor, held.slices).tobytes()
            continue
        with pytest.raises(UsageError, match="expected the files of all"):
            part.read(held.tensor, held.slices)
        with pytest.raises(UsageError, match="expected the files of all"):
            part.read(held.tensor, tuple((0, length) for length in held.tensor.shape))
    for held in part.layouts[2].tensors:
        found = part.read(held.tensor, held.slices)
        assert found.tobytes() == whole.read(held.tensor, held.slices).tobytes()


@pytest.mark.parametrize("devices", [set(), {4}, {-1, 0}, {0, 99}], ids=str)
def test_devices_that_the_mesh_has_not_are_refused(release, tmp_path, devices):
    with pytest.raises(UsageError, match="expected devices 0 to 3 of model=4") as caught:
        plan_reshard(release, ReshardOptions(mesh=FOUR, out=tmp_path, devices=frozenset(devices)))

    assert caught.value.hint == "--only-devices 0-3"


# --- plans


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("precision", Precision)
def test_plans_say_what_is_written(release, direct, mesh, precision):
    planned = plan_reshard(
        release, ReshardOptions(mesh=mesh, out=Path("unused"), precision=precision)
    )

    written = [record.nbytes for record in direct(mesh, precision).files if record.name[0] == "d"]
    assert planned.bytes_out == sum(written)
    stored = {
        tensor.key: prod(tensor.shape) * tensor.dtype.itemsize
        for tensor in ReleaseSource(release).storage.tensors
    }
    weights = sum(nbytes for key, nbytes in stored.items() if key.endswith(".weight"))
    assert weights <= planned.bytes_in <= sum(stored.values())


def test_a_plan_for_one_of_two_hosts_reads_half_of_the_experts(release):
    whole = plan_reshard(release, ReshardOptions(mesh=HOSTS, out=Path("unused")))
    half = plan_reshard(
        release, ReshardOptions(mesh=HOSTS, out=Path("unused"), devices=frozenset(range(8)))
    )

    shared = sum(
        prod(held.tensor.shape) * held.tensor.dtype.itemsize
        for held in whole.layouts[0].tensors
        if ".moe." not in held.tensor.key
    )
    assert half.bytes_in == shared + (whole.bytes_in - shared) // 2
    assert half.bytes_out * 2 == pytest.approx(whole.bytes_out, rel=1e-3)


@pytest.fixture
def room(tmp_path) -> Iterator[Path]:
    """A folder that does not outlive the test: it holds much."""
    folder = tmp_path / "room"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_one_device_of_a_wide_checkpoint_is_cut_in_the_memory_that_was_planned(room):
    config = replace(
        MINIATURE,
        emb_size=1024,
        widening_factor=24,
        num_layers=1,
        num_experts=1,
        num_selected_experts=1,
    )
    write_miniature(room / "wide", config, tokenizer=False)
    wide = cut(open_release(room / "wide"), ONE, room / "one", precision=Precision.FLOAT32)
    planned = plan_reshard(
        replace(wide, is_streamed=True),
        ReshardOptions(
            mesh=SIXTEEN, out=room / "out", devices=frozenset({3}), jobs=2, max_memory=64 * 2**20
        ),
    )

    tracemalloc.start()
    try:
        reshard(planned)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert planned.peak_bytes <= 64 * 2**20
    assert peak <= planned.peak_bytes + 10 * 2**20


def test_parts_of_the_golden_release_hold_the_released_numbers(two_layers, tmp_path):
    release = open_release(two_layers)
    source = ReleaseSource(release)
    part = cut(release, FOUR, tmp_path / "part", devices=frozenset({2}))

    for held in part.layouts[2].tensors:
        whole = source.read(held.tensor, tuple((0, n) for n in held.tensor.shape))
        expected = whole[index_of(held.slices)]
        assert part.read(held.tensor, held.slices).tobytes() == expected.tobytes()
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="not enough values"):
        partial_of(part.root)


# --- values that no model has


DAMAGED = [
    ("layers.0.moe.gate.scales", bytes.fromhex("c07f"), "a scale that is no number"),
    ("layers.0.moe.gate.scales", bytes.fromhex("807f"), "an infinite scale"),
    ("final_norm.weight", bytes.fromhex("0000c07f"), "a norm that is no number"),
    ("embedding.weight", bytes.fromhex("000080ff"), "an infinite embedding"),
]


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize(
    ("key", "value"), [pytest.param(key, value, id=name) for key, value, name in DAMAGED]
)
def test_what_is_no_number_is_published_in_no_precision(direct, tmp_path, key, value, precision):
    root = shutil.copytree(direct(ONE).root, tmp_path / "damaged")
    (path,) = root.glob("device-*")
    begin, header = header_of(path)
    with path.open("r+b") as file:
        file.seek(begin + header[key]["data_offsets"][0])
        file.write(value)

    with pytest.raises(CorruptCheckpointError, match="not finite") as caught:
        cut(open_ready(root, is_streamed=True), FOUR, tmp_path / "out", precision=precision)

    assert caught.value.damage[0].file.startswith(key.rpartition(".")[0])
    assert not (tmp_path / "out").exists()


# --- devices apart from each other


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("packing", [None, ZSTD], ids=["plain", "zstd"])
def test_devices_with_a_gap_between_them_are_cut_in_little_memory(
    release, tmp_path, precision, packing
):
    devices = frozenset({0, 2, 3, 4, 5, 6, 7})
    options = {"precision": precision, "compression": packing}
    whole = cut(release, EIGHT, tmp_path / "whole", **options)

    some = cut(
        release, EIGHT, tmp_path / "some", **options, devices=devices, jobs=1, max_memory=2**20
    )

    expected = device_files(whole.root)
    assert len(device_files(some.root)) == len(devices)
    assert device_files(some.root).items() <= expected.items()


def test_what_appears_under_the_name_meanwhile_stays(release, tmp_path):
    out = tmp_path / "out"

    def intrude(event):
        if event == Finished(stage=Stage.RESHARD):
            out.mkdir()
            (out / "thesis").touch()

    with pytest.raises(UsageError, match="exists"):
        cut(release, FOUR, out, observe=intrude)

    assert (out / "thesis").exists()


def test_int4_for_a_mesh_that_cuts_its_groups_says_which_would_fit(release, tmp_path):
    checkpoint = cut(release, FOUR, tmp_path / "out", precision=Precision.INT4)

    with pytest.raises(PlacementError, match="do not divide") as caught:
        plan_reshard(checkpoint, ReshardOptions(mesh=SIXTEEN, out=tmp_path / "other"))

    assert caught.value.hint.startswith("--group-size")
