"""A GGUF export is a source like the release that it was made of, and is proven by its sums."""

import hashlib
import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
from cuts import cut, device_files
from exports import WIDE, exported, gguf_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.gguf import gguf_header, read_gguf
from grokctl.checkpoint.gguf_checkpoint import open_gguf
from grokctl.checkpoint.gguf_model import STORAGE
from grokctl.checkpoint.miniature import write_miniature
from grokctl.checkpoint.ready import open_ready
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.tensor_source import ReleaseSource, index_of
from grokctl.errors import CorruptCheckpointError, PlacementError, Reason, UsageError
from grokctl.inspect import inspect
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.verify import verify

FOUR = MeshShape(1, 4)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = tmp_path_factory.mktemp("release") / "wide"
    write_miniature(root, replace(WIDE, num_layers=2))
    return open_release(root)


@pytest.fixture(scope="module")
def whole(release, tmp_path_factory):
    """The Q8_0 export in several files, not to be changed."""
    return exported(release, tmp_path_factory.mktemp("whole") / "out", split=10**6)


@pytest.fixture
def damaged(release, tmp_path):
    """One in one file, to damage."""
    return exported(release, tmp_path / "damaged")


@pytest.mark.parametrize("precision", [None, *Precision])
@pytest.mark.parametrize("mesh", [MeshShape(1, 1), MeshShape(2, 4)], ids=str)
def test_the_device_files_are_those_from_the_release(release, whole, tmp_path, mesh, precision):
    options = {"precision": precision, "max_memory": 3 * 10**6}

    direct = cut(release, mesh, tmp_path / "direct", **options)
    around = cut(open_gguf(whole.root), mesh, tmp_path / "around", **options)

    assert device_files(around.root) == device_files(direct.root)
    assert (around.root / "tokenizer.model").read_bytes() == release.tokenizer.read_bytes()
    assert around.source.name == "wide"


@pytest.mark.parametrize(
    ("precision", "kind", "options"),
    [
        (Precision.INT4, "q4_0", {"group_size": 32}),
        (Precision.BFLOAT16, "bf16", {}),
        (Precision.FLOAT32, "f32", {}),
    ],
    ids=str,
)
def test_other_precisions_come_back_too(release, tmp_path, precision, kind, options):
    ready = cut(release, FOUR, tmp_path / "ready", precision=precision, **options)
    made = exported(open_ready(ready.root), tmp_path / "gguf", kind)

    again = cut(open_gguf(made.root), FOUR, tmp_path / "again")

    assert made.manifest.is_lossless
    assert again.precision is precision
    assert device_files(again.root) == device_files(ready.root)


def test_an_export_of_an_export_is_the_same_file(release, whole, tmp_path):
    direct = exported(release, tmp_path / "direct")

    again = exported(open_gguf(whole.root), tmp_path / "again")

    assert [path.read_bytes() for path in gguf_of(again)] == [
        path.read_bytes() for path in gguf_of(direct)
    ]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_part_of_any_tensor_is_read(release, whole, monkeypatch, data):
    chunk = data.draw(st.sampled_from([1, 2**14, 2**23]))
    monkeypatch.setattr("grokctl.checkpoint.gguf_checkpoint._CHUNK", chunk)
    source, wanted = open_gguf(whole.root), ReleaseSource(release)
    tensor = data.draw(st.sampled_from(source.storage.tensors))
    slices = []
    for length in tensor.shape:
        low = data.draw(st.integers(0, length - 1))
        slices.append((low, data.draw(st.integers(low + 1, length))))

    found = source.read(tensor, tuple(slices))

    assert found.dtype == tensor.dtype
    np.testing.assert_array_equal(found, wanted.read(tensor, tuple(slices)))
    if tensor.is_matrix:
        lead = tuple(low for low, _ in slices[:-2])
        with source.reading(tensor, lead, slices[-1]) as read:
            for bounds in (slices[-2], (0, 3), (2, 40), slices[-2]):
                bounds = (bounds[0], min(bounds[1], tensor.shape[-2]))  # noqa: PLW2901
                part = wanted.read(tensor, tuple((0, length) for length in tensor.shape))
                rows = part[lead][index_of((bounds, slices[-1]))]
                np.testing.assert_array_equal(read(*bounds), rows)


def test_what_was_folded_comes_back(tmp_path):
    root = tmp_path / "folded"
    write_miniature(root, replace(WIDE, num_layers=1), tokenizer=False)
    with_scale(root, "layers.0.attention.value", 2.0**-26)
    with_scale(root, "layers.0.moe.down", 2.0**18)
    folded = open_release(root)

    made = exported(folded, tmp_path / "gguf")

    assert made.manifest.is_lossless
    assert set(made.manifest.folded) == {
        f"layers.0.{slot}" for slot in ("attention.value", "attention.out", "moe.up", "moe.down")
    }
    direct = cut(folded, FOUR, tmp_path / "direct")
    around = cut(open_gguf(made.root), FOUR, tmp_path / "around")
    assert device_files(around.root) == device_files(direct.root)


