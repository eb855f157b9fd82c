"""`grokctl list` and `grokctl remove`: what is under home, and only what grokctl made goes."""

import os
import shutil

import pytest

from grokctl.paths import kind_of


@pytest.fixture(scope="module")
def filled(grokctl, seeded, tmp_path_factory):
    """A home with a fetched release, one that was copied there, and a ready checkpoint."""
    home = tmp_path_factory.mktemp("list") / "home"
    nobody = ("--no-dht", "--no-lsd", "--peer", seeded.peer)
    fetched = grokctl("fetch", seeded.magnet, *nobody, "--home", home, "--json").result
    shutil.copytree(seeded.root, home / "releases" / "copied")
    assert grokctl("verify", fetched["release"], "--json").result["proven"]
    assert grokctl("reshard", "words", "--devices", 2, "--home", home).exit_code == 0
    (home / "cache" / "native").mkdir(parents=True)
    (home / "cache" / "native" / "kernel.so").write_bytes(b"x" * 5000)
    return home


@pytest.fixture
def copy(filled, tmp_path):
    """The same, with other inodes: nothing in it is proven any more."""
    shutil.copytree(filled, tmp_path / "home", symlinks=True)
    return tmp_path / "home"


def listed(grokctl, home):
    outcome = grokctl("list", "--home", home, "--json").result
    assert outcome["home"] == str(home)
    assert outcome["bytes"] == sum(each["bytes"] for each in outcome["kept"])
    return {each["name"]: each for each in outcome["kept"]}


def test_a_list_has_size_mesh_precision_proof_and_last_use(grokctl, seeded, filled):
    kept = listed(grokctl, filled)

    assert list(kept) == [
        "releases/copied",
        "releases/words",
        "ready/words-int8-2",
        "cache/native",
    ]
    release, ready = kept["releases/words"], kept["ready/words-int8-2"]
    assert (release["kind"], release["state"], release["proven_by"]) == (
        *("release", "complete"),
        "infohash",
    )
    assert seeded.nbytes < release["bytes"] < seeded.nbytes + 100_000
    assert release["last_use"][:2] == "20"
    assert (ready["kind"], ready["devices"], ready["mesh"]) == ("ready", 2, "model=2")
    assert (ready["precision"], ready["proven"]) == ("int8", True)
    assert kept["releases/copied"]["proven_by"] is None
    assert (kept["cache/native"]["kind"], kept["cache/native"]["bytes"]) == ("cache", 4096 + 904)
    text = grokctl("list", "--home", filled).stdout
    assert "ready/words-int8-2" in text
    assert "not proven" in text
    assert grokctl("list", "--home", filled, "-q").stdout.split() == list(kept)


def test_what_is_unfinished_or_damaged_is_listed_as_that(grokctl, copy):
    (copy / "ready/words-int8-2/grokctl.json").write_text("{}")
    (copy / "ready/.words.0123456789ab.partial").mkdir()
    (copy / "exports/no-manifest").mkdir(parents=True)

    kept = listed(grokctl, copy)

    states = {name: each["state"] for name, each in kept.items()}
    assert states["ready/words-int8-2"] == "damaged"
    assert states["ready/.words.0123456789ab.partial"] == "unfinished"
    assert states["exports/no-manifest"] == "unfinished"
    assert kept["ready/.words.0123456789ab.partial"]["kind"] == "partial"


def test_an_empty_home_is_no_error(grokctl, tmp_path):
    assert listed(grokctl, tmp_path / "none") == {}
    assert "grokctl fetch" in grokctl("list", "--home", tmp_path / "none").stdout


@pytest.mark.parametrize(
    "name", ["releases/words", "words", "ready/words-int8-2", "words-int8-2", "cache/native"]
)
def test_what_grokctl_made_is_gone(grokctl, copy, name):
    before = listed(grokctl, copy)
    (full,) = [each for each in before if each == name or each.endswith(f"/{name}")]

    result = grokctl("remove", name, "--yes", "--home", copy, "--json").result

    assert result == {
        "removed": full,
        "kind": before[full]["kind"],
        "bytes": before[full]["bytes"],
        "left": [],
    }
    assert not (copy / full).exists()
    assert listed(grokctl, copy).keys() == before.keys() - {full}


def test_other_files_and_what_links_lead_to_stay(grokctl, copy, tmp_path):
    root, outside = copy / "releases/words", tmp_path / "outside"
    outside.mkdir()
    moved = outside / "tensor"
    shutil.move(root / "ckpt-0/tensor00002_000", moved)
    (root / "ckpt-0/tensor00002_000").symlink_to(moved)
    (root / "notes.txt").write_text("mine")
    (root / "more").symlink_to(outside)

    result = grokctl("remove", "releases/words", "--yes", "--home", copy, "--json").result

    assert result["left"] == ["ckpt-0/tensor00002_000", "more", "notes.txt"]
    assert moved.stat().st_size > 0
    assert sorted(path.name for path in (root / "ckpt-0").iterdir()) == ["tensor00002_000"]
    assert not (root / ".grokctl").exists()
    assert not (root / "release.torrent").exists()


def test_files_of_others_in_a_ready_checkpoint_stay(grokctl, copy):
    root = copy / "ready/words-int8-2"
    (root / "notes.txt").write_text("mine")

    outcome = grokctl("remove", "words-int8-2", "--yes", "--home", copy)

    assert "notes.txt" in outcome.stdout
    assert [path.name for path in root.iterdir()] == ["notes.txt"]


