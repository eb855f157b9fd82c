"""Device files that anybody can read, destinations that cannot be written, files that changed."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from cuts import contents, cut, header_of, interrupt_at, journal_of, kept_by, partial_of
from golden import load_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.frames import Compression
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.ready import ReadyCheckpoint, open_ready
from grokctl.checkpoint.receipt import Receipt, Stamp
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.tensor_source import ReleaseSource
from grokctl.errors import (
    CorruptCheckpointError,
    DiskFullError,
    PlacementError,
    Reason,
    UsageError,
)
from grokctl.events import Advanced, Noted, Stage
from grokctl.integrity.published import verify_ready
from grokctl.marks import MARK
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard

MESHES = [MeshShape(1, 1), MeshShape(1, 2), MeshShape(1, 4), MeshShape(1, 8), MeshShape(2, 8)]
ALL_MESHES = [pytest.param(mesh, id=mesh.slug) for mesh in MESHES]


@pytest.fixture(scope="module")
def release():
    return load_golden("two-layers").release


@pytest.fixture(scope="module")
def ready(release, tmp_path_factory) -> dict[MeshShape, ReadyCheckpoint]:
    """One for each mesh; read only."""
    folder = tmp_path_factory.mktemp("ready")
    return {mesh: cut(release, mesh, folder / mesh.slug) for mesh in MESHES}


# --- device files


@pytest.mark.parametrize("mesh", ALL_MESHES)
def test_device_files_are_plain_safetensors_files(ready, release, mesh):
    checkpoint, source = ready[mesh], ReleaseSource(release)
    tensors = {tensor.key: tensor for tensor in source.storage.tensors}

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
    planned = plan_reshard(release, ReshardOptions(mesh=mesh, out=Path("unused")))
    checkpoint = ready[mesh]
    on_disk = sum(path.stat().st_size for path in checkpoint.root.glob("device-*"))

    source = ReleaseSource(release)
    payload = sum(
        prod(stop - start for start, stop in tensor.slices(mesh, device, release.config))
        * tensor.dtype.itemsize
        for tensor in source.storage.tensors
        for device in range(mesh.size)
    )
    headers = sum(header_of(checkpoint.root / record.name)[0] for record in checkpoint.files)
    assert on_disk == planned.bytes_out == checkpoint.nbytes == payload + headers
    stored = sum(prod(t.shape) * t.dtype.itemsize for t in source.storage.tensors)
    assert planned.bytes_in == stored


@pytest.mark.parametrize("mesh", ALL_MESHES)
def test_the_sums_are_right_and_cover_every_other_file(ready, mesh):
    root = ready[mesh].root
    lines = (root / "SHA256SUMS").read_text().splitlines()
    sums = dict(re.fullmatch(r"([0-9a-f]{64})  (\S+)", line).groups()[::-1] for line in lines)

    assert set(sums) == {path.name for path in root.iterdir()} - {"SHA256SUMS", ".grokctl"}
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
        "name": "two-layers", "infohash": None, "proven": False, "verified_at": None,
        "precision": "int8",
    }  # fmt: skip
    source = ReleaseSource(release)
    assert list(manifest["tensors"]) == [tensor.key for tensor in source.storage.tensors]
    for tensor in source.storage.tensors:
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
    files = [path for path in release.root.rglob("*") if path.is_file()]
    stamps = {path.relative_to(release.root).as_posix(): Stamp.of(path) for path in files}
    proof = Receipt(infohash="ab" * 20, verified_at="2024-03-17T12:00:00Z", stamps=stamps)

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
            for tensor in source.storage.tensors:
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
    tensor = data.draw(st.sampled_from(source.storage.tensors))
    slices = tuple(
        (low := data.draw(st.integers(0, length - 1)), data.draw(st.integers(low + 1, length)))
        for length in tensor.shape
    )
    whole = ready[MeshShape(1, 1)].read(tensor, tuple((0, length) for length in tensor.shape))

    part = checkpoint.read(tensor, slices)

    np.testing.assert_array_equal(part, whole[tuple(slice(*bounds) for bounds in slices)])


def test_what_one_file_holds_is_a_view_of_it(ready, release):
    checkpoint = ready[MeshShape(2, 8)]
    for tensor in ReleaseSource(release).storage.tensors:
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
    tensor = checkpoint.storage.tensors[0]

    with pytest.raises(CorruptCheckpointError, match="the header is not that of device 0") as error:
        checkpoint.read(tensor, tensor.slices(checkpoint.mesh, 0, release.config))

    assert error.value.damage[0].file == first.name


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
        make_file, make_folder, make_release,
        lambda path: path.symlink_to("nowhere"),
    ],
    ids=["file", "folder", "release", "broken-link"],
)  # fmt: skip
@pytest.mark.parametrize("force", [False, True])
def test_nothing_else_is_ever_replaced(release, tmp_path, make, force):
    out = tmp_path / "out"
    make(out)
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(UsageError, match=r"exists|is a symbolic link"):
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
    out, rename = tmp_path / "out", os.rename
    cut(release, MeshShape(1, 2), out)

    def die(path, target, **folders):
        if target == out.name:
            raise KeyboardInterrupt
        return rename(path, target, **folders)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            cut(release, MeshShape(1, 4), out, force=True)
    events = []
    cut(release, MeshShape(1, 4), out, force=True, observe=events.append)

    assert kept_by(events) == len(
        plan_reshard(release, ReshardOptions(mesh=MeshShape(1, 4), out=out)).storage.tensors
    )
    assert contents(out) == contents(ready[MeshShape(1, 4)].root)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_impossible_mesh_is_refused_before_anything_is_written(release, tmp_path):
    with pytest.raises(PlacementError):
        plan_reshard(release, ReshardOptions(mesh=MeshShape(1, 16), out=tmp_path / "out"))

    assert list(tmp_path.iterdir()) == []


# --- full and forbidden disks


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root can mount a small disk here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of a quarter of a megabyte."""
    with mounted(tmp_path / "disk", "size=256k") as folder:
        yield folder