def with_scale(root, name, value):
    """Change one scale of a weight."""
    release = open_release(root)
    (tensor,) = (one for one in release.tensors if one.spec.name == name)
    bits = (np.float32(value).view(np.uint32) >> 16).astype("<u2")
    with tensor.path.open("r+b") as file:
        file.seek(tensor.scales.offset + 2 * 7)
        file.write(bits.tobytes())


def test_weights_that_had_to_become_float32_are_no_source(tmp_path):
    root = tmp_path / "large"
    write_miniature(root, replace(WIDE, num_layers=1), tokenizer=False)
    with_scale(root, "layers.0.moe.gate", 2.0**18)

    made = exported(open_release(root), tmp_path / "gguf")

    assert made.manifest.float32 == ("layers.0.moe.gate",)
    assert made.manifest.is_lossless
    with pytest.raises(PlacementError, match=r"found layers.0.moe.gate as float32") as caught:
        open_gguf(made.root)
    assert caught.value.hint == "CHECKPOINT large  # what it was made from"


def test_an_embedding_that_was_rounded_is_no_source(release, tmp_path):
    made = exported(release, tmp_path / "gguf", embedding="bf16")

    expected = r"token_embd.weight: expected F32, found BF16"
    with pytest.raises(PlacementError, match=expected) as caught:
        open_gguf(made.root)
    assert caught.value.hint == "CHECKPOINT wide  # what it was made from"


# --- proof


def flip(path, place=-5):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_an_export_fits_its_sums_and_is_hashed_once(damaged):
    verdicts = [verify(damaged.root), verify(damaged.root, rehash=True)]

    for verdict in verdicts:
        assert (verdict.damage, verdict.files, verdict.nbytes) == ((), 2, damaged.nbytes)
        assert verdict.doubt == "made from a release that was not proven"
    assert [verdict.hashed for verdict in verdicts] == [0, damaged.nbytes]


@pytest.mark.parametrize("name", ["wide-q8_0.gguf", "tokenizer.model"])
def test_a_flipped_bit_is_found_and_goes_into_no_checkpoint(damaged, tmp_path, name):
    flip(damaged.root / name)

    verdict = verify(damaged.root)

    assert [(item.file, item.reason) for item in verdict.damage] == [(name, Reason.ALTERED)]
    assert "grokctl export wide --format gguf --type q8_0" in (verdict.remedy or "")
    with pytest.raises(CorruptCheckpointError):
        cut(open_gguf(damaged.root), FOUR, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["grokctl-export.json", "SHA256SUMS"])
def test_sums_and_manifest_hold_each_other(damaged, name):
    path = damaged.root / name
    data = path.read_text()
    digest = damaged.records["wide-q8_0.gguf"].sha256
    assert digest in data
    path.write_text(data.replace(digest, digest[::-1]))

    assert verify(damaged.root).damage


def test_a_missing_and_a_short_file_are_named(damaged):
    (damaged.root / "tokenizer.model").unlink()
    path = damaged.root / "wide-q8_0.gguf"
    path.write_bytes(path.read_bytes()[:-1])

    found = [(item.file, item.reason) for item in verify(damaged.root, quick=True).damage]

    assert found == [("tokenizer.model", Reason.MISSING), (path.name, Reason.SHORT)]


def test_the_command_that_makes_it_again_has_its_options_and_runs_no_stranger_s(damaged):
    path = damaged.root / "grokctl-export.json"
    values = json.loads(path.read_text()) | {"type": "q8_0; touch x", "embedding": "bf16"}
    path.write_text(json.dumps(values))
    (damaged.root / "wide-q8_0.gguf").unlink()

    words = shlex.split(verify(damaged.root, quick=True).remedy, comments=True)

    assert words[words.index("--type") + 1] == "q8_0; touch x"
    assert words[words.index("--embedding") + 1] == "bf16"


def test_sums_that_fit_a_header_which_nothing_reads_do_not_make_it_right(damaged):
    (path,) = gguf_of(damaged)
    path.write_bytes(path.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"))
    manifest = damaged.root / "grokctl-export.json"
    entries = json.loads(manifest.read_text())
    for entry in entries["files"]:
        if entry["name"] == path.name:
            entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(entries))
    sums = damaged.root / "SHA256SUMS"
    names = [line.split("  ")[1] for line in sums.read_text().splitlines()]
    sums.write_text(
        "".join(
            f"{hashlib.sha256((damaged.root / name).read_bytes()).hexdigest()}  {name}\n"
            for name in names
        )
    )

    verdict = verify(damaged.root)

    (item,) = verdict.damage
    assert (item.file, item.reason) == (path.name, Reason.MALFORMED)
    assert "blk.0.attn_k.weight" in item.detail


