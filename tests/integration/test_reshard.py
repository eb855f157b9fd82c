"""Device files anybody can read, runs that go on where they stopped, manifests that cannot lie."""

import copy
import errno
import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from golden import load_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.logical import ReleaseSource, logical_tensors
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.ready import ReadyCheckpoint, open_ready
from grokctl.checkpoint.receipt import Receipt
from grokctl.checkpoint.release import open_release
from grokctl.errors import (
    CorruptCheckpointError,
    DiskFullError,
    GrokctlError,
    PlacementError,
    Reason,
    UsageError,
)
from grokctl.events import Advanced, Finished, Noted, Stage, Started
from grokctl.model.placement import MeshShape
from grokctl.reshard import plan, reshard
from grokctl.verify import verify_ready

MESHES = [MeshShape(1, 1), MeshShape(1, 2), MeshShape(1, 4), MeshShape(1, 8), MeshShape(2, 8)]
ALL_MESHES = [pytest.param(mesh, id=mesh.slug) for mesh in MESHES]
SYNC_EVERY = 40_000


@pytest.fixture(scope="module")
def release():
    return load_golden("two-layers").release


@pytest.fixture(scope="module")
def ready(release, tmp_path_factory) -> dict[MeshShape, ReadyCheckpoint]:
    """One for each mesh; read only."""
    folder = tmp_path_factory.mktemp("ready")
    return {mesh: cut(release, mesh, folder / mesh.slug) for mesh in MESHES}


def cut(release, mesh: MeshShape, out: Path, **options) -> ReadyCheckpoint:
    return reshard(release, plan(release, mesh=mesh, out=out), **options)


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def header_of(path: Path) -> tuple[int, dict]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return 8 + length, json.loads(data[8 : 8 + length])


# --- device files


@pytest.mark.parametrize("mesh", ALL_MESHES)
def test_device_files_are_plain_safetensors_files(ready, release, mesh):
    checkpoint, source = ready[mesh], ReleaseSource(release)
    tensors = {tensor.key: tensor for tensor in logical_tensors(source)}

    for device in range(mesh.size):
        path = checkpoint.root / f"device-{device:02d}-of-{mesh.size:02d}.safetensors"
        with safetensors.safe_open(path, framework="numpy") as file:
            assert set(file.keys()) == set(tensors)
            assert file.metadata() == {
                "format": "grokctl-ready",
                "mesh": str(mesh),
                "device": str(device),
                "precision": "int8",
            }
            for key, tensor in tensors.items():
                slices = tensor.slices(mesh, device, release.config)
                expected = source.read(tensor, slices)
                found = file.get_slice(key)
                assert tuple(found.get_shape()) == expected.shape
                assert found.get_dtype() == {
                    "int8": "I8", "bfloat16": "BF16", "float32": "F32"
                }[expected.dtype.name]  # fmt: skip
                if expected.dtype != BFLOAT16:
                    np.testing.assert_array_equal(file.get_tensor(key), expected)
        everything = safetensors.deserialize(path.read_bytes())
        for key, entry in everything:
            tensor = tensors[key]
            expected = source.read(tensor, tensor.slices(mesh, device, release.config))
            assert bytes(entry["data"]) == expected.tobytes()


@pytest.mark.parametrize("mesh", ALL_MESHES)
def test_tensors_are_aligned_wherever_those_before_them_leave_room(ready, mesh):
    for record in ready[mesh].files:
        begin, header = header_of(ready[mesh].root / record.name)
        header.pop("__metadata__")
        offsets = [entry["data_offsets"] for entry in header.values()]
        is_whole = [(stop - start) % 64 == 0 for start, stop in offsets]

        assert begin % 64 == 0
        assert offsets == sorted(offsets)
        assert all(before[1] == after[0] for before, after in pairwise(offsets))
        assert begin + offsets[-1][1] == record.nbytes
        assert is_whole == sorted(is_whole, reverse=True)
        assert all(start % 64 == 0 for start, _ in offsets[: sum(is_whole) + 1])
        assert all(start % 4 == 0 for start, _ in offsets)


