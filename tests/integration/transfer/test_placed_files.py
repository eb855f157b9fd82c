"""Links that appear during a fetch, second names of files, and a torrent's files beside tensors."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from users import OTHER, as_root

from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo
from grokctl.checkpoint.unfinished import read_unfinished
from grokctl.errors import FetchError, StalledError
from grokctl.events import Finished, Noted, Stage, Started
from grokctl.fetch import fetch, plan_fetch, seeding
from grokctl.repair import repair
from grokctl.verify import verify

TENSOR = "ckpt-0/tensor00003_000"


def notes_of(events) -> list[str]:
    return [event.message for event in events if isinstance(event, Noted)]


# --- what appears meanwhile


def file_linked(root, victim):
    (root / TENSOR).rename(victim / "aside")
    (root / TENSOR).symlink_to(victim / "aside")


def file_replaced(root, _):
    (root / TENSOR).unlink()
    (root / TENSOR).write_bytes(b"x" * 100_000)


def folder_linked(root, victim):
    (root / "ckpt-0").rename(victim / "ckpt-0")
    (root / "ckpt-0").symlink_to(victim / "ckpt-0")


def file_gone(root, _):
    (root / TENSOR).unlink()


def file_short(root, _):
    os.truncate(root / TENSOR, 10)


@pytest.mark.parametrize("moment", [Started, Finished])
@pytest.mark.parametrize(
    "plant", [file_linked, file_replaced, folder_linked, file_gone, file_short]
)
def test_what_is_replaced_while_it_arrives_is_not_called_complete(
    swarm, tmp_path, victim, plant, moment
):
    root = tmp_path / "got"

    def act(event):
        if isinstance(event, moment) and event.stage is Stage.FETCH:
            plant(root, victim)

    refused, is_complete = None, False
    try:
        is_complete = fetch(swarm.magnet, root, swarm.options(), observe=act).is_complete
    except FetchError as error:
        refused = error

    assert (victim / "secret").read_bytes() == b"precious"
    assert not isinstance(refused, StalledError)
    if refused is None:  # libtorrent wrote into the new file
        assert is_complete
        assert plant in {file_replaced, file_gone, file_short}
        swarm.assert_arrived(root)
        return
    assert str(root) in str(refused)
    assert read_unfinished(root).have == 0
    assert not (root / ".grokctl/resume").exists()


def test_the_same_bytes_in_a_new_file_are_fine(swarm, tmp_path):
    root = tmp_path / "got"

    def act(event):
        if event == Finished(stage=Stage.FETCH):
            shutil.copy(root / TENSOR, tmp_path / "copy")
            (tmp_path / "copy").replace(root / TENSOR)

    assert fetch(swarm.magnet, root, swarm.options(), observe=act).is_complete
    swarm.assert_arrived(root)


def test_files_are_there_before_libtorrent_opens_them_and_gone_if_nothing_arrives(
    swarm, torrent_file, tmp_path
):
    root, seen = tmp_path / "got", []

    def look(event):
        if isinstance(event, Started) and event.stage is Stage.FETCH:
            seen.extend(path.name for path in (root / "ckpt-0").iterdir())

    options = swarm.options(peers=(), stall_timeout_s=0.3)
    with pytest.raises(StalledError):
        fetch(str(torrent_file), root, options, observe=look)

    assert len(seen) == len(swarm.files) - 1
    assert sorted(path.name for path in root.iterdir()) == [".grokctl", "release.torrent"]


@pytest.fixture(scope="module")
def fetched(swarm, tmp_path_factory):
    root = tmp_path_factory.mktemp("fetched") / "got"
    fetch(swarm.magnet, root, swarm.options())
    return root


def to_all(folder):
    folder.chmod(0o777)


def to_a_group(folder):
    os.chown(folder, -1, OTHER)
    folder.chmod(0o2775)


def to_all_but_sticky(folder):
    folder.chmod(0o1777)


def to_its_owner(folder):
    os.chown(folder, OTHER, -1)


@as_root
@pytest.mark.parametrize("place", [".", "got", "got/ckpt-0", "got/.grokctl"])
@pytest.mark.parametrize("share", [to_all, to_a_group, to_all_but_sticky, to_its_owner])
def test_a_destination_that_others_can_lead_elsewhere_is_refused_or_named(
    swarm, fetched, tmp_path, share, place
):
    base, events = tmp_path / "base", []
    folder, root = base / place, base / "got"
    base.mkdir()
    is_dry = place.startswith("got/")
    if is_dry:
        shutil.copytree(fetched, root)
    folder.mkdir(exist_ok=True)
    share(folder)
    is_refused = share is to_all or (share is to_its_owner and place != ".")

    def download(**options):
        do = plan_fetch if is_dry else fetch
        do(swarm.magnet, root, swarm.options(**options), observe=events.append)

    if is_refused:
        before = list(base.rglob("*"))
        with pytest.raises(FetchError, match="overwrite files of yours elsewhere") as caught:
            download()
        assert str(folder.resolve()) in str(caught.value)
        assert f"chmod o-w {folder.resolve()}" in caught.value.hint or share is to_its_owner
        assert "--force" in caught.value.hint
        assert list(base.rglob("*")) == before
    events.clear()
    download(force=is_refused)

    said = [note for note in notes_of(events) if "other users can replace" in note]
    is_named = share is not to_all_but_sticky or place == "got"
    assert len(said) == is_named
    assert all(note.startswith(str(folder.resolve())) for note in said)
    if share is to_a_group:
        assert "make the fetch overwrite files of yours elsewhere" in said[0]
        assert f"chmod go-w {folder.resolve()}" in said[0]


@as_root
@pytest.mark.parametrize("kind", ["9p", "exfat", "cifs"])
@pytest.mark.parametrize("share", [to_all, to_its_owner])
def test_a_file_system_on_which_all_files_have_the_same_rights_is_named(
    swarm, tmp_path, share, kind, monkeypatch
):
    root, events = tmp_path / "got", []
    root.mkdir()
    share(root)
    monkeypatch.setattr("grokctl.transfer.exposure.file_system", lambda _: kind)

    plan_fetch(swarm.magnet, root, swarm.options(), observe=events.append)

    assert any("overwrite files of yours" in note for note in notes_of(events))


def test_folders_of_ones_own_are_not_named(swarm, tmp_path):
    events = []

    fetch(swarm.magnet, tmp_path / "got", swarm.options(), observe=events.append)

    assert not any("other users" in note for note in notes_of(events))


# --- what is seen while it arrives


def tensors_elsewhere(root, victim):
    folder = victim / "links"
    folder.mkdir()
    for path in (root / "ckpt-0").iterdir():
        (folder / path.name).symlink_to(victim / "secret")
    (root / "ckpt-0").rename(victim / "ckpt-0")
    folder.rename(root / "ckpt-0")


def private_elsewhere(root, victim):
    (root / ".grokctl").rename(victim / ".grokctl")
    (root / ".grokctl").mkdir()


def release_elsewhere(root, victim):
    root.rename(victim / "got")
    shutil.copytree(victim / "got", root)


def parts_linked(root, victim):
    (root / ".grokctl/.0123.parts").symlink_to(victim / "secret")


def parts_hard_linked(root, victim):
    (root / ".grokctl/.0123.parts").hardlink_to(victim / "secret")


FOLDERS = [tensors_elsewhere, private_elsewhere, release_elsewhere, parts_linked, parts_hard_linked]


@pytest.mark.parametrize("plant", FOLDERS)
def test_a_fetch_ends_as_soon_as_a_folder_leads_elsewhere(
    swarm, torrent_file, tmp_path, victim, plant
):
    root = tmp_path / "got"

    def act(event):
        if isinstance(event, Started) and event.stage is Stage.FETCH:
            plant(root, victim)

    options = swarm.options(peers=(), stall_timeout_s=10)
    with pytest.raises(FetchError, match="was replaced while it was fetched") as caught:
        fetch(str(torrent_file), root, options, observe=act)

    assert not isinstance(caught.value, StalledError)
    assert "ls -ld" in caught.value.hint
    assert (victim / "secret").read_bytes() == b"precious"


@pytest.mark.parametrize("plant", [Path.symlink_to, Path.hardlink_to])
def test_a_file_that_leads_elsewhere_is_seen_when_progress_is_saved(
    swarm, torrent_file, tmp_path, victim, plant, monkeypatch
):
    monkeypatch.setattr("grokctl.transfer.download._SAVE_EVERY_S", 0.0)
    root = tmp_path / "got"

    def act(event):
        if isinstance(event, Started) and event.stage is Stage.FETCH:
            (root / TENSOR).unlink()
            plant(root / TENSOR, victim / "secret")

    options = swarm.options(peers=(), stall_timeout_s=10)
    with pytest.raises(FetchError, match="was replaced while it was fetched") as caught:
        fetch(str(torrent_file), root, options, observe=act)

    assert not isinstance(caught.value, StalledError)
    assert (victim / "secret").read_bytes() == b"precious"


# --- second names


@pytest.mark.parametrize("how", ["fetch", "force", "repair", "longer"])
def test_a_file_with_a_second_name_is_copied_before_it_is_written_to(swarm, tmp_path, how):
    root, precious = tmp_path / "got", tmp_path / "precious"
    fetch(swarm.magnet, root, swarm.options())
    data = (root / TENSOR).read_bytes()
    other = data + b"more" if how == "longer" else bytes(len(data))
    precious.write_bytes(other)
    (root / TENSOR).unlink()
    (root / TENSOR).hardlink_to(precious)
    (root / ".grokctl/resume").unlink()

    if how == "repair":
        repair(root, verify(root), swarm.options())
    else:
        fetch(swarm.magnet, root, swarm.options(force=how == "force"))

    assert precious.read_bytes() == other
    assert (root / TENSOR).read_bytes() == data
    assert precious.stat().st_nlink == 1


def test_a_good_file_keeps_its_second_name(swarm, tmp_path):
    root = tmp_path / "got"
    fetch(swarm.magnet, root, swarm.options())
    (tmp_path / "backup").hardlink_to(root / TENSOR)

    fetch(swarm.magnet, root, swarm.options())

    assert (root / TENSOR).samefile(tmp_path / "backup")


def test_a_part_file_with_a_second_name_is_refused(swarm, tmp_path, victim):
    root = tmp_path / "got"
    fetch(swarm.magnet, root, swarm.options(only=("tensor00001*",)))
    parts = root / f".grokctl/.{swarm.metainfo.infohash}.parts"
    parts.unlink(missing_ok=True)
    parts.hardlink_to(victim / "secret")

    with pytest.raises(FetchError, match="hard links"):
        fetch(swarm.magnet, root, swarm.options())

    assert (victim / "secret").read_bytes() == b"precious"


# --- a torrent's other files

EXTRAS = {
    ".git/config": b"[core]\n\tfsmonitor = touch owned\n",
    "typer.py": b"raise SystemExit('owned')\n",
    "ckpt-0/__init__": b"x" * 20_000,
    "docs/LICENSE.txt": b"free",
}
NUMBERED = [name for name in EXTRAS if name != "docs/LICENSE.txt"]


@pytest.fixture
def laced(swarm, tmp_path):
    """A release with files that programs run or obey, and its torrent."""
    root = tmp_path / "laced"
    shutil.copytree(swarm.root, root)
    for name, data in EXTRAS.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    names = [*EXTRAS, *swarm.files]
    torrent = build_metainfo(root, names, name="laced", piece_length=16384)
    (tmp_path / "laced.torrent").write_bytes(torrent)
    return root, tmp_path / "laced.torrent"


def names_below(root) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_what_programs_run_or_obey_gets_a_number_and_is_proven_with_the_rest(
    swarm, laced, tmp_path
):
    source, path = laced
    root, events = tmp_path / "got", []

    with seeding(source, path.read_bytes()) as (host, port):
        options = swarm.options(peers=(f"{host}:{port}",))
        fetched = fetch(str(path), root, options, observe=events.append)
        again = fetch(str(path), root, options, observe=events.append)

    assert fetched.is_complete
    assert again.downloaded == 0
    assert set(fetched.extras) == {"config.json", "docs/LICENSE.txt"}
    there = names_below(root)
    assert there >= {f".grokctl/extra/{number}" for number in range(3)}
    assert there.isdisjoint(NUMBERED)
    said = [note for note in notes_of(events) if "number" in note]
    assert len(said) == 1
    assert all(name in said[0] for name in NUMBERED)
    assert verify(root).damage == ()
    (root / ".grokctl/extra/0").write_bytes(b"other")
    assert ".grokctl/extra/0" in {damage.file for damage in verify(root).damage}


def test_a_release_of_an_earlier_version_keeps_its_files_and_stays_proven(swarm, laced, tmp_path):
    source, path = laced
    root = tmp_path / "got"
    shutil.copytree(source, root)
    (root / "release.torrent").write_bytes(path.read_bytes())
    (root / ".grokctl").mkdir()
    assert verify(root).damage == ()

    options = swarm.options(peers=(), stall_timeout_s=0.3)
    fetched = fetch(str(path), root, options)

    assert fetched.is_complete
    assert (root / ".git/config").read_bytes() == EXTRAS[".git/config"]
    assert (root / ".grokctl/extra/0").read_bytes() == EXTRAS[".git/config"]
    assert parse_metainfo(path.read_bytes(), source="laced").files[0].path == (".git", "config")


@pytest.mark.parametrize("module", [["-m", "grokctl"], ["-mgrokctl"], ["-Bm", "grokctl"]])
def test_grokctl_imports_nothing_from_the_folder_it_is_started_in(tmp_path, module):
    for name in ("typer", "rich", "json", "re"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('owned')")
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}

    done = subprocess.run(
        [sys.executable, *module, "--version"],
        cwd=tmp_path, env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("grokctl ")


def test_another_module_that_uses_grokctl_keeps_its_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text("import grokctl")
    (tmp_path / "mine/__main__.py").write_text("import beside; print(beside.__file__)")
    (tmp_path / "beside.py").touch()

    done = subprocess.run(
        [sys.executable, "-m", "mine", "grokctl"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert done.stdout.strip() == str(tmp_path / "beside.py")
