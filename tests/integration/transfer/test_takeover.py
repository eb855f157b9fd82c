"""A folder of others is taken over by `force`: its bytes stay, whatever happens on the way."""

import os
import shutil
from types import SimpleNamespace

import pytest

from grokctl.checkpoint.adoption import is_adopting
from grokctl.checkpoint.finding import find_checkpoint
from grokctl.checkpoint.proving import root_to_prove
from grokctl.errors import DiskFullError, FetchError
from grokctl.events import Noted, Stage, Started
from grokctl.fetch import fetch, plan_fetch
from grokctl.integrity import backup
from grokctl.integrity.backup import begun_nbytes
from grokctl.paths import Home
from grokctl.repair import repair
from grokctl.transfer.destination import fetch_lock
from grokctl.verify import verify

TENSOR, OTHER = "ckpt-0/tensor00003_000", "ckpt-0/tensor00004_000"


@pytest.fixture
def theirs(swarm, tmp_path):
    """Two files of another release where ours belong, the second too long; and their bytes."""
    root = tmp_path / "theirs"
    shutil.copytree(swarm.root, root)
    content = {}
    for name, more in ((TENSOR, 0), (OTHER, 5)):
        content[name] = os.urandom((swarm.root / name).stat().st_size + more)
        (root / name).write_bytes(content[name])
    return root, content


def assert_kept(root, content):
    """Every byte that was overwritten lies in one of the folders, at its own offset."""
    kept = [path for path in (root / ".grokctl" / "replaced").iterdir() if path.is_dir()]
    assert not [folder for folder in kept if folder.name.endswith(".begun")]
    for name, data in content.items():
        assert any(
            (folder / name).is_file() and (folder / name).read_bytes() == data for folder in kept
        ), name


def interrupted_by(predicate):
    def observe(event):
        if predicate(event):
            raise KeyboardInterrupt

    return observe


def hashing(event):
    return isinstance(event, Started) and event.stage is Stage.VERIFY


def counted(event):
    return isinstance(event, Noted) and "pieces on disk" in event.message


def interrupt(predicate):
    def run(swarm, root, monkeypatch):
        del monkeypatch
        with pytest.raises(KeyboardInterrupt):
            fetch(swarm.magnet, root, swarm.options(force=True), observe=interrupted_by(predicate))

    return run


def lock(swarm, root, monkeypatch):
    del monkeypatch
    (root / ".grokctl").mkdir()
    with fetch_lock(root), pytest.raises(FetchError, match="another grokctl"):
        fetch(swarm.magnet, root, swarm.options(force=True))


def fill(swarm, root, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(DiskFullError, match="for backup"):
            fetch(swarm.magnet, root, swarm.options(force=True))


def kill_copying(swarm, root, monkeypatch):
    """As a kill would: nothing is cleaned up, and only the first file is copied."""
    real, calls = backup._copy, []

    def copy(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(real(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(backup, "_copy", copy)
        patch.setattr(backup, "delete_in", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            fetch(swarm.magnet, root, swarm.options(force=True))
    assert list((root / ".grokctl" / "replaced").glob("*.begun"))
    assert begun_nbytes(root) > 0
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        planned = plan_fetch(swarm.magnet, root, swarm.options())
    assert planned.free_nbytes == begun_nbytes(root)
    assert planned.fitting is not None


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(interrupt(hashing), id="interrupted-while-it-hashes"),
        pytest.param(interrupt(counted), id="interrupted-before-it-copies"),
        pytest.param(lock, id="locked"),
        pytest.param(fill, id="no-room"),
        pytest.param(kill_copying, id="killed-while-it-copies"),
    ],
)
def test_what_differs_is_kept_after_a_takeover_that_did_not_finish(
    swarm, theirs, monkeypatch, stop, force
):
    root, content = theirs

    stop(swarm, root, monkeypatch)
    untouched = {name: (root / name).read_bytes() for name in content}
    fetch(swarm.magnet, root, swarm.options(force=force))

    assert untouched == content
    assert_kept(root, content)
    assert not is_adopting(root)
    swarm.assert_arrived(root)


def test_links_are_still_read_after_a_takeover_that_did_not_finish(swarm, theirs, tmp_path):
    root, content = theirs
    aside = tmp_path / "aside"
    (root / TENSOR).rename(aside)
    (root / TENSOR).symlink_to(aside)

    interrupt(hashing)(swarm, root, None)
    fetch(swarm.magnet, root, swarm.options())

    assert aside.read_bytes() == content[TENSOR]
    assert_kept(root, content)
    swarm.assert_arrived(root)


def test_files_that_the_first_takeover_left_out_are_kept_by_the_next_fetch(swarm, theirs):
    root, content = theirs

    fetch(swarm.magnet, root, swarm.options(force=True, only=("tensor00000*",)))
    assert {name: (root / name).read_bytes() for name in content} == content
    fetch(swarm.magnet, root, swarm.options())

    assert_kept(root, content)
    assert not is_adopting(root)
    swarm.assert_arrived(root)


def test_a_repair_after_a_takeover_that_did_not_finish_keeps_what_differs(swarm, theirs):
    root, content = theirs

    interrupt(hashing)(swarm, root, None)
    repaired = repair(root, verify(root), swarm.options())

    assert repaired.verdict.damage == ()
    assert_kept(root, content)
    assert not is_adopting(root)


def test_a_torrent_of_theirs_is_kept_too(swarm, theirs):
    root, content = theirs
    (root / "release.torrent").write_bytes(b"another torrent")

    fetch(swarm.magnet, root, swarm.options(force=True))

    assert_kept(root, content)
    (kept,) = (root / ".grokctl" / "replaced").glob("release.torrent*")
    assert kept.read_bytes() == b"another torrent"


def test_what_differs_beside_the_right_torrent_is_kept(swarm, theirs):
    root, content = theirs
    (root / "release.torrent").write_bytes(swarm.torrent)

    fetch(swarm.magnet, root, swarm.options())

    assert_kept(root, content)
    swarm.assert_arrived(root)


def test_what_differs_is_kept_by_a_fetch_after_a_repair_that_did_not_finish(
    swarm, theirs, tmp_path
):
    root, content = theirs
    given = tmp_path / "given.torrent"
    given.write_bytes(swarm.torrent)
    home = Home(tmp_path / "home")
    found = find_checkpoint(home, str(root))
    assert root_to_prove(home, found, given, is_repaired=True) == root

    fetch(swarm.magnet, root, swarm.options())

    assert_kept(root, content)
    swarm.assert_arrived(root)


def test_a_repair_that_finishes_leaves_nothing_of_the_damage(swarm, theirs, tmp_path):
    root, _ = theirs
    given = tmp_path / "given.torrent"
    given.write_bytes(swarm.torrent)
    home = Home(tmp_path / "home")
    root_to_prove(home, find_checkpoint(home, str(root)), given, is_repaired=True)

    repaired = repair(root, verify(root), swarm.options())

    assert repaired.verdict.damage == ()
    assert not is_adopting(root)
    assert not (root / ".grokctl" / "replaced").exists()
    assert not (root / ".grokctl" / "damaged").exists()


def test_what_a_fetch_wrote_itself_is_not_kept_after_the_takeover(swarm, theirs):
    root, _ = theirs
    fetch(swarm.magnet, root, swarm.options(force=True))
    shutil.rmtree(root / ".grokctl" / "replaced")
    (root / TENSOR).write_bytes(bytes(100))

    fetch(swarm.magnet, root, swarm.options(force=True))

    assert not (root / ".grokctl" / "replaced").exists()
