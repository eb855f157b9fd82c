"""Files of this user's own: what others made, planted, linked or may not read."""

import errno
import os
import stat
import warnings

import pytest
from torrents import names_in

from grokctl.errors import FetchError, InvalidValueError
from grokctl.own_files import (
    ForeignFileError,
    copy_mode,
    links_on,
    open_own,
    opened_folder,
    read_linked,
    refuse_foreign_links,
)
from grokctl.paths import find_output, locked, write_atomically

OTHER = 54_321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
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


def mode_of(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def precious(tmp_path_factory):
    """A file that somebody would like to see overwritten."""
    path = tmp_path_factory.mktemp("victim") / "thesis"
    path.write_text("mine")
    return path


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


# --- outputs


@as_root
@pytest.mark.parametrize("folder", [".", "below"])
@pytest.mark.parametrize("target", ["thesis", "new"])
def test_an_output_that_another_user_has_linked_is_refused(tmp_path, precious, folder, target):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    if folder == ".":
        link, typed = shared / "out.npy", shared / "out.npy"
        link.symlink_to(precious.with_name(target))
    else:
        link, typed = shared / "below", shared / "below" / target
        link.symlink_to(precious.parent)
    os.lchown(link, OTHER, -1)

    with pytest.raises(
        (InvalidValueError, PermissionError), match=r"another user's link|Permission"
    ):
        find_output(typed, "logits", "x.npy")

    os.lchown(link, os.geteuid(), -1)
    assert find_output(typed, "logits", "x.npy") == (precious.with_name(target), True)


@as_root
def test_a_link_of_a_colleague_in_a_folder_of_their_own_is_followed(tmp_path, precious):
    (tmp_path / "out.npy").symlink_to(precious)
    os.lchown(tmp_path / "out.npy", OTHER, -1)

    assert find_output(tmp_path / "out.npy", "logits", "x.npy") == (precious, True)


# --- links on a way, and copies of what they lead to


def test_every_link_on_a_way_is_found_in_its_order(tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/file").touch()
    (tmp_path / "a").symlink_to("b/../file")
    (tmp_path / "b").symlink_to("deep/er")
    (tmp_path / "file").symlink_to(tmp_path / "deep/file")

    found = list(links_on(tmp_path / "a"))

    assert found == [tmp_path / "a", tmp_path / "b"]
    assert list(links_on(tmp_path / "file")) == [tmp_path / "file"]


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")

    with pytest.raises(OSError, match="symbolic links"):
        list(links_on(tmp_path / "a"))


@pytest.fixture
def release(public):
    root = public / "hub/snapshots/main"
    root.mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("place", "mode", "above", "copied"),
    [
        pytest.param("hub/blobs/abc", 0o644, 0o755, 0o644, id="blob-of-the-hub"),
        pytest.param("hub/snapshots/main/x", 0o640, 0o755, 0o640, id="in-the-release"),
        pytest.param("secrets/key", 0o600, 0o755, 0o600, id="private-file"),
        pytest.param("secrets/key", 0o644, 0o700, 0o600, id="in-a-private-folder"),
        pytest.param("secrets/key", 0o640, 0o755, 0o600, id="of-another-group"),
        pytest.param("secrets/key", 0o400, 0o755, 0o600, id="read-only"),
    ],
)
def test_a_copy_is_read_by_nobody_who_could_not_read_the_file(
    release, public, place, mode, above, copied
):
    target = public / place
    target.parent.mkdir(exist_ok=True)
    target.write_text("x")
    target.chmod(mode)
    target.parent.chmod(above)
    (release / "tokenizer.model").symlink_to(target)

    data, found = read_linked(release / "tokenizer.model", release, most=2**20)

    assert (data, found) == (b"x", copied)


@as_root
@pytest.mark.parametrize(
    ("mode", "owner", "is_fine"),
    [
        pytest.param(0o600, 0, False, id="private"),
        pytest.param(0o644, 0, True, id="public"),
        pytest.param(0o600, OTHER, True, id="their-own"),
    ],
)
@pytest.mark.parametrize("chain", [False, True])
def test_another_users_link_to_a_private_file_is_refused(
    release, public, mode, owner, is_fine, chain
):
    target = public / "key"
    target.write_text("x")
    target.chmod(mode)
    os.chown(target, owner, -1)
    link = release / "tokenizer.model"
    foreign = public / "between" if chain else link
    foreign.symlink_to(target)
    os.lchown(foreign, OTHER, -1)
    if chain:
        link.symlink_to(foreign)

    if is_fine:
        refuse_foreign_links(link, release)
        return
    with pytest.raises(ForeignFileError, match="another user's link"):
        read_linked(link, release, most=2**20)


def test_ones_own_link_to_ones_own_private_file_is_no_reason_to_refuse(release, public):
    (public / "key").write_text("x")
    (public / "key").chmod(0o600)
    (release / "tokenizer.model").symlink_to(public / "key")

    assert copy_mode(release / "tokenizer.model", release) == 0o600
    refuse_foreign_links(release / "tokenizer.model", release)


def test_a_private_folder_above_release_and_file_is_private_to_both(release, public):
    (release / "../../blobs").mkdir()
    (release / "../../blobs/abc").write_text("x")
    (release / "tokenizer.model").symlink_to("../../blobs/abc")
    public.chmod(0o700)

    assert copy_mode(release / "tokenizer.model", release) == 0o644


def test_a_large_file_is_not_copied(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"x" * 11)

    assert read_linked(path, tmp_path, most=11)[0] == b"x" * 11
    with pytest.raises(ForeignFileError, match="expected at most 10 bytes, found 11"):
        read_linked(path, tmp_path, most=10)
