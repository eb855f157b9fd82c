"""What others plant where a reshard writes: it is neither used, nor followed, nor deleted."""

import os
import shutil
import stat
from pathlib import Path

import pytest
from cuts import contents, cut, interrupt_at, kept_by, partial_of
from places import TWO_LAYERS
from users import OTHER, as_root, mode_of

from grokctl.checkpoint.release import open_release
from grokctl.errors import CorruptCheckpointError, UsageError
from grokctl.events import Finished, Noted, Stage
from grokctl.model.placement import MeshShape

MESH = MeshShape(1, 2)
FIRST = "device-00-of-02.safetensors"


@pytest.fixture(scope="module")
def release():
    return open_release(TWO_LAYERS)


@pytest.fixture(scope="module")
def whole(release, tmp_path_factory):
    return contents(cut(release, MESH, tmp_path_factory.mktemp("whole") / "out").root)


@pytest.fixture
def out(release, tmp_path):
    """Where a run stopped just before it published: a finished file, and a journal that fits."""

    def at_the_end(event):
        if event == Finished(stage=Stage.RESHARD):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut(release, MESH, tmp_path / "out", observe=at_the_end)
    return tmp_path / "out"


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- whose partial folder it is


def given_away(partial):
    os.chown(partial, OTHER, -1)


def open_to_all(partial):
    partial.chmod(0o777)


def open_to_a_group(partial):
    os.chown(partial, -1, OTHER)
    partial.chmod(0o770)


def linked(partial):
    elsewhere = partial.parent.parent / f"{partial.parent.name}-elsewhere"
    partial.rename(elsewhere)
    partial.symlink_to(elsewhere)


@as_root
@pytest.mark.parametrize("plant", [given_away, open_to_all, open_to_a_group, linked])
def test_a_folder_that_others_could_have_filled_is_not_continued(release, out, whole, plant):
    partial = partial_of(out)
    plant(partial)
    before, events = tree(partial.resolve()), []

    cut(release, MESH, out, observe=events.append)

    notes = [event.message for event in events if isinstance(event, Noted)]
    assert kept_by(events) == 0
    assert any(f"{partial}: " in note and "not continued" in note for note in notes)
    assert contents(out) == whole
    assert tree(partial.resolve()) == before
    assert sorted(path.name for path in out.parent.iterdir()) == sorted([partial.name, "out"])


@as_root
def test_a_run_beside_a_planted_folder_continues_its_own(release, out, whole):
    given_away(partial_of(out))
    with pytest.raises(KeyboardInterrupt):
        cut(release, MESH, out, observe=interrupt_at(40))
    events = []

    cut(release, MESH, out, observe=events.append)

    assert kept_by(events) > 0
    assert contents(out) == whole


def test_a_folder_of_ones_own_is_continued_whatever_others_may_read(release, out, whole):
    partial_of(out).chmod(0o755)
    events = []

    cut(release, MESH, out, observe=events.append)

    assert kept_by(events) > 0
    assert contents(out) == whole


@pytest.mark.parametrize("name", ["journal", FIRST])
@pytest.mark.parametrize("plant", [Path.symlink_to, Path.hardlink_to, "given-away"])
def test_a_file_in_it_that_is_anothers_is_not_written_to(
    release, out, tmp_path_factory, name, plant
):
    precious = tmp_path_factory.mktemp("precious") / "thesis"
    path = partial_of(out) / name
    shutil.copy(path, precious)
    before = precious.read_bytes()
    if plant == "given-away":
        if os.geteuid():
            pytest.skip("only root can be two users")
        os.chown(path, OTHER, -1)
    else:
        path.unlink()
        plant(path, precious)

    with pytest.raises(UsageError, match=r"symbolic link|names|another user"):
        cut(release, MESH, out)

    assert precious.read_bytes() == before
    assert not out.exists()


@pytest.mark.parametrize("name", ["SHA256SUMS", "grokctl.json"])
@pytest.mark.parametrize("plant", [Path.symlink_to, Path.hardlink_to])
def test_the_last_files_are_made_anew(release, out, whole, tmp_path_factory, name, plant):
    precious = tmp_path_factory.mktemp("precious") / "thesis"
    precious.write_text("mine")
    plant(partial_of(out) / name, precious)

    cut(release, MESH, out)

    assert precious.read_text() == "mine"
    assert contents(out) == whole


