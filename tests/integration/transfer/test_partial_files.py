"""What other programs began to download is used, wherever a piece begins and ends."""

import shutil
from types import SimpleNamespace

import pytest

from grokctl.errors import DiskFullError
from grokctl.events import Noted
from grokctl.fetch import fetch, plan_fetch

SUFFIXES = (".!qB", ".part", ".incomplete")


@pytest.fixture
def root(swarm, tmp_path):
    """All of the release, nothing of it under its own name."""
    root = tmp_path / "theirs"
    shutil.copytree(swarm.root, root)
    for number, name in enumerate(swarm.files):
        (root / name).rename(root / f"{name}{SUFFIXES[number % len(SUFFIXES)]}")
    return root


def full_disk(monkeypatch, free=0):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def content(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def check(planned, name):
    (found,) = [check for check in planned.checks if check.name == name]
    return found


def test_files_that_share_their_pieces_are_all_used_and_need_no_room(swarm, root, monkeypatch):
    (root / "ckpt-0").joinpath(".keep").write_bytes(b"")
    before, events = content(root), []
    full_disk(monkeypatch)

    planned = plan_fetch(swarm.magnet, root, swarm.options(force=True))
    assert content(root) == before
    fetched = fetch(swarm.magnet, root, swarm.options(force=True), observe=events.append)

    assert planned.fits, check(planned, "disk").detail
    assert planned.fitting == (swarm.metainfo.num_pieces,) * 2
    assert fetched.downloaded == 0
    assert not [e for e in events if isinstance(e, Noted) and "not used" in e.message]
    (root / "ckpt-0/.keep").unlink()
    swarm.assert_arrived(root)


def test_a_file_with_two_forms_is_used_with_the_form_of_its_neighbour_that_fits(swarm, root):
    for name in swarm.files:
        for suffix in SUFFIXES[:2]:
            beside = root / f"{name}{suffix}"
            if not beside.exists():
                beside.write_bytes(b"\xff" * 100)

    fetched = fetch(swarm.magnet, root, swarm.options(force=True))

    assert fetched.downloaded == 0
    assert not list(root.rglob("*.incomplete"))


def test_a_small_file_between_names_of_both_kinds_is_used(swarm, root):
    for number, name in enumerate(swarm.files):
        if number % 2:
            (root / f"{name}{SUFFIXES[number % len(SUFFIXES)]}").rename(root / name)

    assert fetch(swarm.magnet, root, swarm.options(force=True)).downloaded == 0
    swarm.assert_arrived(root)


def test_other_bytes_under_such_a_name_stay_and_need_room(swarm, root, monkeypatch):
    last = swarm.files[-1]
    (beside,) = root.glob(f"{last}.*")
    beside.write_bytes(bytes(beside.stat().st_size))
    with monkeypatch.context() as patch:
        full_disk(patch)
        planned = plan_fetch(swarm.magnet, root, swarm.options(force=True))
        with pytest.raises(DiskFullError):
            fetch(swarm.magnet, root, swarm.options(force=True))

    assert not planned.fits
    assert beside.exists()


def test_the_form_that_fits_is_used_of_one_file(swarm, tmp_path):
    root, name = tmp_path / "theirs", "ckpt-0/tensor00003_000"
    shutil.copytree(swarm.root, root)
    data = (root / name).read_bytes()
    (root / name).rename(root / f"{name}.part")
    (root / f"{name}.!qB").write_bytes(bytes(len(data)))

    fetched = fetch(swarm.magnet, root, swarm.options(force=True))

    assert fetched.downloaded == 0
    assert (root / f"{name}.!qB").exists()
    assert (root / name).read_bytes() == data