@pytest.fixture
def read_only_disk(tmp_path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "size=64k,ro") as folder:
        yield folder


def with_free(monkeypatch, nbytes: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=nbytes))


def test_what_does_not_fit_is_refused_before_a_byte_of_it_is_written(
    release, tmp_path, monkeypatch
):
    planned = plan_reshard(release, ReshardOptions(mesh=MeshShape(1, 2), out=tmp_path / "out"))
    free = planned.bytes_out - 1
    with_free(monkeypatch, free)

    with pytest.raises(
        DiskFullError, match=f"expected {planned.bytes_out:,} bytes free, found {free:,}"
    ):
        reshard(planned)

    assert list(tmp_path.iterdir()) == []


def test_what_was_written_counts_when_a_run_goes_on(release, tmp_path, monkeypatch):
    planned = plan_reshard(release, ReshardOptions(mesh=MeshShape(1, 2), out=tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):
        reshard(planned, observe=interrupt_at(40))
    assert journal_of(planned.out)
    files = [path for path in partial_of(planned.out).iterdir() if path.name != MARK]
    kept = sum(path.stat().st_size for path in files)
    with_free(monkeypatch, planned.bytes_out - kept)

    reshard(planned)

    assert planned.out.is_dir()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_keeps_what_was_written(ready, release, tmp_path, monkeypatch, code):
    mesh, out = MeshShape(1, 2), tmp_path / "out"
    planned = plan_reshard(release, ReshardOptions(mesh=mesh, out=out))
    write, written = os.pwrite, []

    def full(handle, data, offset):
        if sum(written) > planned.bytes_out // 2:
            raise OSError(code, os.strerror(code))
        written.append(write(handle, data, offset))
        return written[-1]

    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", full)
        with pytest.raises(DiskFullError, match=os.strerror(code)):
            reshard(planned)
    done, events = len(journal_of(out)), []
    assert done > 0
    assert not out.exists()

    reshard(planned, observe=events.append)

    assert kept_by(events) == done
    assert contents(out) == contents(ready[mesh].root)


@pytest.mark.parametrize("compression", [None, Compression(1)], ids=str)
def test_a_small_disk_really_fills_up_and_with_more_room_it_goes_on(
    release, tmp_path, small_disk, compression
):
    mesh = MeshShape(1, 2)
    planned = plan_reshard(
        release, ReshardOptions(mesh=mesh, out=small_disk / "out", compression=compression)
    )

    with pytest.raises(DiskFullError) as caught:
        reshard(planned)
    assert not planned.out.exists()
    if compression is None:
        assert " free, found " in str(caught.value)
        assert list(small_disk.iterdir()) == []
    else:
        assert journal_of(planned.out)
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    events = []
    reshard(planned, observe=events.append)

    assert bool(kept_by(events)) == bool(compression)
    direct = cut(release, mesh, tmp_path / "direct", compression=compression)
    assert contents(planned.out) == contents(direct.root)


def test_a_disk_that_nobody_can_write_to_is_a_usage_error(release, read_only_disk):
    with pytest.raises(UsageError, match="Read-only file system"):
        cut(release, MeshShape(1, 1), read_only_disk / "out")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG])
def test_a_folder_that_cannot_be_written_is_a_usage_error(release, tmp_path, monkeypatch, code):
    def refuse(*_args, **_options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)

    with pytest.raises(UsageError, match=os.strerror(code)) as caught:
        cut(release, MeshShape(1, 1), tmp_path / "out")

    assert caught.value.hint.startswith("ls -ld ")