def test_a_folder_that_is_swapped_meanwhile_is_not_published(release, tmp_path):
    out = tmp_path / "out"

    def swap(event):
        if event == Finished(stage=Stage.RESHARD):
            partial = partial_of(out)
            partial.rename(tmp_path / "aside")
            shutil.copytree(tmp_path / "aside", partial)

    with pytest.raises(UsageError, match="was replaced by somebody"):
        cut(release, MESH, out, observe=swap)

    assert not out.exists()


# --- another folder of this user's, renamed to the name of a partial one


def thesis_in(folder: Path, *names: str) -> Path:
    """A private folder of this user's with work in it."""
    path = folder / "thesis"
    (path / "sub").mkdir(parents=True, mode=0o700)
    path.chmod(0o700)
    for name in ("chapter1", "sub/notes", *names):
        (path / name).write_text("years")
    if names == ("journal",):
        shutil.rmtree(path / "sub")
        (path / "chapter1").unlink()
    return path


@pytest.mark.parametrize(
    "names", [(), ("journal",), ("journal", FIRST), ("tokenizer.model", "SHA256SUMS")]
)
@pytest.mark.parametrize("mode", [0o777, 0o755])
def test_a_folder_without_a_mark_is_neither_continued_nor_opened_nor_deleted(
    two_layers, tmp_path, names, mode
):
    shared, source, events = tmp_path / "shared", open_release(two_layers), []
    shared.mkdir()
    with pytest.raises(KeyboardInterrupt):
        cut(source, MESH, shared / "out", observe=interrupt_at(2))
    usual = partial_of(shared / "out")
    shutil.rmtree(usual)
    thesis_in(shared, *names).rename(usual)
    shared.chmod(mode)
    before = tree(usual)

    def alter(event):
        events.append(event)
        if event == Finished(stage=Stage.RESHARD):  # the reshard deletes what it has written
            path = next((two_layers / "ckpt-0").iterdir())
            path.write_bytes(path.read_bytes())

    with pytest.raises(CorruptCheckpointError):
        cut(source, MESH, shared / "out", observe=alter)
    cut(open_release(two_layers), MESH, shared / "out")

    assert tree(usual) == before
    assert mode_of(usual) == 0o700
    assert [path.name for path in shared.iterdir() if path.name != "out"] == [usual.name]
    notes = [event.message for event in events if isinstance(event, Noted)]
    assert any("no mark of grokctl, so it is not continued" in note for note in notes)


def test_a_partial_folder_with_the_mark_of_another_is_not_continued(release, out, whole):
    partial, events = partial_of(out), []
    with pytest.raises(KeyboardInterrupt):
        cut(release, MESH, out.with_name("other"), observe=interrupt_at(40))
    shutil.rmtree(partial)
    partial_of(out.with_name("other")).rename(partial)

    cut(release, MESH, out, observe=events.append)

    assert kept_by(events) == 0
    assert contents(out) == whole
    assert (partial / "journal").exists()


@pytest.mark.parametrize("more", [None, "notes"])
def test_a_copy_of_a_partial_folder_is_continued_if_all_in_it_is_of_one(release, out, whole, more):
    partial, events = partial_of(out), []
    partial.rename(out.parent / "aside")
    shutil.copytree(out.parent / "aside", partial)
    if more is not None:
        (partial / more).touch()

    cut(release, MESH, out, observe=events.append)

    assert (kept_by(events) > 0) == (more is None)
    assert contents(out) == whole


@pytest.mark.parametrize("more", [None, "SHA256SUMS", "notes"])
def test_a_partial_folder_of_an_earlier_version_is_continued_if_all_in_it_is_of_one(
    release, out, whole, more
):
    partial, events = partial_of(out), []
    (partial / ".made-by-grokctl").unlink()
    if more is not None:
        (partial / more).touch()

    cut(release, MESH, out, observe=events.append)

    assert (kept_by(events) > 0) == (more != "notes")
    assert contents(out) == whole