@pytest.mark.parametrize("mesh", ALL_MESHES)
def test_the_bytes_on_disk_are_those_planned(ready, release, mesh):
    planned = plan(release, mesh=mesh, out=Path("unused"))
    checkpoint = ready[mesh]
    on_disk = sum(path.stat().st_size for path in checkpoint.root.glob("device-*"))

    source = ReleaseSource(release)
    payload = sum(
        math.prod(stop - start for start, stop in tensor.slices(mesh, device, release.config))
        * tensor.dtype.itemsize
        for tensor in logical_tensors(source)
        for device in range(mesh.size)
    )
    headers = sum(header_of(checkpoint.root / record.name)[0] for record in checkpoint.files)
    assert on_disk == planned.bytes_out == checkpoint.nbytes == payload + headers
    assert planned.bytes_in == release.nbytes


@pytest.mark.parametrize("mesh", ALL_MESHES)
def test_the_sums_are_right_and_cover_every_other_file(ready, mesh):
    root = ready[mesh].root
    lines = (root / "SHA256SUMS").read_text().splitlines()
    sums = dict(re.fullmatch(r"([0-9a-f]{64})  (\S+)", line).groups()[::-1] for line in lines)

    assert set(sums) == {path.name for path in root.iterdir()} - {"SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((root / name).read_bytes()).hexdigest() == digest
    assert {record.name: record.sha256 for record in ready[mesh].files}.items() <= sums.items()


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_sha256sum_needs_none_of_our_code(ready, tmp_path):
    root = shutil.copytree(ready[MeshShape(1, 4)].root, tmp_path / "copy")
    command = ["sha256sum", "-c", "--strict", "SHA256SUMS"]

    whole = subprocess.run(command, cwd=root, capture_output=True, check=False)
    (root / "device-02-of-04.safetensors").write_bytes(b"x")
    damaged = subprocess.run(command, cwd=root, capture_output=True, check=False)

    assert whole.returncode == 0
    assert damaged.returncode != 0
    assert b"device-02-of-04.safetensors: FAILED" in damaged.stdout


def test_the_tokenizer_comes_along_and_is_summed(two_layers, tmp_path):
    (two_layers / "tokenizer.model").write_bytes(b"any bytes")

    checkpoint = cut(open_release(two_layers), MeshShape(1, 2), tmp_path / "ready")

    assert checkpoint.tokenizer.read_bytes() == b"any bytes"
    assert checkpoint.files[-1].name == "tokenizer.model"
    assert checkpoint.files[-1].sha256 == hashlib.sha256(b"any bytes").hexdigest()
    assert "  tokenizer.model\n" in (checkpoint.root / "SHA256SUMS").read_text()
    assert verify_ready(checkpoint).damage == ()


# --- the manifest


@pytest.mark.parametrize("mesh", ALL_MESHES)
def test_the_manifest_says_what_the_design_promises(ready, release, mesh):
    manifest = json.loads((ready[mesh].root / "grokctl.json").read_bytes())

    assert manifest["format"] == "grokctl-ready"
    assert manifest["version"] == 1
    assert manifest["config"] == release.config.to_dict()
    assert manifest["precision"] == "int8"
    assert manifest["mesh"] == {"expert": mesh.expert, "model": mesh.model}
    assert manifest["source"] == {
        "name": "two-layers", "infohash": None, "proven": False, "verified_at": None
    }  # fmt: skip
    source = ReleaseSource(release)
    assert list(manifest["tensors"]) == [tensor.key for tensor in logical_tensors(source)]
    for tensor in logical_tensors(source):
        entry = manifest["tensors"][tensor.key]
        assert entry["shape"] == list(tensor.shape)
        assert entry["slices"] == [
            [list(bounds) for bounds in tensor.slices(mesh, device, release.config)]
            for device in range(mesh.size)
        ]
    assert [entry["name"] for entry in manifest["files"]] == [
        f"device-{device:02d}-of-{mesh.size:02d}.safetensors" for device in range(mesh.size)
    ]
    for entry in manifest["files"]:
        assert entry["bytes"] == (ready[mesh].root / entry["name"]).stat().st_size


def test_a_proof_is_recorded(release, tmp_path):
    proof = Receipt(infohash="ab" * 20, verified_at="2024-03-17T12:00:00Z", stamps={})

    checkpoint = cut(release, MeshShape(1, 1), tmp_path / "ready", proof=proof)

    assert checkpoint.source.proven
    assert checkpoint.source.infohash == "ab" * 20
    assert checkpoint.source.verified_at == "2024-03-17T12:00:00Z"
    assert open_ready(tmp_path / "ready").source == checkpoint.source


def test_a_checkpoint_opens_as_it_was_written(ready):
    for mesh, checkpoint in ready.items():
        again = open_ready(checkpoint.root)
        assert again.mesh == mesh
        assert again.files == checkpoint.files
        assert again.layouts == checkpoint.layouts
        assert again.name == mesh.slug


# --- reading


@pytest.mark.parametrize("mesh", ALL_MESHES)
def test_any_mesh_can_be_read_from_the_files_of_any_other(ready, release, mesh):
    source, checkpoint = ReleaseSource(release), ready[mesh]

    for other in MESHES:
        for device in range(other.size):
            for tensor in logical_tensors(source):
                slices = tensor.slices(other, device, release.config)
                expected = source.read(tensor, slices)
                found = checkpoint.read(tensor, slices)
                assert found.dtype == expected.dtype
                np.testing.assert_array_equal(
                    found.view(f"u{found.itemsize}"), expected.view(f"u{found.itemsize}")
                )


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_part_can_be_read_from_the_files_of_any_mesh(ready, release, data):
    source = ReleaseSource(release)
    checkpoint = ready[data.draw(st.sampled_from(MESHES))]
    tensor = data.draw(st.sampled_from(logical_tensors(source)))
    slices = tuple(
        (low := data.draw(st.integers(0, length - 1)), data.draw(st.integers(low + 1, length)))
        for length in tensor.shape
    )
    whole = ready[MeshShape(1, 1)].read(tensor, tuple((0, length) for length in tensor.shape))

    part = checkpoint.read(tensor, slices)

    np.testing.assert_array_equal(part, whole[tuple(slice(*bounds) for bounds in slices)])


def test_what_one_file_holds_is_a_view_of_it(ready, release):
    checkpoint = ready[MeshShape(2, 8)]
    for tensor in logical_tensors(ReleaseSource(release)):
        part = checkpoint.read(tensor, tensor.slices(checkpoint.mesh, 11, release.config))

        assert not part.flags.owndata
        assert not part.flags.writeable
        assert part.flags.aligned


def test_two_devices_files_that_changed_places_are_noticed_when_read(ready, release, tmp_path):
    root = shutil.copytree(ready[MeshShape(1, 2)].root, tmp_path / "copy")
    first, second = sorted(root.glob("device-*"))
    aside = root / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    checkpoint = open_ready(root)
    tensor = logical_tensors(checkpoint)[0]

    with pytest.raises(CorruptCheckpointError, match="its header is not that of device 0") as error:
        checkpoint.read(tensor, tensor.slices(checkpoint.mesh, 0, release.config))

    assert error.value.damage[0].file == first.name


# --- interrupted runs


def interrupt_at(count: int, events: list | None = None):
    seen = 0

    def observe(event):
        nonlocal seen
        if events is not None:
            events.append(event)
        if isinstance(event, Advanced) and event.stage is Stage.RESHARD:
            seen += 1
            if seen == count:
                raise KeyboardInterrupt

    return observe


def journalled(out: Path) -> int:
    (partial,) = out.parent.glob(f".{out.name}.*.partial")
    journal = partial / "journal"
    return int(journal.read_text().split()[-1]) if journal.exists() else 0


def bytes_up_to(planned, tensors: int) -> int:
    return sum(
        layout.tensors[tensors - 1].offset + layout.tensors[tensors - 1].nbytes
        if tensors
        else len(layout.header)
        for layout in planned.layouts
    )


@pytest.mark.parametrize("mesh", [MeshShape(1, 1), MeshShape(1, 4), MeshShape(2, 8)], ids=str)
def test_an_interrupted_run_goes_on_from_its_journal_to_the_same_bytes(
    ready, release, mesh, tmp_path, monkeypatch
):
    monkeypatch.setattr("grokctl.reshard._SYNC_EVERY", SYNC_EVERY)
    planned = plan(release, mesh=mesh, out=tmp_path / "out")
    count = len(planned.layouts[0].tensors) * mesh.size
    stops = random.Random(mesh.size).sample(range(1, count + 1), 6)

    for number, stop in enumerate([*stops, 1, count]):
        out = tmp_path / str(number)
        planned = plan(release, mesh=mesh, out=out)
        with pytest.raises(KeyboardInterrupt):
            reshard(release, planned, observe=interrupt_at(stop))
        assert not out.exists()
        done, events = journalled(out), []
        assert done * mesh.size <= stop
        reshard(release, planned, observe=events.append)

        started = next(event for event in events if isinstance(event, Started))
        advanced = [event for event in events if isinstance(event, Advanced)]
        assert started.total == planned.bytes_out
        assert started.done == bytes_up_to(planned, done)
        assert len(advanced) == count - done * mesh.size
        note = f"goes on after {done} of {count // mesh.size} tensors of an interrupted run"
        assert (Noted(message=note) in events) == bool(done)
        assert contents(out) == contents(ready[mesh].root)
        assert list(tmp_path.glob(".*")) == []


def test_a_run_interrupted_again_and_again_ends_with_the_same_bytes(
    ready, release, tmp_path, monkeypatch
):
    monkeypatch.setattr("grokctl.reshard._SYNC_EVERY", SYNC_EVERY)
    mesh, out = MeshShape(1, 2), tmp_path / "out"
    planned = plan(release, mesh=mesh, out=out)
    for stop in (17, 17, 5, 30, 1, 40):
        with pytest.raises(KeyboardInterrupt):
            reshard(release, planned, observe=interrupt_at(stop))

    reshard(release, planned)

    assert contents(out) == contents(ready[mesh].root)


@pytest.mark.parametrize("keep", [0, 1, 5000, 60_000])
def test_a_device_file_that_lost_its_end_is_written_again_from_there(
    ready, release, tmp_path, monkeypatch, keep
):
    monkeypatch.setattr("grokctl.reshard._SYNC_EVERY", SYNC_EVERY)
    mesh, out = MeshShape(1, 4), tmp_path / "out"
    planned = plan(release, mesh=mesh, out=out)
    with pytest.raises(KeyboardInterrupt):
        reshard(release, planned, observe=interrupt_at(120))
    (partial,) = tmp_path.glob(".out.*.partial")
    assert journalled(out) > 0
    os.truncate(partial / planned.layouts[2].name, keep)

    reshard(release, planned)

    assert contents(out) == contents(ready[mesh].root)


@pytest.mark.parametrize(
    "journal",
    [b"", b"\n\n", b"junk\n", b"999999\n", b"\xff\xfe\n", b"-3\n", b"9" * 5000],
    ids=["empty", "blank", "junk", "too-many", "no-text", "negative", "long"],
)
def test_a_journal_that_makes_no_sense_spoils_nothing(
    ready, release, tmp_path, monkeypatch, journal
):
    monkeypatch.setattr("grokctl.reshard._SYNC_EVERY", SYNC_EVERY)
    mesh, out = MeshShape(1, 2), tmp_path / "out"
    planned = plan(release, mesh=mesh, out=out)
    with pytest.raises(KeyboardInterrupt):
        reshard(release, planned, observe=interrupt_at(60))
    (partial,) = tmp_path.glob(".out.*.partial")
    (partial / "journal").write_bytes(journal)

    reshard(release, planned)

    assert contents(out) == contents(ready[mesh].root)


def test_a_run_interrupted_after_its_last_tensor_copies_nothing_again(ready, release, tmp_path):
    mesh, out = MeshShape(1, 2), tmp_path / "out"
    planned = plan(release, mesh=mesh, out=out)

    def at_the_end(event):
        if event == Finished(stage=Stage.RESHARD):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard(release, planned, observe=at_the_end)
    events = []
    reshard(release, planned, observe=events.append)

    assert not [event for event in events if isinstance(event, Advanced)]
    assert contents(out) == contents(ready[mesh].root)


def test_the_name_appears_when_everything_is_there(ready, release, tmp_path):
    out, seen = tmp_path / "out", []

    def look(_event):
        seen.append(out.exists() or any(tmp_path.rglob("grokctl.json")))

    cut(release, MeshShape(1, 2), out, observe=look)

    assert len(seen) > 20
    assert not any(seen)
    assert contents(out) == contents(ready[MeshShape(1, 2)].root)


def test_a_source_that_changed_begins_anew(two_layers, tmp_path, monkeypatch):
    monkeypatch.setattr("grokctl.reshard._SYNC_EVERY", SYNC_EVERY)
    mesh, out = MeshShape(1, 2), tmp_path / "out"
    first = open_release(two_layers)
    with pytest.raises(KeyboardInterrupt):
        cut(first, mesh, out, observe=interrupt_at(60))
    path = two_layers / "ckpt-0/tensor00000_000"
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    changed, events = open_release(two_layers), []

    cut(changed, mesh, out, observe=events.append)

    started = next(event for event in events if isinstance(event, Started))
    assert started.done == bytes_up_to(plan(changed, mesh=mesh, out=out), 0)
    assert contents(out) == contents(cut(changed, mesh, tmp_path / "direct").root)


@pytest.mark.parametrize("jobs", [1, 3])
def test_neither_threads_nor_memory_change_a_byte(ready, release, tmp_path, jobs):
    mesh = MeshShape(1, 4)
    planned = plan(release, mesh=mesh, out=tmp_path / "out", jobs=jobs, max_memory=1)

    reshard(release, planned)

    assert planned.jobs == jobs
    assert planned.chunk == 2**20
    assert contents(tmp_path / "out") == contents(ready[mesh].root)


def test_small_chunks_change_no_byte(ready, release, tmp_path, monkeypatch):
    monkeypatch.setattr("grokctl.reshard._SMALLEST_CHUNK", 100)
    mesh = MeshShape(1, 4)
    planned = plan(release, mesh=mesh, out=tmp_path / "out", max_memory=4000, jobs=2)
    assert planned.chunk == 2000
    assert planned.peak_bytes <= 4000

    reshard(release, planned)

    assert contents(tmp_path / "out") == contents(ready[mesh].root)


def test_a_plan_touches_nothing(release, tmp_path):
    plan(release, mesh=MeshShape(2, 8), out=tmp_path / "not" / "yet")

    assert list(tmp_path.iterdir()) == []


# --- destinations


def test_an_existing_checkpoint_is_kept_and_replaced_only_by_force(ready, release, tmp_path):
    out = tmp_path / "out"
    cut(release, MeshShape(1, 2), out)
    with pytest.raises(UsageError, match="exists") as caught:
        cut(release, MeshShape(1, 4), out)
    assert contents(out) == contents(ready[MeshShape(1, 2)].root)
    assert "--force" in caught.value.hint

    cut(release, MeshShape(1, 4), out, force=True)

    assert contents(out) == contents(ready[MeshShape(1, 4)].root)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def make_file(path):
    path.write_text("mine")


def make_folder(path):
    path.mkdir()
    (path / "mine").touch()


def make_release(path):
    (path / "ckpt-0").mkdir(parents=True)


@pytest.mark.parametrize(
    "make",
    [
        make_file, make_folder, make_release, Path.mkdir,
        lambda path: path.symlink_to("nowhere"),
    ],
    ids=["file", "folder", "release", "empty-folder", "broken-link"],
)  # fmt: skip
@pytest.mark.parametrize("force", [False, True])
def test_nothing_else_is_ever_replaced(release, tmp_path, make, force):
    out = tmp_path / "out"
    make(out)
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(UsageError, match="exists"):
        cut(release, MeshShape(1, 1), out, force=force)

    assert sorted(tmp_path.rglob("*")) == before


def test_a_forced_run_that_is_interrupted_keeps_the_old_checkpoint(ready, release, tmp_path):
    out = tmp_path / "out"
    cut(release, MeshShape(1, 2), out)

    with pytest.raises(KeyboardInterrupt):
        cut(release, MeshShape(1, 4), out, force=True, observe=interrupt_at(20))

    assert contents(out) == contents(ready[MeshShape(1, 2)].root)


def test_force_replaces_also_after_a_run_that_died_between_its_renames(
    ready, release, tmp_path, monkeypatch
):
    out, rename = tmp_path / "out", Path.rename
    cut(release, MeshShape(1, 2), out)

    def die(path, target):
        if Path(target) == out:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            cut(release, MeshShape(1, 4), out, force=True)
    cut(release, MeshShape(1, 2), out, force=True)
    cut(release, MeshShape(1, 4), out, force=True)

    assert contents(out) == contents(ready[MeshShape(1, 4)].root)


def test_an_impossible_mesh_is_refused_before_anything_is_written(release, tmp_path):
    with pytest.raises(PlacementError):
        plan(release, mesh=MeshShape(1, 16), out=tmp_path / "out")

    assert list(tmp_path.iterdir()) == []


# --- full and forbidden disks


def with_free(monkeypatch, nbytes: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=nbytes))