def test_a_file_is_no_folder_to_write_in(release, tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(UsageError, match="Not a directory"):
        cut(release, MeshShape(1, 1), tmp_path / "file" / "out")


# --- sources that change while they are read


def at_first_progress(act):
    """An observer that acts once, when cutting has begun."""
    pending = [act]

    def observe(event):
        if isinstance(event, Advanced) and event.stage is Stage.RESHARD and pending:
            pending.pop()()

    return observe


def flip(path, offset=-1):
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


LATE = "tensor00023_000"


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(Path.unlink, id="gone"),
        pytest.param(lambda path: os.truncate(path, 0), id="empty"),
        pytest.param(lambda path: os.truncate(path, path.stat().st_size // 2), id="half"),
        pytest.param(flip, id="altered"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()), id="written again"),
    ],
)
def test_a_release_that_changes_on_the_way_is_never_published(
    two_layers, tmp_path, change, precision
):
    release = open_release(two_layers)
    path = two_layers / "ckpt-0" / LATE

    with pytest.raises(CorruptCheckpointError) as caught:
        cut(
            release,
            MeshShape(1, 2),
            tmp_path / "out",
            observe=at_first_progress(lambda: change(path)),
            precision=precision,
            jobs=1,
        )

    assert LATE in caught.value.damage[0].file
    assert caught.value.damage[0].reason is Reason.ALTERED
    assert not (tmp_path / "out").exists()


def test_a_release_that_loses_a_file_on_the_way_is_no_disk_trouble(two_layers, tmp_path):
    release = open_release(two_layers)
    (two_layers / "ckpt-0/tensor00020_000").unlink()

    with pytest.raises(CorruptCheckpointError, match="tensor00020_000"):
        cut(release, MeshShape(1, 2), tmp_path / "out")


def damaged_frame(path):
    flip(path, path.stat().st_size // 2)


@pytest.mark.parametrize("compression", [None, Compression(1)], ids=str)
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(Path.unlink, id="gone"),
        pytest.param(lambda path: os.truncate(path, 100), id="short"),
        pytest.param(lambda path: os.truncate(path, path.stat().st_size // 2), id="half"),
        pytest.param(lambda path: flip(path, 20), id="header"),
    ],
)
def test_a_ready_checkpoint_that_is_damaged_is_no_source(release, tmp_path, damage, compression):
    root = cut(release, MeshShape(1, 4), tmp_path / "source", compression=compression).root
    source = open_ready(root, is_streamed=True)
    name = source.files[2].name
    damage(root / name)

    with pytest.raises(CorruptCheckpointError) as caught:
        cut(source, MeshShape(1, 2), tmp_path / "out")

    assert caught.value.damage[0].file == name
    assert not (tmp_path / "out").exists()


def test_a_frame_that_is_damaged_is_never_cut_on(release, tmp_path):
    root = cut(release, MeshShape(1, 4), tmp_path / "source", compression=Compression(1)).root
    source = open_ready(root, is_streamed=True)
    name = source.files[1].name
    damaged_frame(root / name)

    with pytest.raises(CorruptCheckpointError, match=r"frame \d+ is damaged") as caught:
        cut(source, MeshShape(1, 2), tmp_path / "out")

    assert caught.value.damage[0].file == name
    assert "grokctl verify" in caught.value.hint
    assert [item.file for item in verify_ready(source).damage] == [name]


def test_a_checkpoint_does_not_replace_itself(release, tmp_path):
    source = cut(release, MeshShape(1, 2), tmp_path / "out")
    before = contents(tmp_path / "out")

    for force in (False, True):
        with pytest.raises(UsageError):
            cut(source, MeshShape(1, 4), tmp_path / "out", force=force)

    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- device files that are not there, or not the ones


@pytest.fixture
def damaged(ready, tmp_path) -> Path:
    return shutil.copytree(ready[MeshShape(1, 2)].root, tmp_path / "damaged")


FIRST = "device-00-of-02.safetensors"


def read_everything(checkpoint: ReadyCheckpoint) -> None:
    for tensor in checkpoint.storage.tensors[:6]:
        checkpoint.read(tensor, tensor.slices(checkpoint.mesh, 0, checkpoint.config))


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

    with pytest.raises(CorruptCheckpointError, match="the header is not that of device 0 of"):
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


def test_what_other_runs_left_beside_it_is_named_and_stays(release, tmp_path):
    left = [tmp_path / f".out.{name}" for name in ("0123.partial", "4567.replaced")]
    for folder in left:
        folder.mkdir()
    events = []

    cut(release, MeshShape(1, 2), tmp_path / "out", observe=events.append)

    noted = [event.message for event in events if isinstance(event, Noted)]
    for folder in left:
        assert folder.is_dir()
        assert any(f"rm -r {folder}" in message for message in noted)