@pytest.mark.parametrize("mode", [0o777, 0o2775, 0o1777, 0o755])
def test_the_name_cannot_be_guessed_where_others_could_give_it_away(release, tmp_path, whole, mode):
    if os.geteuid():
        pytest.skip("only root can be two users")
    shared, events = tmp_path / "shared", []
    shared.mkdir()
    os.chown(shared, -1, OTHER)
    shared.chmod(mode)
    with pytest.raises(KeyboardInterrupt):
        cut(release, MESH, shared / "out", observe=interrupt_at(40))
    name = partial_of(shared / "out").name

    cut(release, MESH, shared / "out", observe=events.append)

    assert (len(name.split(".")) == len(["", "out", "0123", "partial"]) + 1) == (
        mode in {0o777, 0o2775}
    )
    assert kept_by(events) > 0
    assert contents(shared / "out") == whole
    assert [path.name for path in shared.iterdir()] == ["out"]


def test_notes_of_the_user_in_a_partial_folder_stay_when_it_is_deleted(two_layers, tmp_path):
    source, out = open_release(two_layers), tmp_path / "out"

    def alter(event):
        if event == Finished(stage=Stage.RESHARD):
            (partial_of(out) / "notes").write_text("mine")
            (partial_of(out) / "tokenizer.model").mkdir()
            path = next((two_layers / "ckpt-0").iterdir())
            path.write_bytes(path.read_bytes())

    with pytest.raises((CorruptCheckpointError, UsageError)):
        cut(source, MESH, out, observe=alter)

    assert (partial_of(out) / "notes").read_text() == "mine"
    assert (partial_of(out) / ".made-by-grokctl").exists()


@pytest.mark.parametrize("name", [FIRST, "tokenizer.model"])
def test_nothing_with_our_names_is_taken_or_replaced_in_a_shared_folder(release, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o777)
    with pytest.raises(KeyboardInterrupt):
        cut(release, MESH, out, observe=interrupt_at(40))
    (out / name).write_text("years")  # of this user, renamed by another

    with pytest.raises(UsageError, match="is there already"):
        cut(release, MESH, out)

    assert (out / name).read_text() == "years"


@pytest.mark.parametrize("is_forced", [False, True])
def test_another_checkpoint_with_the_name_of_a_replaced_one_stays(
    release, whole, tmp_path, is_forced
):
    shared = tmp_path / "shared"
    shared.mkdir()
    other = cut(release, MESH, tmp_path / "other").root
    if is_forced:
        cut(release, MESH, shared / "out")
    with pytest.raises(KeyboardInterrupt):
        cut(release, MESH, shared / "out", force=is_forced, observe=interrupt_at(2))
    replaced = partial_of(shared / "out").with_suffix(".replaced")
    other.rename(replaced)
    shared.chmod(0o777)

    cut(release, MESH, shared / "out", force=is_forced)

    assert contents(replaced) == contents(shared / "out") == whole
    assert sorted(path.name for path in shared.iterdir()) == sorted([replaced.name, "out"])


# --- modes


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
@pytest.mark.parametrize("inherited", [0, stat.S_ISGID])
def test_it_is_private_while_it_grows_and_follows_the_umask_at_the_end(
    release, tmp_path, umask, inherited
):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o775 | inherited)
    seen = set()

    def look(_event):
        seen.update(mode_of(path) & 0o777 for path in shared.glob(".out.*.partial"))

    before = os.umask(umask)
    try:
        cut(release, MESH, shared / "out", observe=look)
    finally:
        os.umask(before)

    assert seen == {0o700}
    assert mode_of(shared / "out") == 0o777 & ~umask | inherited
    files = [path for path in (shared / "out").rglob("*") if path.is_file()]
    assert {mode_of(path) for path in files} == {0o666 & ~umask}


# --- into a folder that is there


@as_root
def test_files_of_others_in_the_folder_to_fill_are_replaced_and_not_taken(release, whole, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        cut(release, MESH, out, observe=interrupt_at(40))
    (partial,) = out.glob(".*.partial")
    (partial / FIRST).rename(out / FIRST)  # as if killed while it was published
    os.chown(out / FIRST, OTHER, -1)
    events = []

    cut(release, MESH, out, observe=events.append)

    assert kept_by(events) == 0
    assert contents(out) == whole
    assert (out / FIRST).stat().st_uid == os.geteuid()


# --- what is replaced by force


def plant_folder(path: Path) -> Path:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        path.mkdir()
    (path / "mine").write_text("mine")
    return path / "mine"


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "journal", FIRST, ".grokctl/mine", "SHA256SUMS"]
)
@pytest.mark.parametrize("fills", [False, True])
def test_force_deletes_nothing_inside_folders_with_our_names(release, tmp_path, name, fills):
    out = tmp_path / "out"
    cut(release, MESH, out)
    mine = plant_folder(out / name)
    if fills:
        (out / ".x.partial").mkdir()
        (out / "grokctl.json").unlink()

    with pytest.raises(UsageError, match=r"did not write|exists, and is not"):
        cut(release, MESH, out, force=True)

    assert mine.read_text() == "mine"


