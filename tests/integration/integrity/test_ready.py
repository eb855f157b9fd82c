import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from damaging import break_disk, flip, found

from grokctl.checkpoint.ready import SUMS, open_ready, read_manifest
from grokctl.checkpoint.release import open_release
from grokctl.errors import CorruptCheckpointError, Reason
from grokctl.model.placement import MeshShape
from grokctl.paths import MANIFEST
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard
from grokctl.verify import raise_for, verify_ready


@pytest.fixture(scope="module")
def ready_pristine(pristine, tmp_path_factory) -> Path:
    release = open_release(pristine.root)
    out = tmp_path_factory.mktemp("ready") / "ready"
    reshard(plan_reshard(release, ReshardOptions(mesh=MeshShape(2, 2), out=out)))
    return out


def test_a_whole_ready_checkpoint_is_whole(ready_pristine):
    checkpoint = open_ready(ready_pristine)

    verdict = verify_ready(checkpoint, rehash=True)

    assert verdict.damage == ()
    assert verdict.verified is None
    assert verdict.files == 4
    assert verdict.hashed == verdict.nbytes == checkpoint.nbytes


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_flipped_bit_in_each_file_of_a_ready_checkpoint_is_found(ready_pristine, tmp_path, jobs):
    root = shutil.copytree(ready_pristine, tmp_path / "ready")
    checkpoint = open_ready(root)
    for record in checkpoint.files:
        for offset in (0, record.nbytes // 2, record.nbytes - 1):
            flip(root / record.name, offset)
            (damage,) = verify_ready(checkpoint, jobs=jobs).damage
            flip(root / record.name, offset)

            assert damage.file == record.name
            assert damage.reason is Reason.ALTERED
            assert damage.ranges == ((0, record.nbytes),)
    assert verify_ready(checkpoint, jobs=jobs).damage == ()


def test_every_kind_of_damage_to_a_ready_checkpoint_is_listed(ready_pristine, tmp_path):
    root = shutil.copytree(ready_pristine, tmp_path / "ready")
    altered, missing, short, no_file = (record.name for record in read_manifest(root).files)
    nbytes = {record.name: record.nbytes for record in read_manifest(root).files}
    flip(root / altered, 9)
    (root / missing).unlink()
    os.truncate(root / short, 100)
    (root / no_file).unlink()
    os.mkfifo(root / no_file)

    verdict = verify_ready(read_manifest(root))

    assert {name: (item.reason, item.ranges) for name, item in found(verdict).items()} == {
        altered: (Reason.ALTERED, ((0, nbytes[altered]),)),
        missing: (Reason.MISSING, ((0, nbytes[missing]),)),
        short: (Reason.SHORT, ((100, nbytes[short]),)),
        no_file: (Reason.UNREADABLE, ((0, nbytes[no_file]),)),
    }
    assert verdict.hashed == nbytes[altered]
    quick = found(verify_ready(read_manifest(root), quick=True))
    assert set(quick) == {missing, short, no_file}
    with pytest.raises(CorruptCheckpointError) as caught:
        raise_for(verdict, root)
    again = f"grokctl reshard small --mesh expert=2,model=2 --out {root} --force"
    assert caught.value.hint == again


def test_a_device_file_that_is_too_long_is_damage_and_a_disk_that_fails_is_hardware(
    ready_pristine, tmp_path, monkeypatch
):
    root = shutil.copytree(ready_pristine, tmp_path / "ready")
    long, refused, *_ = read_manifest(root).files
    with (root / long.name).open("ab") as file:
        file.write(b"xyz")
    damage = found(verify_ready(read_manifest(root)))
    break_disk(monkeypatch, refused.name, refused.nbytes // 2)

    with pytest.raises(OSError, match="Input/output error") as caught:
        verify_ready(read_manifest(root), rehash=True)

    assert caught.value.filename == str(root / refused.name)
    assert damage[long.name].reason is Reason.LONG
    assert damage[long.name].ranges == ((long.nbytes, long.nbytes + 3),)
    assert len(damage) == 1


def test_sha256sum_agrees_about_every_file_of_a_ready_checkpoint(ready_pristine, tmp_path):
    root = shutil.copytree(ready_pristine, tmp_path / "ready")
    second = read_manifest(root).files[1].name

    def sums():
        command = ["sha256sum", "--check", SUMS]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    whole = sums()
    flip(root / second, 1000)
    damaged = sums()

    assert whole.returncode == 0
    assert {f"{record.name}: OK" for record in read_manifest(root).files} <= set(
        whole.stdout.splitlines()
    )
    assert damaged.returncode != 0
    assert [line for line in damaged.stdout.splitlines() if not line.endswith(": OK")] == [
        f"{second}: FAILED"
    ]
    assert set(found(verify_ready(read_manifest(root)))) == {second}


def test_all_damaged_files_of_a_ready_checkpoint_are_listed(ready_pristine, tmp_path):
    root = shutil.copytree(ready_pristine, tmp_path / "ready")
    checkpoint = open_ready(root)
    for record in checkpoint.files:
        flip(root / record.name, 9)

    verdict = verify_ready(checkpoint)

    assert [damage.file for damage in verdict.damage] == [file.name for file in checkpoint.files]
    with pytest.raises(CorruptCheckpointError, match="4 of 4 files are damaged"):
        raise_for(verdict, root)


@pytest.mark.parametrize(
    "forge",
    [
        pytest.param(lambda data: data[:7] + b"\x80" + data[8:], id="length of 2**63"),
        pytest.param(lambda data: data.replace(b'"I8"', b'"U8"', 1), id="dtype"),
        pytest.param(lambda data: data.replace(b"[0,", b"[8,", 1), id="hole"),
    ],
)
def test_a_header_that_no_command_reads_is_damage_whatever_the_sums_say(
    ready_pristine, tmp_path, forge
):
    root = shutil.copytree(ready_pristine, tmp_path / "ready")
    record = read_manifest(root).files[1]
    path = root / record.name
    path.write_bytes(forge(path.read_bytes()))
    resum(root, {record.sha256: sha256(path)})
    resum(root, {sha256(ready_pristine / MANIFEST): sha256(root / MANIFEST)}, [SUMS])

    verdict = verify_ready(read_manifest(root))
    again = verify_ready(read_manifest(root))  # with a receipt

    assert [(item.file, item.reason) for item in verdict.damage] == [(record.name, Reason.ALTERED)]
    assert "header" in verdict.damage[0].detail
    assert again.damage == verdict.damage
    assert not verify_ready(read_manifest(root), quick=True).damage


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def resum(root, sums, names=(MANIFEST, SUMS)):
    """Write other sums into the records of a ready checkpoint."""
    for name in names:
        text = (root / name).read_text()
        for old, new in sums.items():
            text = text.replace(old, new)
        (root / name).write_text(text)
