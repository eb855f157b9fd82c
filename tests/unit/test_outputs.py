"""Outputs: whose links lead to them, and who can read the file that replaces another."""

import os
import struct
from pathlib import Path

import pytest
from users import OTHER, as_root, mode_of

from grokctl.errors import InvalidValueError
from grokctl.outputs import create_output, find_output, replace_output


def shared_by_list(folder):
    """Let another user write by an access control list."""
    entries = [(0x01, 7, 2**32 - 1), (0x02, 7, OTHER), (0x04, 5, 2**32 - 1)]
    entries += [(0x10, 7, 2**32 - 1), (0x20, 5, 2**32 - 1)]
    data = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(folder, "system.posix_acl_access", data)
    except OSError as error:
        pytest.skip(f"no access control lists: {error.strerror}")


def shared_by_group(folder):
    """Let the members of a group write, and give new files to the group."""
    os.chown(folder, -1, OTHER)
    folder.chmod(0o2775)


SHARES = {
    "all": lambda folder: folder.chmod(0o1777),
    "group": shared_by_group,
    "list": shared_by_list,
    "owner": lambda folder: os.chown(folder, OTHER, -1),
}


def linked_pipe(place):
    """A link of this user's to the pipe beside it."""
    os.mkfifo(place.with_name("pipe"))
    place.symlink_to("pipe")


@as_root
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("folder", [".", "below"])
@pytest.mark.parametrize("target", ["thesis", "new"])
def test_an_output_that_another_user_has_linked_is_refused(
    tmp_path, precious, share, folder, target
):
    shared = tmp_path / "shared"
    shared.mkdir()
    if (share, folder) == ("owner", "below"):
        pytest.skip("a folder is linked elsewhere by whoever runs the machine")
    SHARES[share](shared)
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
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("make", [os.mkfifo, linked_pipe])
def test_a_pipe_that_another_user_has_planted_gets_no_output(tmp_path, share, make):
    shared = tmp_path / "shared"
    shared.mkdir()
    SHARES[share](shared)
    place = shared / "out.npy"
    make(place)
    os.chown(place, OTHER, -1)

    with pytest.raises(InvalidValueError, match="is another user's pipe or device"):
        find_output(place, "logits", "x.npy")

    os.chown(place, os.geteuid(), -1)
    assert find_output(place, "logits", "x.npy") == (place, False)


def test_a_device_of_the_machine_takes_an_output():
    assert find_output(Path("/dev/null"), "logits", "x.npy") == (Path("/dev/null"), False)


@as_root
def test_a_link_of_a_colleague_in_a_folder_of_their_own_is_followed(tmp_path, precious):
    (tmp_path / "out.npy").symlink_to(precious)
    os.lchown(tmp_path / "out.npy", OTHER, -1)

    assert find_output(tmp_path / "out.npy", "logits", "x.npy") == (precious, True)


@pytest.mark.parametrize("umask", [0o002, 0o077])
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o666, 0o400, 0o4755])
def test_a_new_output_is_read_by_those_who_could_read_the_old_one(tmp_path, umask, mode):
    place = tmp_path / "out.npy"
    place.write_text("old")
    place.chmod(mode)
    before = os.umask(umask)
    try:
        handle, temporary = create_output(place)
    finally:
        os.umask(before)
    os.write(handle, b"new")
    os.close(handle)

    seen = mode_of(temporary)
    replace_output(temporary, place)

    assert seen == mode_of(place) == (mode & 0o777) | 0o600
    assert place.read_text() == "new"


@as_root
def test_a_new_output_of_another_group_is_closed_to_it(tmp_path):
    place = tmp_path / "out.npy"
    place.touch()
    os.chown(place, -1, OTHER)
    place.chmod(0o660)

    handle, temporary = create_output(place)
    os.close(handle)

    assert mode_of(temporary) == 0o600