def test_a_folder_with_the_name_of_a_file_is_never_ours(release, tmp_path):
    out = tmp_path / "out"
    cut(release, MESH, out)
    (out / "tokenizer.model").mkdir()
    (out / "tokenizer.model/lock").touch()

    with pytest.raises(UsageError, match=r"'tokenizer\.model', which grokctl did not write"):
        cut(release, MESH, out, force=True)


@pytest.mark.parametrize("name", ["notes", "tokenizer.model", ".grokctl"])
def test_what_appears_in_a_checkpoint_while_it_is_replaced_stays(
    release, whole, tmp_path, name, monkeypatch
):
    out = tmp_path / "out"
    cut(release, MESH, out)
    rename, events = os.rename, []

    def plant(source, target, **folders):
        if target.endswith(".replaced"):
            plant_folder(out / name)
        rename(source, target, **folders)

    monkeypatch.setattr(os, "rename", plant)
    cut(release, MESH, out, force=True, observe=events.append)

    (kept,) = tmp_path.glob(".out.*.replaced")
    assert (kept / name / "mine").read_text() == "mine"
    assert any(str(kept) in event.message for event in events if isinstance(event, Noted))
    assert contents(out) == whole


def test_records_of_grokctl_are_replaced_with_the_checkpoint(release, whole, tmp_path):
    out = tmp_path / "out"
    cut(release, MESH, out)
    for name in ("refusal.json", ".refusal.json.0123abcd", "lock"):
        (out / ".grokctl" / name).touch()

    cut(release, MESH, out, force=True)

    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("plant", [plant_folder, lambda path: path.symlink_to(path.parent)])
def test_a_planted_name_for_what_is_replaced_stays(release, out, whole, plant):
    replaced = partial_of(out).with_suffix(".replaced")
    cut(release, MESH, out)
    plant(replaced)

    cut(release, MESH, out, force=True)

    assert os.path.lexists(replaced)
    assert contents(out) == whole


# --- a tokenizer that is a link


@pytest.mark.parametrize(("mode", "copied"), [(0o600, 0o600), (0o644, 0o644)])
def test_a_linked_tokenizer_is_copied_for_those_who_could_read_it(
    two_layers, tmp_path, mode, copied
):
    secret = tmp_path / "secret"
    secret.write_text("a tokenizer")
    secret.chmod(mode)
    (two_layers / "tokenizer.model").symlink_to(secret)

    ready = cut(open_release(two_layers), MESH, tmp_path / "out")

    assert mode_of(ready.root / "tokenizer.model") == copied


@as_root
def test_another_users_link_to_a_private_tokenizer_is_refused_before_anything_is_written(
    two_layers, tmp_path
):
    secret = tmp_path / "secret"
    secret.write_text("a tokenizer")
    secret.chmod(0o600)
    (two_layers / "tokenizer.model").symlink_to(secret)
    os.lchown(two_layers / "tokenizer.model", OTHER, -1)

    with pytest.raises(UsageError, match="another user's link") as caught:
        cut(open_release(two_layers), MESH, tmp_path / "out")

    assert "ls -ld" in caught.value.hint
    assert not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize("mode", [0o755, 0o1777, 0o777])
def test_a_destination_that_others_can_replace_is_named(release, tmp_path, mode):
    shared, events = tmp_path / "shared", []
    shared.mkdir()
    shared.chmod(mode)

    cut(release, MESH, shared / "out", observe=events.append)

    notes = [event.message for event in events if isinstance(event, Noted)]
    said = [note for note in notes if f"{shared} can be written by others" in note]
    assert len(said) == (mode == 0o777)
