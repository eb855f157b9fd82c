import copy
import json
import math
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, meshes, models, storages

from grokctl.checkpoint.frames import LARGEST_FRAME, Compression, Frames
from grokctl.checkpoint.layout import device_layouts, weight_bytes
from grokctl.checkpoint.manifest import (
    FileRecord,
    Manifest,
    Source,
    file_name,
    manifest_bytes,
    parse_manifest,
)
from grokctl.checkpoint.ready import read_manifest
from grokctl.checkpoint.tensor_source import Storage
from grokctl.errors import CorruptCheckpointError, GrokctlError, PlacementError
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.model.tensors import tensor_specs
from grokctl.paths import MANIFEST

ORIGIN = Source(name="grok-1", infohash="ab" * 20, proven=True, verified_at="2024-03-17T12:00:00Z")
DIGEST = "0123456789abcdef" * 4


def stored_in(precision: Precision, group: int = 2) -> Storage:
    groups = {
        Precision.INT8: lambda spec: spec.scale_groups,
        Precision.INT4: lambda spec: spec.shape[-2] // group if spec.is_quantized else 0,
    }.get(precision, lambda _: 0)
    return Storage(
        config=TINY,
        precision=precision,
        groups={spec.name: groups(spec) for spec in tensor_specs(TINY)},
    )


