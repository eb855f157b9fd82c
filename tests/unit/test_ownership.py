"""Who can change a file: each way in which another user could, and each way in which none can."""

import grp
import os
import pwd
import struct
from pathlib import Path

import pytest
from users import OTHER, as_root

from grokctl import ownership
from grokctl.ownership import exposed_files, exposures, why_exposed

"""A user and a group that this machine does not have."""


@pytest.fixture(autouse=True)
def _forgotten():
    """Groups are looked up once a process."""
    ownership._is_own_group.cache_clear()
    ownership._unmapped.cache_clear()
    yield
    ownership._is_own_group.cache_clear()
    ownership._unmapped.cache_clear()


@pytest.fixture
def folder(tmp_path):
    """A folder of this user in two others, and a file in it."""
    root = tmp_path / "above/between/own"
    root.mkdir(parents=True)
    for place in (root, root.parent, root.parent.parent):
        place.chmod(0o755)
    (root / "file").write_text("x")
    (root / "file").chmod(0o644)
    return root


@pytest.fixture
def users(monkeypatch):
    """The users and groups of a machine: (name, number, primary group), (name, number, members)."""

    def define(people, groups):
        accounts = [pwd.struct_passwd((n, "x", u, g, "", "/", "/bin/sh")) for n, u, g in people]
        entries = {g: grp.struct_group((n, "x", g, list(m))) for n, g, m in groups}
        monkeypatch.setattr(pwd, "getpwall", lambda: accounts)
        monkeypatch.setattr(pwd, "getpwuid", lambda u: _first(a for a in accounts if a.pw_uid == u))
        monkeypatch.setattr(
            pwd, "getpwnam", lambda n: _first(a for a in accounts if a.pw_name == n)
        )
        monkeypatch.setattr(grp, "getgrgid", entries.__getitem__)

    return define


def _first(found):
    for one in found:
        return one
    raise KeyError


def test_a_file_of_ones_own_is_not_exposed(folder):
    assert why_exposed(folder / "file") is None
    assert why_exposed(folder) is None


@pytest.mark.parametrize("place", ["file", ".", "..", "../.."])
def test_what_everybody_can_write_is_exposed_and_so_is_all_below(folder, place):
    exposed = Path(os.path.normpath(folder / place))
    exposed.chmod(exposed.stat().st_mode | 0o002)

    assert why_exposed(folder / "file") == f"{exposed} can be written by others"


def test_a_sticky_folder_is_safe_above_and_not_itself(folder):
    folder.chmod(0o1777)

    assert why_exposed(folder / "file") is None
    assert why_exposed(folder) == f"{folder} can be written by others"


@as_root
@pytest.mark.parametrize("place", ["file", ".", "..", "../.."])
def test_what_belongs_to_another_user_is_exposed(folder, place):
    exposed = Path(os.path.normpath(folder / place))
    os.chown(exposed, OTHER, -1)

    assert why_exposed(folder / "file") == f"{exposed} belongs to user {OTHER}"


@as_root
def test_a_file_of_another_user_in_a_sticky_folder_is_exposed(folder):
    folder.chmod(0o1777)
    os.chown(folder / "file", OTHER, -1)

    assert why_exposed(folder / "file") == f"{folder / 'file'} belongs to user {OTHER}"


