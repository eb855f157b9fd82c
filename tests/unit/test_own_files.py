"""Files of this user's own: what others made, planted, linked or may not read."""

import errno
import os
import shutil
import stat
import warnings
from contextlib import suppress

import pytest
from cuts import cut, proven_release
from torrents import names_in
from users import OTHER, as_root, mode_of

from grokctl.checkpoint.adoption import end_adoption
from grokctl.checkpoint.receipt import forget_receipt
from grokctl.checkpoint.refusal import forget_refusal, write_refusal
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.unfinished import Unfinished, forget_unfinished
from grokctl.errors import Damage, FetchError, Reason
from grokctl.events import Noted
from grokctl.model.placement import MeshShape
from grokctl.own_files import (
    ForeignFileError,
    open_own,
    opened_folder,
)
from grokctl.ownership import links_on
from grokctl.paths import locked, write_atomically
from grokctl.transfer.destination import forget_resume_data, remove_parts, take_resume_data
from grokctl.verify import verify

BUSY = FetchError("busy")


def as_stranger(job) -> bool:
    """Whether a job is done in a process of another user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of JAX: the child only calls the system
        child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(OTHER)
            os.setuid(OTHER)
            job()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def public(tmp_path):
    """A folder that everybody can enter, up to its root."""
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & stat.S_ISVTX:
            folder.chmod(folder.stat().st_mode | 0o055)
    return tmp_path


# --- opened as one's own

PLANTS = {
    "link": lambda path, victim: path.symlink_to(victim),
    "hard-link": lambda path, victim: path.hardlink_to(victim),
    "pipe": lambda path, _: os.mkfifo(path),
    "folder": lambda path, _: path.mkdir(),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_is_not_opened_as_ones_own(tmp_path, precious, plant):
    PLANTS[plant](tmp_path / "journal", precious)

    with opened_folder(tmp_path) as folder, pytest.raises(OSError, match="journal") as caught:
        open_own("journal", folder, tmp_path / "journal")

    assert caught.value.errno in {errno.ELOOP, errno.EPERM, errno.EISDIR}
    assert precious.read_text() == "mine"


@as_root
def test_a_file_of_another_user_is_not_opened_as_ones_own(tmp_path):
    (tmp_path / "journal").touch()
    os.chown(tmp_path / "journal", OTHER, -1)

    with opened_folder(tmp_path) as folder, pytest.raises(ForeignFileError, match="another user"):
        open_own("journal", folder, tmp_path / "journal")


def test_ones_own_file_is_opened_again_with_what_is_in_it(tmp_path):
    with opened_folder(tmp_path) as folder:
        for text in (b"a", b"b"):
            handle = open_own(
                "journal", folder, tmp_path, flags=os.O_RDWR | os.O_CREAT | os.O_APPEND
            )
            os.write(handle, text)
            os.close(handle)

    assert (tmp_path / "journal").read_bytes() == b"ab"


# --- the private folder of a release is never a link


def write_record(path):
    write_atomically(path, b"x")


def take_lock(path):
    with locked(path, busy=BUSY):
        pytest.fail("it was followed")


@pytest.mark.parametrize("target", ["there", "nowhere"])
@pytest.mark.parametrize("write", [write_record, take_lock])
def test_a_private_folder_that_is_a_link_is_not_followed(tmp_path, write, target):
    (tmp_path / "there").mkdir()
    (tmp_path / ".grokctl").symlink_to(tmp_path / target)

    with pytest.raises(OSError, match=r"symbolic link|File exists"):
        write(tmp_path / ".grokctl/receipt.json")

    assert names_in(tmp_path) == []


FORGETTING = [
    pytest.param(forget_receipt, "receipt.json", id="receipt"),
    pytest.param(forget_refusal, "refusal.json", id="refusal"),
    pytest.param(forget_unfinished, "unfinished.json", id="unfinished"),
    pytest.param(end_adoption, "adoption.json", id="adoption"),
    pytest.param(forget_resume_data, "resume", id="resume"),
    pytest.param(forget_resume_data, "resume.begun", id="begun"),
    pytest.param(remove_parts, ".x.parts", id="parts"),
    pytest.param(take_resume_data, "resume", id="renamed"),
]


@pytest.mark.parametrize(("forget", "name"), FORGETTING)
def test_nothing_is_deleted_through_a_private_folder_that_is_a_link(tmp_path, forget, name):
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    for root in (own, theirs):
        root.mkdir()
    (own / ".grokctl").mkdir()
    (own / ".grokctl" / name).write_text("proof")
    (theirs / ".grokctl").symlink_to(own / ".grokctl")

    with suppress(OSError):
        forget(theirs)

    assert names_in(own / ".grokctl") == [name]
    forget(own)
    assert names_in(own / ".grokctl") == (["resume.begun"] if forget is take_resume_data else [])
    forget(own)  # it is gone already


@pytest.mark.parametrize("is_ready", [False, True])
def test_a_verification_says_that_it_forgets_nothing_of_others(tmp_path, is_ready):
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    proven_release(own)
    root = own
    if is_ready:
        root = cut(open_release(own), MeshShape(1, 1), tmp_path / "ready").root
    shutil.copytree(root, theirs)
    shutil.rmtree(theirs / ".grokctl")
    (theirs / ".grokctl").symlink_to(root / ".grokctl")
    Unfinished(source="grok-1", have=1, nbytes=9, is_final=True).write(root)
    write_refusal(root, [Damage("x", Reason.ALTERED)])
    before = {name: (root / ".grokctl" / name).read_bytes() for name in names_in(root / ".grokctl")}
    notes = []

    verdict = verify(theirs, observe=notes.append)

    assert verdict.damage == ()
    after = {name: (root / ".grokctl" / name).read_bytes() for name in names_in(root / ".grokctl")}
    assert after == before
    said = [event.message for event in notes if isinstance(event, Noted)]
    assert any("is a symbolic link" in note for note in said)


@as_root
@pytest.mark.parametrize(("mode", "lock"), [(0o755, 0o600), (0o2775, 0o660), (0o777, 0o666)])
def test_a_lock_can_be_held_by_those_alone_who_can_write_beside_it(public, mode, lock):
    folder = public / ".grokctl"
    folder.mkdir()
    folder.chmod(mode)
    path = folder / "lock"
    path.touch()
    path.chmod(0o666)  # of an earlier version
    before = os.umask(0)
    try:
        with locked(path, busy=BUSY):
            pass
    finally:
        os.umask(before)

    assert mode_of(path) == lock
    assert as_stranger(lambda: os.close(os.open(path, os.O_RDONLY))) == bool(lock & 0o004)


def test_a_lock_with_another_name_keeps_its_mode(tmp_path, precious):
    precious.chmod(0o644)
    (tmp_path / "lock").hardlink_to(precious)

    with locked(tmp_path / "lock", busy=BUSY):
        pass

    assert mode_of(precious) == 0o644


# --- links on a way


def test_every_link_on_a_way_is_found_in_its_order(tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/file").touch()
    (tmp_path / "a").symlink_to("b/../file")
    (tmp_path / "b").symlink_to("deep/er")
    (tmp_path / "file").symlink_to(tmp_path / "deep/file")

    found = [link for link, _ in links_on(tmp_path / "a")]

    assert found == [tmp_path / "a", tmp_path / "b"]
    assert [link for link, _ in links_on(tmp_path / "file")] == [tmp_path / "file"]


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")

    with pytest.raises(OSError, match="symbolic links"):
        list(links_on(tmp_path / "a"))