def frames_of(layout) -> Frames:
    """A frame for the header and one for each tensor, as good as any."""
    plain = [len(layout.header), *(held.nbytes for held in layout.tensors)]
    return Frames(tuple((size, size // 2 + 20) for size in plain))


def manifest_of(storage, mesh, *, devices=None, compression=None, errors=None) -> Manifest:
    layouts = device_layouts(storage, mesh)
    devices = tuple(range(mesh.size)) if devices is None else devices
    files = []
    for device in devices:
        frames = frames_of(layouts[device]) if compression else None
        files.append(
            FileRecord(
                name=file_name(layouts[device], compression),
                nbytes=frames.packed_starts[-1] if frames else layouts[device].nbytes,
                sha256=DIGEST,
                frames=frames,
            )
        )
    files.append(FileRecord(name="tokenizer.model", nbytes=9, sha256=DIGEST))
    return Manifest(
        storage=storage,
        mesh=mesh,
        source=ORIGIN,
        devices=devices,
        compression=compression,
        errors=errors or {},
        files=tuple(files),
    )


PLAIN = manifest_of(stored_in(Precision.INT8), MeshShape(1, 2))
PACKED = manifest_of(
    stored_in(Precision.INT4),
    MeshShape(1, 4),
    devices=(1, 2),
    compression=Compression(3),
    errors={"layers.0.moe.down.weight": 0.0817},
)
ROUNDED = manifest_of(stored_in(Precision.BFLOAT16), MeshShape(2, 1))
BASES = {"plain": PLAIN, "packed": PACKED, "rounded": ROUNDED}


def values_of(manifest: Manifest) -> dict:
    return json.loads(manifest_bytes(manifest))


def parse(values) -> Manifest:
    return parse_manifest(json.dumps(values).encode())


# --- what is written


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_a_manifest_reads_as_it_was_written(data):
    config = data.draw(models())
    mesh, precision = data.draw(meshes(config)), data.draw(st.sampled_from(Precision))
    storage = data.draw(storages(config, mesh, precision))
    devices = data.draw(st.sets(st.integers(0, mesh.size - 1), min_size=1))
    keys = [tensor.key for tensor in storage.tensors]
    written = manifest_of(
        storage,
        mesh,
        devices=tuple(sorted(devices)),
        compression=data.draw(st.sampled_from([None, Compression(1), Compression(19)])),
        errors=data.draw(st.dictionaries(st.sampled_from(keys), st.floats(0, 1e300), max_size=5)),
    )

    found = parse_manifest(manifest_bytes(written))

    assert found == written
    assert found.layouts == written.layouts
    assert manifest_bytes(found) == manifest_bytes(written)
    for device in devices:
        assert found.record_of(device).name == file_name(found.layouts[device], found.compression)


def test_it_is_one_line_of_json_with_what_the_design_promises():
    data = manifest_bytes(PACKED)
    values = json.loads(data)

    assert data.count(b"\n") == 1
    assert (values["format"], values["version"]) == ("grokctl-ready", 1)
    assert values["config"] == TINY.to_dict()
    assert (values["precision"], values["compression"]) == ("int4", "zstd:3")
    assert values["mesh"] == {"expert": 1, "model": 4}
    assert values["devices"] == [1, 2]
    assert values["source"]["precision"] == "int8"
    for tensor in PACKED.storage.tensors:
        entry = values["tensors"][tensor.key]
        assert entry["shape"] == list(tensor.shape)
        assert entry["slices"] == [
            [list(bounds) for bounds in tensor.slices(PACKED.mesh, device, TINY)]
            for device in range(4)
        ]
        assert entry.get("relative_rms_error") == PACKED.errors.get(tensor.key)
    assert values["files"][0]["frames"] == [list(pair) for pair in PACKED.files[0].frames.sizes]
    assert "frames" not in values["files"][-1]


def test_a_manifest_from_before_compression_still_reads():
    values = values_of(PLAIN)
    for key in ("devices", "compression"):
        del values[key]
    del values["source"]["precision"]

    assert parse(values) == PLAIN


# --- attacks


def at(*path):
    """Change one value of a manifest, or take it away."""

    def change(value):
        def apply(values):
            target = values
            for key in path[:-1]:
                target = target[key]
            if value is ...:
                del target[path[-1]]
            else:
                target[path[-1]] = value(target[path[-1]]) if callable(value) else value

        return apply

    return change


EMBEDDING, DOWN, GATE = (
    "embedding.weight",
    "layers.0.moe.down.scales",
    "layers.0.moe.gate.weight",
)
DEEP = json.loads("[" * 500 + "]" * 500)
_SLICED = {"slices": [[[0, 1]], [[0, 1]]]}
_PLAIN_ATTACKS = {
    "no-format": at("format")(...),
    "another-format": at("format")("gguf"),
    "version-2": at("version")(2),
    "version-text": at("version")("1"),
    "no-config": at("config")(...),
    "config-list": at("config")([]),
    "config-number": at("config", "emb_size")(1e400),
    "config-huge": at("config", "num_layers")(10**30),
    "config-other-model": at("config", "emb_size")(128),
    "no-precision": at("precision")(...),
    "another-precision": at("precision")("int2"),
    "precision-list": at("precision")([]),
    "precision-int4": at("precision")("int4"),
    "precision-float32": at("precision")("float32"),
    "no-mesh": at("mesh")(...),
    "mesh-text": at("mesh")("model=2"),
    "mesh-zero": at("mesh", "model")(0),
    "mesh-negative": at("mesh")({"expert": -1, "model": -2}),
    "mesh-infinite": at("mesh", "model")(math.inf),
    "mesh-nan": at("mesh", "model")(math.nan),
    "mesh-huge": at("mesh", "model")(10**20),
    "mesh-other": at("mesh", "model")(4),
    "no-source": at("source")(...),
    "source-text": at("source")("grok-1"),
    "source-precision": at("source", "precision")("int3"),
    "source-precision-null": at("source", "precision")(None),
    "source-precision-list": at("source", "precision")([]),
    "no-tensors": at("tensors")({}),
    "tensors-list": at("tensors")([]),
    "tensor-gone": at("tensors", EMBEDDING)(...),
    "tensor-more": at("tensors")(
        lambda old: old | {"other.weight": {"shape": [1], "dtype": "F32", **_SLICED}}
    ),
    "tensor-shape": at("tensors", EMBEDDING, "shape")([256, 65]),
    "tensor-dtype": at("tensors", EMBEDDING, "dtype")("BF16"),
    "tensor-null": at("tensors", EMBEDDING)(None),
    "scales-gone": at("tensors", DOWN)(...),
    "scales-flat": at("tensors", DOWN, "shape")([8]),
    "scales-empty": at("tensors", DOWN, "shape")([]),
    "scales-text": at("tensors", DOWN, "shape")("88"),
    "scales-huge": at("tensors", DOWN, "shape")([2, 10**30, 96]),
    "scales-zero": at("tensors", DOWN, "shape")([2, 0, 96]),
    "scales-negative": at("tensors", DOWN, "shape")([2, -8, 96]),
    "scales-true": at("tensors", DOWN, "shape")([2, True, 96]),
    "scales-float": at("tensors", DOWN, "shape")([2, 8.0, 96]),
    "scales-do-not-divide": at("tensors", DOWN, "shape")([2, 7, 96]),
    "scales-cut-by-the-mesh": at("tensors", "layers.0.attention.out.scales", "shape")([1, 96]),
    "scales-of-a-norm": at("tensors")(
        lambda old: old | {"final_norm.scales": {"shape": [1, 96], "dtype": "BF16", "slices": []}}
    ),
    "scales-of-a-router": at("tensors")(
        lambda old: (
            old | {"layers.0.router.scales": {"shape": [1, 2], "dtype": "BF16", "slices": []}}
        )
    ),
    "slices-gone": at("tensors", EMBEDDING, "slices")(...),
    "slices-few": at("tensors", EMBEDDING, "slices")([]),
    "slices-one": at("tensors", EMBEDDING, "slices")([[[0, 24], [0, 96]]]),
    "slices-other": at("tensors", EMBEDDING, "slices", 0, 0)([0, 48]),
    "slices-deep": at("tensors", EMBEDDING, "slices")(DEEP),
    "error-text": at("tensors", GATE, "relative_rms_error")("0.1"),
    "error-negative": at("tensors", GATE, "relative_rms_error")(-0.1),
    "error-nan": at("tensors", GATE, "relative_rms_error")(math.nan),
    "error-infinite": at("tensors", GATE, "relative_rms_error")(math.inf),
    "error-huge": at("tensors", GATE, "relative_rms_error")(10**400),
    "error-true": at("tensors", GATE, "relative_rms_error")(True),
    "error-list": at("tensors", GATE, "relative_rms_error")([0.1]),
    "devices-none": at("devices")([]),
    "devices-null": at("devices")(None),
    "devices-text": at("devices")("01"),
    "devices-number": at("devices")(2),
    "devices-object": at("devices")({"0": 1}),
    "devices-beyond": at("devices")([0, 1, 2]),
    "devices-negative": at("devices")([-1, 0]),
    "devices-twice": at("devices")([0, 0, 1]),
    "devices-backwards": at("devices")([1, 0]),
    "devices-floats": at("devices")([0.0, 1.0]),
    "devices-bools": at("devices")([False, True]),
    "devices-lists": at("devices")([[0], [1]]),
    "devices-huge": at("devices")([0, 10**30]),
    "compressed-after-all": at("compression")("zstd:3"),
    "no-files": at("files")(...),
    "files-none": at("files")([]),
    "files-object": at("files")({}),
    "file-gone": at("files", 1)(...),
    "file-null": at("files", 1)(None),
    "file-parent": at("files", 0, "name")("../device-00-of-02.safetensors"),
    "file-absolute": at("files", 0, "name")("/etc/passwd"),
    "file-hidden": at("files", 0, "name")(".."),
    "file-newline": at("files", 0, "name")("device-00-of-02.safetensors\n"),
    "file-other-mesh": at("files", 0, "name")("device-00-of-04.safetensors"),
    "file-packed": at("files", 0, "name")("device-00-of-02.safetensors.zst"),
    "file-infinite": at("files", 0, "bytes")(math.inf),
    "file-nan": at("files", 0, "bytes")(math.nan),
    "file-text-bytes": at("files", 0, "bytes")("many"),
    "file-null-bytes": at("files", 0, "bytes")(None),
    "file-no-sum": at("files", 0, "sha256")(...),
    "file-short-sum": at("files", 0, "sha256")("abc"),
    "file-frames": at("files", 0)(lambda old: old | {"frames": [[1, 1]]}),
    "file-more": at("files")(
        [{"name": "device-09.safetensors", "bytes": 1, "sha256": "0" * 64}] * 3
    ),
}


def frame(number, value):
    return at("files", 0, "frames", number)(value)


_PACKED_ATTACKS = {
    "compression-gone": at("compression")(...),
    "compression-null": at("compression")(None),
    "compression-other": at("compression")("gzip"),
    "compression-level": at("compression")("zstd:99"),
    "compression-empty": at("compression")(""),
    "compression-number": at("compression")(3),
    "compression-list": at("compression")(["zstd"]),
    "compression-true": at("compression")(True),
    "devices-others": at("devices")([0, 1]),
    "devices-more": at("devices")([1, 2, 3]),
    "precision-int8": at("precision")("int8"),
    "odd-groups": at("tensors", DOWN, "shape")([2, 128, 96]),
    "groups-of-all": at("tensors", DOWN, "shape")([2, 1, 96]),
    "too-many-groups": at("tensors", DOWN, "shape")([2, 256, 96]),
    "no-groups": at("tensors", DOWN)(...),
    "int4-shape-of-int8": at("tensors", GATE, "shape")([2, 96, 128]),
    "int4-dtype-of-int8": at("tensors", GATE, "dtype")("I8"),
    "frames-gone": at("files", 0, "frames")(...),
    "frames-null": at("files", 0, "frames")(None),
    "frames-none": at("files", 0, "frames")([]),
    "frames-text": at("files", 0, "frames")("frames"),
    "frames-object": at("files", 0, "frames")({"10": "20"}),
    "frames-deep": at("files", 0, "frames")(DEEP),
    "frames-of-another": at("files", 0, "frames")(lambda old: old[:-1]),
    "frames-more": at("files", 0, "frames")(lambda old: [*old, [1, 1]]),
    "frames-swapped": at("files", 0, "frames")(lambda old: [old[1], old[0], *old[2:]]),
    "frames-joined": at("files", 0, "frames")(
        lambda old: [
            [old[0][0] + old[1][0], old[0][1] + old[1][1]],
            *old[2:],
        ]
    ),
    "frame-longer": frame(0, lambda old: [old[0] + 1, old[1]]),
    "frame-longer-packed": frame(0, lambda old: [old[0], old[1] + 1]),
    "frame-zero": frame(0, [0, 5]),
    "frame-packed-zero": frame(0, lambda old: [old[0], 0]),
    "frame-negative": frame(0, lambda old: [-old[0], old[1]]),
    "frame-packed-negative": frame(0, lambda old: [old[0], -old[1]]),
    "frame-huge": frame(0, [LARGEST_FRAME + 1, 100]),
    "frame-packed-huge": frame(0, lambda old: [old[0], 2 * LARGEST_FRAME + 1]),
    "frame-beyond-words": frame(0, [10**400, 10**400]),
    "frame-float": frame(0, lambda old: [float(old[0]), old[1]]),
    "frame-packed-float": frame(0, lambda old: [old[0], float(old[1])]),
    "frame-true": frame(0, [True, True]),
    "frame-text": frame(0, lambda old: [str(old[0]), str(old[1])]),
    "frame-null": frame(0, None),
    "frame-one": frame(0, lambda old: old[:1]),
    "frame-three": frame(0, lambda old: [*old, 1]),
    "frame-nan": frame(0, [math.nan, math.nan]),
    "packed-bytes": at("files", 0, "bytes")(lambda old: old + 1),
    "packed-bytes-float": at("files", 0, "bytes")(lambda old: old + 1.5),
    "packed-bytes-negative": at("files", 0, "bytes")(lambda old: -old),
    "packed-bytes-true": at("files", 0, "bytes")(True),
    "packed-name-plain": at("files", 0, "name")("device-01-of-04.safetensors"),
}
_ROUNDED_ATTACKS = {
    "bf16-with-scales": at("tensors")(
        lambda old: (
            old
            | {DOWN: {"shape": [2, 8, 96], "dtype": "BF16", "slices": [[[0, 1], [0, 8], [0, 96]]]}}
        )
    ),
    "bf16-as-int8": at("precision")("int8"),
    "bf16-as-float32": at("precision")("float32"),
    "bf16-as-f16": at("tensors", GATE, "dtype")("F16"),
}
ATTACKS = [
    pytest.param(base, attack, id=f"{base}-{name}")
    for base, attacks in (
        ("plain", _PLAIN_ATTACKS),
        ("packed", _PACKED_ATTACKS),
        ("rounded", _ROUNDED_ATTACKS),
    )
    for name, attack in attacks.items()
]


@pytest.mark.parametrize(("base", "attack"), ATTACKS)
def test_a_manifest_that_cannot_be_meant_is_refused(base, attack):
    values = values_of(BASES[base])
    attack(values)

    with pytest.raises((CorruptCheckpointError, PlacementError)) as caught:
        parse(values)

    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("group", [1, 3])
def test_int4_groups_of_an_odd_number_are_refused_even_if_all_else_agrees(group):
    config = replace(TINY, emb_size=48, key_size=6, widening_factor=3)
    storage = Storage(
        config=config,
        precision=Precision.INT4,
        groups={
            spec.name: spec.shape[-2] // group if spec.is_quantized else 0
            for spec in tensor_specs(config)
        },
    )
    manifest = manifest_of(storage, MeshShape(1, 1))

    with pytest.raises(CorruptCheckpointError, match=f"has int4 groups of {group}"):
        parse_manifest(manifest_bytes(manifest))


@pytest.mark.parametrize("base", BASES)
def test_without_an_attack_none_is_refused(base):
    assert parse(values_of(BASES[base])) == BASES[base]


def test_a_glance_does_not_look_for_contradictions():
    values = values_of(BASES["plain"])
    values["tensors"][EMBEDDING]["slices"][0] = [[0, 1], [0, 1]]
    data = json.dumps(values).encode()

    assert parse_manifest(data, is_checked=False).storage == BASES["plain"].storage
    with pytest.raises(CorruptCheckpointError, match=EMBEDDING):
        parse_manifest(data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="unfinished"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"3", id="number"),
        pytest.param(b'"x"', id="text"),
        pytest.param(b"\xff\xfe\x00", id="no-utf-8"),
        pytest.param(b"[" * 200_000, id="deep"),
        pytest.param(b"9" * 10_000, id="long-number"),
        pytest.param(b'{"format":"grokctl-ready","version":1}', id="hardly-any"),
    ],
)
def test_a_manifest_that_is_none_is_refused(data):
    with pytest.raises(CorruptCheckpointError, match=r"grokctl\.json: malformed"):
        parse_manifest(data)


def test_a_later_version_says_which_was_expected():
    with pytest.raises(
        CorruptCheckpointError, match="expected grokctl-ready version 1, found"
    ) as e:
        parse(values_of(PLAIN) | {"version": 2})

    assert "install the grokctl that wrote it" in e.value.hint


@pytest.mark.parametrize("size", [-1, 0, 1, True, 1.5, 10**30])
def test_the_size_of_another_file_is_whatever_it_says(size):
    """Nothing follows from it: the file itself is looked at."""
    values = values_of(PLAIN)
    values["files"][-1]["bytes"] = size

    found = parse(values)

    assert type(found.records["tokenizer.model"].nbytes) is int


def paths_in(value, path=()):
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from paths_in(value[key], (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from paths_in(item, (*path, index))


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([10**6, 2**31, 2**63, 10**40, -1, math.inf, -math.inf, math.nan, 1.5, 1e300]),
    st.text(max_size=4),
    st.sampled_from(["../x", "/", "int8", "int4", "bf16", "I8", "zstd", "a" * 5000, "1"]),
    st.lists(st.integers(-1, 3), max_size=4),
    st.dictionaries(st.sampled_from(["shape", "expert", "name"]), st.integers(0, 3), max_size=2),
)


@pytest.mark.parametrize("base", BASES)
def test_no_manifest_makes_anything_but_our_own_errors(base):
    original = values_of(BASES[base])
    short = {**original, "tensors": {key: original["tensors"][key] for key in (EMBEDDING, GATE)}}
    places = [path for path in paths_in(short) if path]

    @settings(deadline=None, max_examples=250)
    @given(
        changes=st.lists(
            st.tuples(st.sampled_from(places), JUNK | st.just(...)), min_size=1, max_size=3
        )
    )
    def attack(changes):
        changed = copy.deepcopy(original)
        for path, value in changes:
            with suppress(KeyError, IndexError, TypeError):  # an earlier one took the place away
                at(*path)(value)(changed)
        with suppress(GrokctlError):
            found = parse(changed)
            assert found.layouts[found.devices[0]].nbytes > 0
            assert parse_manifest(manifest_bytes(found)) == found
        with suppress(GrokctlError):
            glanced = parse_manifest(json.dumps(changed).encode(), is_checked=False)
            assert min(weight_bytes(glanced.storage, glanced.mesh)) > 0

    attack()


def test_a_manifest_of_a_size_that_no_model_needs_is_not_read(tmp_path):
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(2**40)

    with pytest.raises(CorruptCheckpointError, match="found 1,099,511,627,776"):
        read_manifest(tmp_path)