def test_what_does_not_fit_is_refused_before_a_byte_of_it_is_written(
    release, tmp_path, monkeypatch
):
    planned = plan(release, mesh=MeshShape(1, 2), out=tmp_path / "out")
    free = planned.bytes_out - 1
    with_free(monkeypatch, free)

    with pytest.raises(DiskFullError, match=f"{planned.bytes_out:,} bytes are needed, {free:,}"):
        reshard(release, planned)

    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_was_written_counts_when_a_run_goes_on(release, tmp_path, monkeypatch):
    monkeypatch.setattr("grokctl.reshard._SYNC_EVERY", SYNC_EVERY)
    planned = plan(release, mesh=MeshShape(1, 2), out=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        reshard(release, planned, observe=interrupt_at(80))
    missing = planned.bytes_out - bytes_up_to(planned, journalled(planned.out))
    with_free(monkeypatch, missing)

    reshard(release, planned)

    assert planned.out.is_dir()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_keeps_what_was_written(ready, release, tmp_path, monkeypatch, code):
    monkeypatch.setattr("grokctl.reshard._SYNC_EVERY", SYNC_EVERY)
    mesh, out = MeshShape(1, 2), tmp_path / "out"
    planned = plan(release, mesh=mesh, out=out)
    sync, calls = os.fdatasync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 6:
            raise OSError(code, os.strerror(code))
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr("os.fdatasync", full)
        with pytest.raises(DiskFullError, match="the disk is full; what was written is kept"):
            reshard(release, planned)
    assert journalled(out) > 0

    reshard(release, planned)

    assert contents(out) == contents(ready[mesh].root)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_a_usage_error(release, tmp_path, monkeypatch, code):
    def refuse(*_args, **_options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)

    with pytest.raises(UsageError, match="cannot be written") as caught:
        cut(release, MeshShape(1, 1), tmp_path / "out")

    assert caught.value.hint == "--out DIR writes elsewhere"


def test_a_file_is_no_folder_to_write_in(release, tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(UsageError, match="cannot be written"):
        cut(release, MeshShape(1, 1), tmp_path / "file" / "out")


def test_a_release_that_loses_a_file_on_the_way_is_no_disk_trouble(two_layers, tmp_path):
    release = open_release(two_layers)
    (two_layers / "ckpt-0/tensor00020_000").unlink()

    with pytest.raises(CorruptCheckpointError, match="tensor00020_000"):
        cut(release, MeshShape(1, 2), tmp_path / "out")


# --- manifests that cannot be meant


@pytest.fixture(scope="module")
def attacked(ready, tmp_path_factory) -> Path:
    """A copy whose manifest each test writes anew."""
    return shutil.copytree(
        ready[MeshShape(1, 2)].root, tmp_path_factory.mktemp("attacked") / "ready"
    )


@pytest.fixture(scope="module")
def manifest(attacked) -> dict:
    return json.loads((attacked / "grokctl.json").read_bytes())


def read_everything(checkpoint: ReadyCheckpoint) -> None:
    for tensor in logical_tensors(checkpoint)[:6]:
        checkpoint.read(tensor, tensor.slices(checkpoint.mesh, 0, checkpoint.config))


def at(*path):
    """Change one value of a manifest, or take it away."""

    def change(value):
        def apply(manifest):
            target = manifest
            for key in path[:-1]:
                target = target[key]
            if value is ...:
                del target[path[-1]]
            else:
                target[path[-1]] = value

        return apply

    return change


EMBEDDING, DOWN = "embedding.weight", "layers.0.moe.down.scales"
ATTACKS = {
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
    "no-tensors": at("tensors")({}),
    "tensors-list": at("tensors")([]),
    "tensor-gone": at("tensors", EMBEDDING)(...),
    "tensor-more": at("tensors", "other.weight")(
        {"shape": [1], "dtype": "F32", "slices": [[[0, 1]], [[0, 1]]]}
    ),
    "tensor-shape": at("tensors", EMBEDDING, "shape")([256, 65]),
    "tensor-dtype": at("tensors", EMBEDDING, "dtype")("BF16"),
    "tensor-null": at("tensors", EMBEDDING)(None),
    "scales-flat": at("tensors", DOWN, "shape")([8]),
    "scales-empty": at("tensors", DOWN, "shape")([]),
    "scales-text": at("tensors", DOWN, "shape")("88"),
    "scales-huge": at("tensors", DOWN, "shape")([8, 10**30, 64]),
    "scales-of-a-norm": at("tensors", "final_norm.scales")(
        {"shape": [1, 64], "dtype": "BF16", "slices": []}
    ),
    "slices-gone": at("tensors", EMBEDDING, "slices")(...),
    "slices-few": at("tensors", EMBEDDING, "slices")([]),
    "slices-one": at("tensors", EMBEDDING, "slices")([[[0, 128], [0, 64]]]),
    "slices-other": at("tensors", EMBEDDING, "slices", 0, 0)([0, 256]),
    "no-files": at("files")(...),
    "files-none": at("files")([]),
    "files-object": at("files")({}),
    "file-gone": at("files", 1)(...),
    "file-parent": at("files", 0, "name")("../device-00-of-02.safetensors"),
    "file-absolute": at("files", 0, "name")("/etc/passwd"),
    "file-hidden": at("files", 0, "name")(".."),
    "file-newline": at("files", 0, "name")("device-00-of-02.safetensors\n"),
    "file-other-mesh": at("files", 0, "name")("device-00-of-04.safetensors"),
    "file-infinite": at("files", 0, "bytes")(math.inf),
    "file-nan": at("files", 0, "bytes")(math.nan),
    "file-text-bytes": at("files", 0, "bytes")("many"),
    "file-null-bytes": at("files", 0, "bytes")(None),
    "file-no-sum": at("files", 0, "sha256")(...),
    "file-short-sum": at("files", 0, "sha256")("abc"),
    "file-more": at("files")(
        [{"name": "device-09.safetensors", "bytes": 1, "sha256": "0" * 64}] * 3
    ),
}


@pytest.mark.parametrize("attack", [pytest.param(ATTACKS[name], id=name) for name in ATTACKS])
def test_a_manifest_that_cannot_be_meant_is_refused(attacked, manifest, attack):
    changed = copy.deepcopy(manifest)
    attack(changed)
    (attacked / "grokctl.json").write_text(json.dumps(changed))

    with pytest.raises((CorruptCheckpointError, PlacementError)) as caught:
        open_ready(attacked)

    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


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
def test_a_manifest_that_is_none_is_refused(attacked, data):
    (attacked / "grokctl.json").write_bytes(data)

    with pytest.raises(CorruptCheckpointError, match=r"grokctl\.json: malformed"):
        open_ready(attacked)


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path):
    with pytest.raises(UsageError, match=r"holds no grokctl\.json"):
        open_ready(tmp_path)


def test_a_later_version_says_which_was_expected(attacked, manifest):
    (attacked / "grokctl.json").write_text(json.dumps({**manifest, "version": 2}))

    with pytest.raises(
        CorruptCheckpointError, match="expected grokctl-ready version 1, found"
    ) as e:
        open_ready(attacked)

    assert "install the grokctl that wrote it" in e.value.hint


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
    st.sampled_from(["../x", "/", "int8", "I8", "a" * 5000, "1"]),
    st.lists(st.integers(-1, 3), max_size=4),
    st.dictionaries(st.sampled_from(["shape", "expert", "name"]), st.integers(0, 3), max_size=2),
)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_no_manifest_makes_anything_but_our_own_errors(attacked, manifest, data):
    changed = copy.deepcopy(manifest)
    short = {**changed, "tensors": {key: changed["tensors"][key] for key in (EMBEDDING, DOWN)}}
    places = [path for path in paths_in(short) if path]
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places))
        value = data.draw(st.one_of(JUNK, st.just(...)))
        try:
            at(*path)(value)(changed)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took that place away
    (attacked / "grokctl.json").write_text(json.dumps(changed))

    with suppress(GrokctlError):
        read_everything(open_ready(attacked))


