"""A dry run counts the room of the work itself, and changes nothing, in no folder."""

import os
import shutil
from pathlib import Path

import pytest
from mounts import tmpfs

TENSOR = "ckpt-0/tensor00003_000"
PLAN = ("--repair", "--dry-run", "--json")


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A home for the proofs of one test."""
    monkeypatch.setenv("GROKCTL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def copied(seeded, root: Path) -> Path:
    for name in seeded.files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(seeded.root / name, root / name)
    return root


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def everything(*folders):
    """Each name with what a change of any kind would change."""
    return {
        path: (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        for folder in folders
        for path in (folder, *folder.rglob("*"))
        if path.exists() and (status := path.lstat())
    }


def foreign(grokctl, seeded, root):
    del grokctl
    return (copied(seeded, root), "--torrent-file", seeded.torrent)


def flat(grokctl, seeded, root):
    del grokctl
    (copied(seeded, root) / "ckpt-0").rename(root / "ckpt")
    return (root, "--torrent-file", seeded.torrent)


def proven_under_home(grokctl, seeded, root):
    named = foreign(grokctl, seeded, root)
    assert grokctl("verify", *named).exit_code == 0
    return (root,)


def with_a_torrent(grokctl, seeded, root):
    named = foreign(grokctl, seeded, root)
    shutil.copyfile(seeded.torrent, root / "release.torrent")
    return named


def proven_there(grokctl, seeded, root):
    with_a_torrent(grokctl, seeded, root)
    assert grokctl("verify", root, "--json").exit_code == 0
    return (root,)


@pytest.mark.parametrize(
    "prepare", [foreign, flat, proven_under_home, with_a_torrent, proven_there]
)
def test_a_dry_repair_changes_nothing(grokctl, seeded, tmp_path, own, prepare):
    root = tmp_path / "theirs"
    named = prepare(grokctl, seeded, root)
    (tensor,) = root.rglob("tensor00003_000")
    damage(tensor)
    before = everything(root, own)

    planned = grokctl("verify", *named, *PLAN)

    assert everything(root, own) == before
    assert planned.exit_code == 20, planned.stderr
    assert [item["file"] for item in planned.result["damage"]] == [TENSOR]
    assert planned.result["repair"]["fits"]
    is_linked = prepare is flat
    assert bool(planned.result["repair"]["copied_bytes"]) == is_linked


def test_a_dry_repair_spares_what_was_proven_under_home(grokctl, seeded, tmp_path, own):
    root = tmp_path / "theirs"
    named = proven_under_home(grokctl, seeded, root)
    damage(root / TENSOR)
    before = everything(root, own)

    planned = grokctl("verify", *named, *PLAN)

    assert planned.result["spared_files"] == len(seeded.files) - 1
    assert everything(root, own) == before


@pytest.fixture
def linked(seeded, tmp_path):
    """A disk with a release of links to another disk, and one damaged target."""
    blobs = copied(seeded, tmp_path / "blobs")
    damage(blobs / TENSOR)
    with tmpfs(tmp_path / "disk", "size=64m") as disk:
        root = disk / "release"
        for name in seeded.files:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(blobs / name)
        shutil.copyfile(seeded.torrent, root / "release.torrent")
        yield root, blobs / TENSOR


def fill(disk, free):
    """Leave so many bytes on a disk in memory."""
    status = os.statvfs(disk)
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - free)


@pytest.mark.usefixtures("own")
def test_a_repair_of_links_needs_the_room_that_its_plan_names(grokctl, linked, seeded, loopback):
    root, target = linked
    plan = grokctl("verify", root, *PLAN).result["repair"]
    fill(root.parent, plan["required_bytes"] - 4096)
    repair = ("verify", root, "--repair", *loopback, "--peer", seeded.peer)

    full = grokctl("verify", root, *PLAN)
    refused = grokctl(*repair)
    was_link = (root / TENSOR).is_symlink()
    (root.parent / "filler").unlink()
    fill(root.parent, plan["required_bytes"] + 2**17)  # and grokctl's own files
    mended = grokctl(*repair)

    assert plan["copied_bytes"] == target.stat().st_size
    assert plan["required_bytes"] >= plan["copied_bytes"] + plan["kept_bytes"]
    assert (full.exit_code, full.result["repair"]["fits"]) == (12, False)
    assert refused.exit_code == 12
    assert was_link
    assert mended.exit_code == 0, mended.stderr


@pytest.mark.usefixtures("own")
def test_a_takeover_needs_the_room_that_its_plan_names(grokctl, seeded, loopback, tmp_path):
    with tmpfs(tmp_path / "disk", "size=64m") as disk:
        root = copied(seeded, disk / "theirs")
        (root / TENSOR).write_bytes(os.urandom((root / TENSOR).stat().st_size))
        adopt = ("fetch", seeded.torrent, "--to", root, "--force", *loopback)
        nbytes = (root / TENSOR).stat().st_size
        fill(disk, nbytes // 2)

        planned = grokctl(*adopt, "--dry-run", "--json")
        refused = grokctl(*adopt, "--peer", seeded.peer)

    (check,) = [check for check in planned.result["checks"] if check["name"] == "disk"]
    assert planned.exit_code == refused.exit_code == 12
    assert check["status"] == "fail"
    assert not planned.result["fits"]