def test_a_release_that_grokctl_did_not_fetch_stays(grokctl, copy):
    outcome = grokctl("remove", "copied", "--yes", "--home", copy)

    assert outcome.exit_code == 2
    assert "was not fetched by grokctl" in outcome.error
    assert kind_of(copy / "releases/copied") == "release"


def test_a_link_is_not_followed(grokctl, copy, tmp_path):
    shutil.move(copy / "ready/words-int8-2", tmp_path / "elsewhere")
    (copy / "ready/words-int8-2").symlink_to(tmp_path / "elsewhere")

    outcome = grokctl("remove", "words-int8-2", "--yes", "--home", copy)

    link = listed(grokctl, copy)["ready/words-int8-2"]
    assert (link["link"], link["bytes"]) == (str(tmp_path / "elsewhere"), 0)
    assert outcome.exit_code == 2
    assert "symbolic link" in outcome.error
    assert outcome.hint.startswith("rm ")
    assert kind_of(tmp_path / "elsewhere") == "ready"


def test_a_partial_folder_goes_only_with_its_mark(grokctl, copy):
    partial = copy / "ready/.words.0123456789ab.partial"
    partial.mkdir()
    (partial / "journal").write_bytes(b"")

    refused = grokctl("remove", f"ready/{partial.name}", "--yes", "--home", copy)
    (partial / ".made-by-grokctl").write_text(f"{partial.name}\n{partial.stat().st_ino}\n")
    removed = grokctl("remove", f"ready/{partial.name}", "--yes", "--home", copy)

    assert refused.exit_code == 2
    assert "no mark" in refused.error
    assert removed.exit_code == 0, removed
    assert not partial.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("nothing", "nothing under", id="unknown"),
        pytest.param("/etc", "nothing under", id="elsewhere"),
        pytest.param("releases/../releases/words", "nothing under", id="dots"),
        pytest.param("", "nothing under", id="empty"),
    ],
)
def test_a_name_is_one_of_the_list(grokctl, copy, name, message):
    outcome = grokctl("remove", name, "--yes", "--home", copy)

    assert outcome.exit_code == 2
    assert message in outcome.error
    assert outcome.hint == f"grokctl list --home {copy}"


def test_a_name_that_two_have_is_refused(grokctl, copy):
    shutil.copytree(copy / "ready/words-int8-2", copy / "ready/words")

    outcome = grokctl("remove", "words", "--yes", "--home", copy)

    assert outcome.exit_code == 2
    assert "releases/words, ready/words" in outcome.error
    assert outcome.hint == f"grokctl remove releases/words --home {copy}"


def test_without_a_terminal_nobody_is_asked(grokctl, copy):
    outcome = grokctl("remove", "copied", "--home", copy)

    assert outcome.exit_code == 2
    assert outcome.hint == f"grokctl remove copied --home {copy} --yes"


def test_a_name_that_starts_with_a_dash_is_an_argument_after_two(grokctl, copy):
    (copy / "ready/words-int8-2").rename(copy / "ready/--yes")

    asked = grokctl("remove", "--home", copy, "--", "--yes")
    removed = grokctl("remove", "--home", copy, "--yes", "--", "--yes")

    assert asked.exit_code == 2
    assert asked.hint == f"grokctl remove --home {copy} --yes -- --yes"
    assert removed.exit_code == 0, removed
    assert not (copy / "ready/--yes").exists()


def test_the_links_to_a_release_elsewhere_go_and_the_release_stays(grokctl, seeded, copy, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(seeded.root, elsewhere)
    files = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    proving = ("--torrent-file", seeded.torrent, "--home", copy)
    assert grokctl("verify", elsewhere, *proving).exit_code == 0
    (name,) = [name for name, each in listed(grokctl, copy).items() if each["kind"] == "links"]

    removed = grokctl("remove", name, "--yes", "--home", copy)

    assert removed.exit_code == 0, removed
    assert not (copy / name).exists()
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(("answer", "is_gone"), [("y\n", True), ("\n", False), ("no\n", False)])
def test_at_a_terminal_it_asks(process, copy, answer, is_gone):
    leader, follower = os.openpty()
    try:
        with process.start("remove", "cache/native", "--home", copy, stdin=follower) as running:
            os.write(leader, answer.encode())
            out, err = running.communicate(timeout=60)
    finally:
        os.close(leader)
        os.close(follower)

    assert running.returncode == 0, err
    assert "remove" in out + err
    assert (copy / "cache/native").exists() != is_gone


def test_a_shell_completes_commands_and_names(process, copy):
    def completed(words: str, at: int) -> list[str]:
        return process.run(
            env=process.environment(
                _GROKCTL_COMPLETE="complete_bash",
                COMP_WORDS=words,
                COMP_CWORD=str(at),
                GROKCTL_HOME=str(copy),
            ),
            code="import sys; sys.argv = ['grokctl']",
        ).stdout.split()

    assert completed("grokctl re", 1) == ["reshard", "remove"]
    assert completed("grokctl inspect wo", 2) == ["words", "words-int8-2"]
    assert completed("grokctl remove rel", 2) == ["releases/copied", "releases/words"]