# --- device files that are not there, or not the ones


@pytest.fixture
def damaged(ready, tmp_path) -> Path:
    return shutil.copytree(ready[MeshShape(1, 2)].root, tmp_path / "damaged")


FIRST = "device-00-of-02.safetensors"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(Path.unlink, Reason.MISSING, id="missing"),
        pytest.param(lambda path: os.truncate(path, 0), Reason.SHORT, id="empty"),
        pytest.param(
            lambda path: os.truncate(path, path.stat().st_size - 1), Reason.SHORT, id="short"
        ),
        pytest.param(
            lambda path: os.truncate(path, path.stat().st_size + 1), Reason.LONG, id="long"
        ),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), Reason.UNREADABLE, id="folder"),
        pytest.param(
            lambda path: (path.unlink(), path.symlink_to("nowhere")),
            Reason.UNREADABLE,
            id="link",
        ),
    ],
)
def test_a_device_file_that_is_not_as_it_was_written_is_named(damaged, damage, reason):
    damage(damaged / FIRST)

    with pytest.raises(CorruptCheckpointError) as caught:
        open_ready(damaged)

    assert [(item.file, item.reason) for item in caught.value.damage] == [(FIRST, reason)]
    assert caught.value.hint.startswith("grokctl reshard two-layers --")
    assert caught.value.hint.endswith("--force")


@pytest.mark.parametrize("offset", [0, 7, 8, 100])
def test_an_altered_header_is_noticed_before_anything_is_read(damaged, offset):
    data = bytearray((damaged / FIRST).read_bytes())
    data[offset] ^= 1
    (damaged / FIRST).write_bytes(data)
    checkpoint = open_ready(damaged)

    with pytest.raises(CorruptCheckpointError, match="its header is not that of device 0 of"):
        read_everything(checkpoint)


def test_a_device_file_of_the_same_size_from_another_release_passes_only_the_quick_check(
    damaged,
):
    path = damaged / FIRST
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    checkpoint = open_ready(damaged)

    assert [item.file for item in verify_ready(checkpoint).damage] == [FIRST]
