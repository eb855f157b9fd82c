"""Files behind links: what is judged is what was opened, whatever is swapped meanwhile."""

import os
from contextlib import suppress
from itertools import combinations

import pytest
from users import OTHER, as_root

from grokctl.linked_files import opened_linked, read_linked, refuse_foreign_links
from grokctl.own_files import ForeignFileError


@pytest.fixture
def public(tmp_path):
    """A folder that everybody can enter, up to its root."""
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(folder.stat().st_mode | 0o055)
    return tmp_path


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

    with opened_linked(release / "tokenizer.model", release) as file:
        assert file.copy_mode == 0o600


def test_a_private_folder_above_release_and_file_is_private_to_both(release, public):
    (release / "../../blobs").mkdir()
    (release / "../../blobs/abc").write_text("x")
    (release / "tokenizer.model").symlink_to("../../blobs/abc")
    public.chmod(0o700)

    with opened_linked(release / "tokenizer.model", release) as file:
        assert file.copy_mode == 0o644


def test_a_large_file_is_not_copied(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"x" * 11)

    assert read_linked(path, tmp_path, most=11)[0] == b"x" * 11
    with pytest.raises(ForeignFileError, match="expected at most 10 bytes, found 11"):
        read_linked(path, tmp_path, most=10)


# --- races


class Swapped:
    """A name that somebody gives to two things in turn, just before calls that look at a path."""

    CALLS = ("open", "stat", "lstat", "readlink")

    def __init__(self, name, one, other, monkeypatch):
        self.name, self.now, self.other = name, one, other
        self.moments = ()
        self.count = 0
        for call in self.CALLS:
            monkeypatch.setattr(os, call, self._before(getattr(os, call)))

    def _before(self, call):
        def swapping(*arguments, **options):
            self.count += 1
            if self.count in self.moments:
                self.swap()
            return call(*arguments, **options)

        return swapping

    def swap(self):
        self.name.rename(self.now)
        self.other.rename(self.name)
        self.now, self.other = self.other, self.now


@as_root
@pytest.mark.parametrize("way", ["file", "folder", "chain", "renamed"])
def test_a_link_that_comes_and_goes_brings_no_private_bytes(release, public, monkeypatch, way):
    secret = public / "private/tokenizer.model"
    secret.parent.mkdir()
    secret.write_text("private")
    secret.chmod(0o600)
    one, other = public / "one", public / "other"
    path = name = release / "tokenizer.model"
    if way == "folder":
        name = release / "below"
        path = name / "tokenizer.model"
        one.mkdir()
        (one / "tokenizer.model").write_text("public")
        other.symlink_to(secret.parent)
    elif way == "renamed":
        one.write_text("public")
        other = secret
    else:
        one.write_text("public")
        other.symlink_to(secret)
    if way == "chain":
        name = public / "between"
        path.symlink_to(name)
    if way != "renamed":
        os.lchown(other, OTHER, -1)
    one.rename(name)
    swapped = Swapped(name, one, other, monkeypatch)
    read = 0

    for first, second in combinations(range(1, 45), 2):
        swapped.count, swapped.moments = 0, (first, second)
        with suppress(OSError):
            data, mode = read_linked(path, release, most=2**20)
            read += 1
            assert data == b"public" or (way == "renamed" and mode == 0o600)
        if swapped.now != one:
            swapped.moments = ()
            swapped.swap()

    assert read
