"""Marks of folders that grokctl made."""

import os
from contextlib import nullcontext

import pytest
from users import user_of

from grokctl.marks import MARK, delete_in, delete_marked, is_begun_here, is_marked, put_mark
from grokctl.own_files import opened_folder


@pytest.fixture
def made(tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    with opened_folder(folder) as handle:
        put_mark(handle, "made")
    (folder / "deep/er").mkdir(parents=True)
    (folder / "deep/er/file").touch()
    return folder


def is_own(folder, name="made") -> bool:
    with opened_folder(folder) as handle:
        return is_marked(handle, name)


def test_a_folder_is_marked_under_its_name_and_once(made):
    assert is_own(made)
    assert not is_own(made, "other")
    with opened_folder(made) as handle, pytest.raises(FileExistsError):
        put_mark(handle, "made")


def linked(made, other):
    (other / MARK).symlink_to(made / MARK)


def hard_linked(made, other):
    (other / MARK).hardlink_to(made / MARK)


def copied(made, other):
    (other / MARK).write_bytes((made / MARK).read_bytes())


@pytest.mark.parametrize("plant", [linked, hard_linked, copied])
def test_a_mark_counts_for_one_folder_only(made, tmp_path, plant):
    other = tmp_path / "other"
    other.mkdir()
    plant(made, other)

    assert not is_own(other)


def test_a_mark_with_a_mac_was_put_on_a_new_folder_by_this_user(made, tmp_path):
    def is_here(name="made"):
        with opened_folder(made) as handle:
            return is_begun_here(handle, name)

    assert (is_here(), is_here("other")) == (True, False)
    path = made / MARK
    data = path.read_bytes()
    for text in (b"".join(data.splitlines(keepends=True)[:2]), data[:-2], b"x" + data, b"", b"\n"):
        path.write_bytes(text)
        assert not is_here()
    for settings, is_new in (("other", True), (None, False)):
        path.unlink()
        by_whom = user_of(tmp_path / settings) if settings else nullcontext()
        with by_whom, opened_folder(made) as handle:
            put_mark(handle, "made", is_new=is_new)
        assert is_own(made)
        assert not is_here()


def test_a_folder_is_marked_without_a_key_as_well(made, tmp_path):
    (made / MARK).unlink()
    (tmp_path / "settings").touch()
    with user_of(tmp_path / "settings"), opened_folder(made) as handle:
        put_mark(handle, "made")
        assert not is_begun_here(handle, "made")

    assert is_own(made)


def test_a_marked_folder_is_deleted_and_no_target_of_a_link(made, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()
    (made / "deep/link").symlink_to(tmp_path / "kept")

    with opened_folder(tmp_path) as above:
        delete_marked("made", above, made_as="made")

    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "file"]


@pytest.mark.parametrize("name", ["thesis", "link"])
def test_what_was_renamed_to_the_name_stays(made, tmp_path, name):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter").touch()
    (tmp_path / "link").symlink_to(tmp_path / "thesis")
    made.rename(tmp_path / "aside")
    (tmp_path / name).rename(made)

    with opened_folder(tmp_path) as above:
        try:
            delete_marked("made", above, made_as="made")
        except OSError:
            assert name == "link"

    assert list(tmp_path.rglob("chapter"))


def test_what_gets_the_name_meanwhile_stays(made, tmp_path, monkeypatch):
    rmdir, swapped = os.rmdir, []

    def swap(name, **options):
        if name == "er":
            made.rename(tmp_path / "aside")
            made.mkdir()
            (made / "chapter").touch()
            swapped.append(name)
        rmdir(name, **options)

    monkeypatch.setattr(os, "rmdir", swap)
    with opened_folder(made) as handle:
        delete_in(handle, last=MARK)

    assert swapped
    assert (made / "chapter").exists()
    assert list((tmp_path / "aside").iterdir()) == []
