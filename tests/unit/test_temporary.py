"""Temporary folders lie where nobody else can rename them; nothing else is deleted for them."""

import os

import pytest
from users import OTHER, as_root, mode_of

from grokctl import temporary
from grokctl.checkpoint.rehearsal import rehearsed
from grokctl.demo import _temporary
from grokctl.paths import Home
from grokctl.temporary import temporary_folder


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The usual place, and the one after it."""
    first, second = tmp_path / "first", tmp_path / "second"
    for place in (first, second):
        place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(first))
    monkeypatch.setattr(temporary, "PLACES", (str(second),))
    return first, second


def filled(folder):
    folder.mkdir()
    (folder / "chapter1").write_text("years")
    return folder


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_temporary_folder_is_private_and_goes_with_all_that_is_in_it(places):
    with temporary_folder("x-") as folder:
        assert folder.path.parent == places[0]
        assert folder.path.name.startswith("x-")
        assert (mode_of(folder.path), folder.is_in_place) == (0o700, True)
        (folder.path / "deep/er").mkdir(parents=True)
        (folder.path / "deep/er/file").touch()
        (folder.path / "link").symlink_to(places[1])

    assert (names_in(places[0]), places[1].is_dir()) == ([], True)


def tunnels_like(_home):
    return temporary_folder()


def demos(_home):
    return _temporary()


def rehearsals(home):
    return rehearsed(Home(home))


@pytest.mark.parametrize("make", [tunnels_like, demos, rehearsals])
def test_what_is_renamed_to_its_name_stays(places, tmp_path, make):
    with make(tmp_path / "home"):
        (name,) = names_in(places[0])
        (places[0] / name).rename(places[0] / "away")
        thesis = filled(places[0] / "thesis").rename(places[0] / name)

    assert names_in(thesis) == ["chapter1"]
    assert names_in(places[0] / "away") == []


def test_an_empty_folder_in_its_name_stays(places):
    with temporary_folder() as folder:
        folder.path.rename(places[0] / "away")
        folder.path.mkdir()

    assert names_in(places[0]) == sorted(["away", folder.path.name])


def test_a_link_in_its_name_is_left_and_not_followed(places):
    thesis = filled(places[1] / "thesis")
    with temporary_folder() as folder:
        folder.path.rename(places[0] / "away")
        folder.path.symlink_to(thesis)
        assert not folder.is_in_place

    assert names_in(thesis) == ["chapter1"]
    assert folder.path.is_symlink()


EXPOSED = [
    pytest.param(lambda place: place.chmod(0o777), id="others"),
    pytest.param(lambda place: os.chown(place, OTHER, -1), id="anothers", marks=as_root),
    pytest.param(
        lambda place: (os.chown(place, -1, OTHER), place.chmod(0o2770)), id="group", marks=as_root
    ),
    pytest.param(lambda place: place.rmdir(), id="missing"),
]


@pytest.mark.parametrize("make", [tunnels_like, demos, rehearsals])
@pytest.mark.parametrize("expose", EXPOSED)
def test_no_temporary_folder_is_made_where_others_can_rename_it(places, tmp_path, make, expose):
    expose(places[0])

    with make(tmp_path / "home"):
        assert len(names_in(places[1])) == 1
        assert not places[0].exists() or names_in(places[0]) == []

    assert names_in(places[1]) == []


def test_a_sticky_folder_such_as_tmp_will_do(places):
    places[0].chmod(0o1777)

    with temporary_folder() as folder:
        assert folder.path.parent == places[0]


def test_without_a_place_the_reason_is_that_of_the_first(places):
    for place in places:
        place.chmod(0o777)

    with pytest.raises(PermissionError) as caught, temporary_folder():
        pass

    assert caught.value.filename == str(places[0])
    problem = f"{places[0]} can be written by others"
    assert caught.value.strerror == f"no temporary folder there: {problem}"


def test_a_place_of_our_own_is_made_at_last(places, tmp_path):
    for place in places:
        place.chmod(0o777)
    home = tmp_path / "to/home"

    with temporary_folder(places=[home]) as folder:
        assert folder.path.parent == home

    assert names_in(home) == []


def test_a_folder_that_will_not_do_is_deleted_and_the_next_one_tried(places):
    tried = []

    def suits(folder):
        (folder / "trial").touch()
        tried.append(folder.parent)
        if folder.parent == places[0]:
            raise OSError(28, "No space left on device", str(folder))

    with temporary_folder(suits=suits) as folder:
        assert folder.path.parent == places[1]
        assert names_in(places[0]) == []

    assert tried == list(places)
    with pytest.raises(OSError, match="mine"), temporary_folder(suits=suits):
        raise OSError("mine")
    assert names_in(places[1]) == []
    assert len(tried) == 4