def test_inspect_lists_the_tensors_by_their_names_there(whole):
    found = inspect(whole.root)

    assert (found.kind, found.config) == ("export", replace(WIDE, num_layers=2))
    rows = {row.name: row for row in found.rows}
    assert len(rows) == 2 + 12 * 2
    gate = rows["blk.1.ffn_gate_exps.weight"]
    assert (gate.shape, gate.dtype, gate.kind) == ((2, 512, 256), "Q8_0", "experts")
    assert gate.nbytes == 2 * 512 * 256 // 32 * 34
    with pytest.raises(UsageError, match="--stats"):
        inspect(whole.root, stats=True)


# --- strangers


def rewritten(made, change):
    """The export with other metadata, and sums that fit."""
    (path,) = gguf_of(made)
    header, data = read_gguf(path), path.read_bytes()
    values = json.loads(header.metadata[STORAGE])
    text = change(values)
    metadata = dict(header.metadata)
    metadata[STORAGE] = json.dumps(values) if text is None else text
    path.write_bytes(gguf_header(metadata, header.tensors) + data[header.offsets[0] :])
    manifest = made.root / "grokctl-export.json"
    entries = json.loads(manifest.read_text())
    for entry in entries["files"]:
        if entry["name"] == path.name:
            entry["bytes"] = path.stat().st_size
            entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(entries))
    return made.root


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda _: "[", id="no-json"),
        pytest.param(lambda _: "[" * 10**5, id="deep"),
        pytest.param(lambda _: "[]", id="a-list"),
        pytest.param(lambda values: values.pop("groups") and None, id="no-groups"),
        pytest.param(lambda values: values.update(precision="int2"), id="precision"),
        pytest.param(lambda values: values.update(precision="bf16"), id="groups-of-floats"),
        pytest.param(lambda values: values["groups"].update({"layers.0.moe.up": 3}), id="odd"),
        pytest.param(lambda values: values["groups"].update({"layers.0.moe.up": -1}), id="less"),
        pytest.param(lambda values: values["groups"].update({"layers.0.moe.up": 99}), id="many"),
        pytest.param(lambda values: values["shifts"].update({"layers.0.moe.up": [1]}), id="shift"),
        pytest.param(lambda values: values["shifts"].update({"x": [1]}), id="shift-of-nothing"),
        pytest.param(
            lambda values: values["shifts"].update({"layers.0.moe.up": [10**9, 0]}), id="far"
        ),
        pytest.param(
            lambda values: values["shifts"].update({"layers.0.moe.up": [float("inf"), 0]}),
            id="endless",
        ),
        pytest.param(lambda values: values["config"].update(num_layers=3), id="layers"),
        pytest.param(lambda values: values["config"].update(num_layers=10**9), id="many-layers"),
        pytest.param(lambda values: values["config"].update(emb_size=-1), id="size"),
    ],
)
def test_metadata_that_make_no_sense_are_refused(damaged, change):
    root = rewritten(damaged, change)

    with pytest.raises(CorruptCheckpointError) as caught:
        open_gguf(root)

    assert [item.file for item in caught.value.damage] == ["wide-q8_0.gguf"]


def test_a_name_with_signals_to_a_terminal_is_shown_without_them(damaged):
    (path,) = gguf_of(damaged)
    data = path.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.\x1b[2Jn_q.weigh")
    path.write_bytes(data)

    names = [row.name for row in inspect(damaged.root).rows]

    assert len(names) == 2 + 12 * 2
    assert not any("\x1b" in name for name in names)
    with pytest.raises(CorruptCheckpointError) as caught:
        open_gguf(damaged.root)
    assert "\x1b" not in str(caught.value)


def test_a_scale_that_is_no_bfloat16_is_refused(damaged):
    (path,) = gguf_of(damaged)
    header = read_gguf(path)
    place = [tensor.name for tensor in header.tensors].index("blk.0.attn_q.weight")
    data = bytearray(path.read_bytes())
    data[header.offsets[place]] ^= 1
    path.write_bytes(data)
    source = open_gguf(damaged.root)
    (spec,) = (
        tensor.spec
        for tensor in source.storage.tensors
        if tensor.key == "layers.0.attention.query.weight"
    )

    with pytest.raises(CorruptCheckpointError, match="no bfloat16"):
        source.read(source.storage.scales(spec), ((0, 1), (0, 256)))
