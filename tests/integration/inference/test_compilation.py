"""The cache of compiled programs is executed, so only this user may have written it."""

import os
from importlib.metadata import version

import jax
import pytest
from users import OTHER, as_root, mode_of

from grokctl.inference.compilation import use_compilation_cache

NAME = f"{version('jaxlib')}-cpu"


@pytest.fixture(autouse=True)
def before():
    """Where programs are kept now."""
    folder = jax.config.jax_compilation_cache_dir
    yield folder
    jax.config.update("jax_compilation_cache_dir", folder)


def used(folder) -> tuple[str | None, list[str]]:
    notes = []
    use_compilation_cache(folder, observe=lambda event: notes.append(event.message))
    return jax.config.jax_compilation_cache_dir, notes


@pytest.mark.parametrize("umask", [0o002, 0o022])
def test_it_is_private_and_so_are_the_folders_made_for_it(tmp_path, umask):
    folder = tmp_path / "home/cache/xla"
    earlier = os.umask(umask)
    try:
        place, notes = used(folder)
    finally:
        os.umask(earlier)

    assert (place, notes) == (str(folder / NAME), [])
    assert {mode_of(path) for path in (folder / NAME, folder, folder.parent)} == {0o700}
    assert mode_of(tmp_path / "home") == 0o777 & ~umask


def test_that_of_an_earlier_version_is_closed_to_others(tmp_path):
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME).chmod(0o755)

    assert used(tmp_path) == (str(tmp_path / NAME), [])
    assert mode_of(tmp_path / NAME) == 0o700


@pytest.mark.parametrize("place", [".", NAME])
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_what_others_can_write_to_is_not_used(tmp_path, before, place, mode):
    (tmp_path / NAME).mkdir()
    exposed = tmp_path / place
    exposed.chmod(mode)
    if os.geteuid() == 0:
        os.chown(exposed, -1, OTHER)
    is_fine = place == "." and mode == 0o1777

    used_folder, notes = used(tmp_path)

    assert used_folder == (str(tmp_path / NAME) if is_fine else before)
    assert bool(notes) != is_fine
    assert all(str(exposed.resolve()) in note and "can be written" in note for note in notes)


@as_root
@pytest.mark.parametrize("place", [".", NAME, "link"])
def test_what_is_another_users_is_not_used(tmp_path, before, place):
    root = tmp_path / "xla"
    (root / NAME).mkdir(parents=True)
    if place == "link":
        (tmp_path / "link").symlink_to(root)
        os.lchown(tmp_path / "link", OTHER, -1)
        root = tmp_path / "link"
    else:
        os.chown(root / place, OTHER, -1)

    used_folder, (note,) = used(root)

    assert used_folder == before
    assert f"belongs to user {OTHER}" in note


# --- the folder of JAX's own variable


def set_aside(folder):
    jax.config.update("jax_compilation_cache_dir", str(folder))
    notes = []
    use_compilation_cache(None, observe=lambda event: notes.append(event.message))
    return jax.config.jax_compilation_cache_dir, notes


def test_a_folder_of_jax_that_is_this_users_own_stays(tmp_path):
    assert set_aside(tmp_path) == (str(tmp_path), [])
    assert set_aside(tmp_path / "to/make") == (str(tmp_path / "to/make"), [])
    assert set_aside("") == ("", [])


@pytest.mark.parametrize(
    "expose",
    [
        pytest.param(lambda root: root.chmod(0o777), id="all"),
        pytest.param(lambda root: root.parent.chmod(0o777), id="above"),
        pytest.param(lambda root: (root.rmdir(), root.parent.chmod(0o1777)), id="to-be-made"),
        pytest.param(
            lambda root: (os.chown(root, -1, OTHER), root.chmod(0o2775)), id="group", marks=as_root
        ),
        pytest.param(lambda root: os.chown(root, OTHER, -1), id="anothers", marks=as_root),
    ],
)
def test_programs_that_others_could_have_put_into_it_are_not_read(tmp_path, expose):
    root = tmp_path / "above/programs"
    root.mkdir(parents=True)
    expose(root)

    place, (note,) = set_aside(root)

    assert place is None
    assert note.startswith("JAX_COMPILATION_CACHE_DIR: no compiled programs are read there (")
    assert str(root.parent) in note


def test_programs_from_elsewhere_are_not_read():
    place, (note,) = set_aside("gs://bucket/programs?key=opensesame")

    assert place is None
    assert "opensesame" not in note


def test_where_our_own_folder_will_not_do_that_of_others_is_not_used_either(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for place in (theirs, ours):
        place.mkdir()
        place.chmod(0o777)
    jax.config.update("jax_compilation_cache_dir", str(theirs))

    place, notes = used(ours)

    assert place is None
    assert len(notes) == 2