@as_root
def test_a_link_of_another_user_is_exposed_although_its_target_is_not(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert why_exposed(tmp_path / "link/file") is None

    os.lchown(tmp_path / "link", OTHER, -1)

    assert why_exposed(tmp_path / "link/file") == f"{tmp_path / 'link'} belongs to user {OTHER}"


@pytest.mark.parametrize("target", ["above/between/own", "above/../above/between/own", None])
def test_the_folders_of_a_links_target_count(folder, tmp_path, target):
    (tmp_path / "link").symlink_to(target or folder)
    folder.parent.chmod(0o777)

    assert why_exposed(tmp_path / "link/file") == f"{folder.parent} can be written by others"


def test_the_folder_of_a_link_counts(folder, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/link").symlink_to(folder)
    (tmp_path / "shared").chmod(0o777)

    exposed = tmp_path / "shared"
    assert why_exposed(exposed / "link/file") == f"{exposed} can be written by others"


def test_two_dots_after_a_link_lead_out_of_its_target(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    folder.parent.chmod(0o777)

    assert why_exposed(tmp_path / "link/../x") == f"{folder.parent} can be written by others"


def test_of_many_files_each_has_its_reason_and_every_folder_is_looked_at_once(
    folder, tmp_path, monkeypatch
):
    names = [f"ckpt-0/{number}" for number in range(20)]
    (folder / "ckpt-0").mkdir(mode=0o755)
    for name in names[2:]:
        (folder / name).write_text("x")
    (folder / names[0]).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("x")
    (tmp_path / "elsewhere").chmod(0o666)
    (folder / names[5]).chmod(0o666)
    looked, lstat = [], Path.lstat
    monkeypatch.setattr(Path, "lstat", lambda path: looked.append(path) or lstat(path))

    found = exposed_files(folder, names)

    assert found == {
        names[0]: f"{tmp_path / 'elsewhere'} can be written by others",
        names[5]: f"{folder / names[5]} can be written by others",
    }
    assert looked.count(folder) == looked.count(folder / "ckpt-0") == 1


def test_links_in_a_circle_are_no_proof(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")

    assert "too many links" in why_exposed(tmp_path / "a/file")


def test_what_is_not_there_is_judged_by_the_folders_above(folder):
    assert why_exposed(folder / "new/deep") is None

    folder.chmod(0o777)

    assert why_exposed(folder / "new/deep") == f"{folder} can be written by others"


# --- groups


@pytest.mark.parametrize(
    ("people", "groups", "is_fine"),
    [
        pytest.param([("me", 0)], [("me", ())], True, id="own"),
        pytest.param([("me", 0)], [("me", ("me",))], True, id="own-and-named-in-it"),
        pytest.param([("me", 0), ("you", 0)], [("me", ("you",))], False, id="another-member"),
        pytest.param([("me", 0)], [("me", ("gone",))], False, id="an-unknown-member"),
        pytest.param([("me", 0), ("you", 1)], [("me", ())], False, id="anothers-primary-group"),
        pytest.param([("me", 0)], [("staff", ())], False, id="a-group-of-many"),
        pytest.param([("me", 0)], [], False, id="an-unknown-group"),
        pytest.param([], [("me", ())], False, id="an-unknown-user"),
    ],
)
def test_a_group_may_write_only_if_it_is_the_users_own(folder, users, people, groups, is_fine):
    group = folder.stat().st_gid or OTHER
    if os.geteuid() == 0:
        os.chown(folder, -1, OTHER)
        group = OTHER
    folder.chmod(0o775)
    numbers = {"me": os.geteuid(), "you": OTHER + 1}
    users(
        [(name, numbers[name], group if name == "me" or is_in else 1) for name, is_in in people],
        [(name, group, members) for name, members in groups],
    )

    found = why_exposed(folder / "file")

    name = groups[0][0] if groups else group
    assert found == (None if is_fine else f"{folder} can be written by group {name}")


# --- lists of access


def entry(tag, rights, name=2**32 - 1):
    return struct.pack("<HHI", tag, rights, name)


@pytest.mark.parametrize(
    ("extra", "mask", "found"),
    [
        pytest.param(entry(2, 7, OTHER), 7, f"can be written by user {OTHER}", id="a-user"),
        pytest.param(entry(2, 7, OTHER), 5, None, id="a-user-masked"),
        pytest.param(entry(2, 5, OTHER), 7, None, id="a-user-who-reads"),
        pytest.param(entry(8, 7, OTHER), 7, f"can be written by group {OTHER}", id="a-group"),
        pytest.param(entry(8, 5, OTHER), 7, None, id="a-group-that-reads"),
    ],
)
def test_a_list_of_access_counts(folder, extra, mask, found):
    head = struct.pack("<I", 2) + entry(1, 7)
    groups, end = (entry(4, 5), b"") if extra[0] == 2 else (b"", b"")
    middle = extra + groups if extra[0] == 2 else entry(4, 5) + extra
    try:
        os.setxattr(
            folder, "system.posix_acl_access", head + middle + entry(16, mask) + entry(32, 5) + end
        )
    except OSError:
        pytest.skip("no access control lists on this file system")

    assert why_exposed(folder / "file") == (found and f"{folder} {found}")


# --- containers


@as_root
def test_nobody_above_is_root_where_a_container_does_not_know_root(folder, monkeypatch):
    monkeypatch.setattr(ownership, "_unmapped", lambda: OTHER)
    os.chown(folder.parent, OTHER, -1)
    assert why_exposed(folder / "file") is None

    os.chown(folder / "file", OTHER, -1)

    assert why_exposed(folder / "file") == f"{folder / 'file'} belongs to user {OTHER}"


def mounted(monkeypatch, tmp_path, path, system):
    """The mounts of a machine on which a path is on a file system of a kind."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    lines = [
        "22 1 0:5 / /dev rw - devtmpfs udev rw,user_id=9",
        f"36 22 {number} / /mnt/a\\040b rw,noatime shared:1 - {system}",
        "37 22 0:9 / /x rw - fuse.other x rw,user_id=8",
    ]
    (tmp_path / "mountinfo").write_text("\n".join(lines))
    monkeypatch.setattr(ownership, "_MOUNTS", tmp_path / "mountinfo")


@pytest.mark.parametrize(
    ("system", "user"),
    [
        pytest.param("fuse.sshfs host: rw,user_id=54321,group_id=1,allow_other", 54321, id="ssh"),
        pytest.param("fuse /dev/fuse rw,user_id=7,group_id=0", 7, id="plain"),
        pytest.param("fuseblk /dev/x ro,group_id=3,user_id=1234567", 1234567, id="disk"),
        pytest.param("fuse.x x rw,user_id=0,group_id=0,allow_other", None, id="roots"),
        pytest.param(f"fuse.x x rw,user_id={os.geteuid()},group_id=0", None, id="ones-own"),
        pytest.param("ext4 /dev/x rw,user_id=7", None, id="no-fuse"),
        pytest.param("fuse.x x,user_id=0 rw,user_id=7,group_id=0", 7, id="a-name"),
    ],
)
def test_nothing_is_ones_own_on_a_file_system_that_another_user_serves(
    folder, tmp_path, monkeypatch, users, system, user
):
    users([], [])
    mounted(monkeypatch, tmp_path, folder, system)
    words = f"is on a file system that user {user} serves (FUSE)"

    found = why_exposed(folder / "file")
    of_many = exposed_files(folder, ["file", "other"])
    new = [problem for _, _, problem in exposures(folder / "new", is_made=True)]

    assert (found is None) == (user is None)
    assert user is None or found.endswith(words)
    assert set(of_many) == (set() if user is None else {"file", "other"})
    assert (words in new) == (user is not None)
    (tmp_path / "mountinfo").unlink()  # another system than Linux
    assert why_exposed(folder / "file") is None
