"""Releases that cannot keep a proof or have another shape, and outputs that are links."""

import os
from pathlib import Path

import pytest
from copies import TENSOR, copied, flip
from mounts import remount, tmpfs


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A home for the proofs of one test."""
    monkeypatch.setenv("GROKCTL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def fetched(seeded, root: Path) -> Path:
    """The release as grokctl has fetched it, not verified yet."""
    copied(seeded, root)
    root.chmod(0o755)  # a new file system is open to all
    (root / "release.torrent").write_bytes(seeded.torrent.read_bytes())
    return root


def refuse_writes(root: Path, how: str) -> None:
    """Let nobody keep a proof in a release that counts."""
    private = root / ".grokctl"
    if how == "linked":
        private.symlink_to(root.parent)
    elif how == "open to others":
        private.mkdir()
        private.chmod(0o777)
    elif how == "read-only":
        remount(root, "ro")


@pytest.mark.parametrize("how", ["read-only", "linked", "open to others"])
@pytest.mark.usefixtures("own")
def test_what_grokctl_fetched_is_proven_under_home_where_it_cannot_keep_a_proof(
    grokctl, seeded, tmp_path, how
):
    with tmpfs(tmp_path / "disk", "size=64m") as disk:
        root = fetched(seeded, disk)
        refuse_writes(root, how)

        before = grokctl("inspect", root, "--json")
        unnamed = grokctl("verify", root, "--json")
        proven = grokctl("verify", root, "--torrent-file", root / "release.torrent", "--json")
        again = grokctl("verify", root, "--json")
        after = grokctl("inspect", root, "--json")

    assert not before.result["proven"]
    assert not unnamed.result["proven"]
    assert "nobody has named it here" in unnamed.result["doubt"]
    assert proven.result["spared_files"] == len(seeded.files)
    assert (proven.exit_code, proven.result["proven"]) == (0, True), proven.stderr
    assert "cannot be written" not in proven.stderr
    assert proven.result["checkpoint"] == str(root)
    assert again.result["spared_files"] == len(seeded.files)
    assert after.result["proven"], after.stdout


@pytest.mark.usefixtures("own")
def test_a_proof_from_before_moves_along_and_a_repair_works_under_home(
    grokctl, seeded, loopback, tmp_path
):
    with tmpfs(tmp_path / "disk", "size=64m") as disk:
        root = fetched(seeded, disk)
        grokctl("verify", root, "--torrent-file", root / "release.torrent")
        remount(root, "ro")
        moved = grokctl("verify", root, "--json")
        remount(root, "rw")
        bad = flip(root / TENSOR)
        remount(root, "ro")

        refused = grokctl("verify", root)
        mended = grokctl("verify", root, "--repair", *loopback, "--peer", seeded.peer)
        good = grokctl("inspect", root, "--json")
        kept = (root / TENSOR).read_bytes()

    assert moved.result["spared_files"] == len(seeded.files)
    assert refused.hint == f"grokctl verify {root} --repair"
    assert mended.exit_code == 0, mended.stderr
    assert good.result["proven"]
    assert kept == bad


@pytest.mark.usefixtures("own")
def test_a_torrent_that_others_could_have_planted_proves_nothing_under_home(
    grokctl, seeded, tmp_path, own
):
    root = fetched(seeded, tmp_path / "shared")
    (root / "release.torrent").chmod(0o666)
    root.chmod(0o777)

    outcome = grokctl("verify", root, "--json")

    assert not outcome.result["proven"]
    assert not own.exists()


@pytest.mark.usefixtures("own")
def test_a_new_torrent_in_the_folder_counts_and_not_the_one_under_home(grokctl, seeded, tmp_path):
    with tmpfs(tmp_path / "disk", "size=64m") as disk:
        root = fetched(seeded, disk)
        remount(root, "ro")
        grokctl("verify", root)
        remount(root, "rw")
        (root / "release.torrent").write_bytes(b"d4:infod6:lengthi1ee")

        outcome = grokctl("verify", root)

    assert outcome.exit_code == 20
    assert "release.torrent" in outcome.error


# --- names in messages


def other_shape(seeded, root: Path, shape: str) -> Path:
    """A release whose tensors are not in `ckpt-0` of its folder; returns the folder of them."""
    copied(seeded, root)
    if shape == "ckpt":
        return (root / "ckpt-0").rename(root / "ckpt")
    if shape == "linked":
        there = (root / "ckpt-0").rename(root.parent / "elsewhere")
        (root / "ckpt-0").symlink_to(there)
        return root / "ckpt-0"
    (root / "checkpoints").mkdir()
    return (root / "ckpt-0").rename(root / "checkpoints" / "ckpt-0")


@pytest.mark.parametrize("verb", [("verify",), ("inspect",), ("run", "-n", 1, "-p", "x")])
@pytest.mark.parametrize("shape", ["ckpt", "reference repository"])
def test_no_message_names_the_folder_of_links(
    grokctl, seeded, tmp_path, own, monkeypatch, verb, shape
):
    monkeypatch.chdir(tmp_path)
    tensors = other_shape(seeded, tmp_path / "f1", shape)
    named = (verb[0], "f1", *verb[1:])

    outcomes = [grokctl("verify", "f1")]
    planned = grokctl("reshard", "f1", "--devices", 1, "--json", "--out", tmp_path / "out")
    (tensors / "tensor00003_000").unlink()
    outcomes += [grokctl(*named), grokctl(*named, "--json"), grokctl(*named, "-q")]

    assert planned.exit_code == 0
    assert "(grokctl verify f1)" in planned.stderr
    assert str(own / "adopted") not in planned.stdout + planned.stderr
    for outcome in outcomes:
        assert outcome.exit_code in {2, 20}
        assert str(own) not in outcome.stdout + outcome.stderr
    assert outcomes[0].hint.startswith(f"grokctl verify {tmp_path / 'f1'} --torrent-file FILE")
    name = tmp_path / "f1" if verb == ("verify",) else "f1"
    assert outcomes[1].hint == f"grokctl verify {name} --torrent-file FILE.torrent --repair"


def test_a_torrent_for_the_folder_of_links_proves_the_release_itself(
    grokctl, seeded, tmp_path, own
):
    other_shape(seeded, tmp_path / "f1", "ckpt")
    grokctl("verify", tmp_path / "f1")
    (links,) = (own / "adopted").glob("*/f1")

    grokctl("verify", links, "--torrent-file", seeded.torrent)
    outcome = grokctl("verify", tmp_path / "f1", "--json")

    assert outcome.result["proven"]
    assert len(list((own / "adopted").iterdir())) == 1


@pytest.mark.parametrize("shape", ["ckpt", "reference repository", "linked"])
@pytest.mark.usefixtures("own")
def test_a_fetch_into_a_release_of_another_shape_fetches_nothing_twice(
    grokctl, seeded, loopback, tmp_path, shape
):
    root = tmp_path / "f1"
    tensors = other_shape(seeded, root, shape)
    (tensors / "tensor00003_000").unlink()
    before = sorted(tmp_path.rglob("*"))
    fetch = ("fetch", seeded.torrent, "--to", root, "--force", *loopback, "--stall-timeout", 1)

    planned = grokctl(*fetch, "--dry-run")
    refused = grokctl(*fetch)
    hint = refused.hint.partition("  #")[0].split()
    mended = grokctl(*hint[1:], *loopback, "--peer", seeded.peer, "--json")

    assert (planned.exit_code, refused.exit_code) == (10, 10)
    assert str(tensors) in refused.error
    assert mended.result["proven"], mended.stderr
    assert mended.result["downloaded_bytes"] < seeded.nbytes / 2
    assert [path for path in before if not path.exists()] == []
    assert not (tensors / "tensor00003_000").exists()


@pytest.mark.usefixtures("own")
def test_the_folder_of_tensors_is_no_destination_of_a_fetch(grokctl, seeded, loopback, tmp_path):
    root = copied(seeded, tmp_path / "f1")
    (root / TENSOR).unlink()

    refused = grokctl("fetch", seeded.torrent, "--to", root / "ckpt-0", "--force", *loopback)

    assert refused.exit_code == 10
    assert refused.hint.startswith(f"grokctl fetch {seeded.torrent} --to {root} --force")
    assert not (root / "ckpt-0" / "ckpt-0").exists()


@pytest.mark.usefixtures("own")
def test_tensors_behind_a_link_are_seeded_and_not_written_to(grokctl, seeded, loopback, tmp_path):
    root = tmp_path / "f1"
    tensors = other_shape(seeded, root, "linked")
    before = {path: path.stat().st_ctime_ns for path in tensors.iterdir()}
    seed = ("--force", "--seed-ratio", "0.000001", "--dry-run")

    outcome = grokctl("fetch", seeded.torrent, "--to", root, *loopback, *seed)

    assert outcome.exit_code == 0, outcome.stderr
    assert f"{root}: its tensors are behind a link" in outcome.stderr
    assert {path: path.stat().st_ctime_ns for path in tensors.iterdir()} == before


@pytest.mark.parametrize("value", ["http://127.0.0.1:9/?x=1", "http://h/#x", "nonsense", "'x'"])
@pytest.mark.usefixtures("own")
def test_a_bad_address_of_the_hub_is_blamed_on_its_variable(
    grokctl, seeded, tmp_path, monkeypatch, value
):
    monkeypatch.setenv("HF_ENDPOINT", value)

    outcome = grokctl("fetch", seeded.torrent, "--to", tmp_path / "got", "--mirror", "hf")

    assert outcome.exit_code == 2
    assert outcome.error.startswith("HF_ENDPOINT ")
    assert outcome.hint == "unset HF_ENDPOINT"


@pytest.mark.usefixtures("own")
def test_a_link_that_another_client_left_is_named_and_not_followed(
    grokctl, seeded, loopback, tmp_path
):
    root = copied(seeded, tmp_path / "local")
    whole = (root / TENSOR).rename(tmp_path / "whole")
    (root / f"{TENSOR}.!qB").symlink_to(whole)
    source = (*loopback, "--peer", seeded.peer)

    outcome = grokctl("fetch", seeded.torrent, "--to", root, "--force", *source)

    assert outcome.exit_code == 0, outcome.stderr
    assert f"{root / TENSOR}.!qB: left by another program, not used" in outcome.stderr
    assert not (root / TENSOR).is_symlink()


@pytest.mark.parametrize("name", ["tensor00003_000", "NVsW7Wtj0drl781RuftgZk2Fzqk="])
@pytest.mark.usefixtures("own")
def test_what_the_hubs_client_began_is_taken_over(grokctl, seeded, loopback, tmp_path, name):
    root = copied(seeded, tmp_path / "local")
    downloads = root / ".cache" / "huggingface" / "download" / "ckpt-0"
    downloads.mkdir(parents=True)
    (root / TENSOR).rename(downloads / f"{name}.0af3.incomplete")

    outcome = grokctl("fetch", seeded.torrent, "--to", root, "--force", *loopback, "--json")

    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.result["downloaded_bytes"] == 0


# --- an output that is a link


@pytest.mark.parametrize("through", ["link", "two links", "link to lost+found"])
def test_a_reshard_fills_the_empty_folder_behind_a_link_of_ones_own(
    grokctl, home, tmp_path, through
):
    target, link = tmp_path / "target", tmp_path / "out"
    target.mkdir()
    if through == "two links":
        (tmp_path / "second").symlink_to(target)
    elif through == "link to lost+found":
        (target / "lost+found").mkdir()
    link.symlink_to("second" if through == "two links" else target)

    outcome = grokctl("reshard", "words", "--home", home, "--devices", 1, "--out", link)

    assert outcome.exit_code == 0, outcome.stderr
    assert link.is_symlink()
    assert (target / "grokctl.json").is_file()


@pytest.mark.parametrize("what", ["filled", "nothing", "another user's", "loop"])
def test_a_reshard_says_why_it_fills_no_other_link(grokctl, home, tmp_path, what):
    target, link = tmp_path / "target", tmp_path / "out"
    target.mkdir()
    if what == "filled":
        (target / "file").write_text("mine")
    link.symlink_to({"nothing": "gone", "loop": "out"}.get(what, "target"))
    if what == "another user's":
        if os.geteuid():
            pytest.skip("only root may give a link away")
        os.chown(link, 12345, 12345, follow_symlinks=False)
    before = sorted(target.iterdir())

    for more in ((), ("--dry-run",), ("--force",)):
        outcome = grokctl("reshard", "words", "--home", home, "--devices", 1, "--out", link, *more)

        assert outcome.exit_code == 2, outcome.stderr
        assert outcome.error.startswith(f"{link}: is a symbolic link, expected")
    assert sorted(target.iterdir()) == before


def test_a_reshard_without_a_release_names_the_ready_checkpoint(grokctl, home, tmp_path):
    alone = tmp_path / "alone"
    made = grokctl("reshard", "words", "--home", home, "--devices", 1, "--out", alone / "ready/x")
    assert made.exit_code == 0, made.stderr

    refused = grokctl("reshard", "--devices", 2, "--home", alone)

    assert refused.exit_code == 2
    assert "no release under" in refused.error
    assert "there is ready/x" in refused.error
    assert refused.hint == f"grokctl reshard --devices 2 --home {alone} x"
