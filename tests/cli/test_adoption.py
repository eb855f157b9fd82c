"""Releases that other tools downloaded: found, proven and mended where they are."""

import json
import os
import shutil
from pathlib import Path

import pytest
from mounts import remount, tmpfs

TENSOR = "ckpt-0/tensor00003_000"


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A home for the proofs of one test."""
    monkeypatch.setenv("GROKCTL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def copied(seeded, root: Path) -> Path:
    """The release as a clone of the hub's repository has it."""
    for name in seeded.files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(seeded.root / name, root / name)
    return root


def linked(seeded, root: Path, blobs: Path) -> Path:
    """The release as the hub's cache has it."""
    blobs.mkdir()
    for number, name in enumerate(seeded.files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(seeded.root / name, blobs / str(number))
        (root / name).symlink_to(os.path.relpath(blobs / str(number), (root / name).parent))
    return root


def flip(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return bytes(data)


@pytest.mark.usefixtures("own")
def test_a_release_of_links_is_proven_and_its_folder_stays_as_it_is(grokctl, seeded, tmp_path):
    root = linked(seeded, tmp_path / "snapshot", tmp_path / "blobs")
    before = sorted(root.rglob("*"))

    refused = grokctl("verify", root)
    proven = grokctl("verify", root, "--torrent-file", seeded.torrent, "--json")
    again = grokctl("verify", root, "--json")

    assert refused.exit_code == 2
    assert "--torrent-file" in refused.hint
    assert proven.exit_code == 0
    assert proven.result["proven"]
    assert proven.result["checkpoint"] == str(root)
    assert again.result["spared_files"] == len(seeded.files)
    assert sorted(root.rglob("*")) == before


@pytest.mark.usefixtures("own")
def test_a_repair_replaces_a_link_and_does_not_write_through_it(
    grokctl, seeded, loopback, tmp_path
):
    root = linked(seeded, tmp_path / "snapshot", tmp_path / "blobs")
    target = (root / TENSOR).resolve()
    bad = flip(target)

    given = ("--torrent-file", seeded.torrent)
    outcome = grokctl("verify", root, *given, "--repair", *loopback, "--peer", seeded.peer)

    assert outcome.exit_code == 0, outcome.stderr
    assert target.read_bytes() == bad
    assert (root / TENSOR).read_bytes() == (seeded.root / TENSOR).read_bytes()
    assert sum(path.is_symlink() for path in root.rglob("*")) > len(seeded.files) // 2


@pytest.mark.usefixtures("own")
def test_a_complete_release_of_links_is_adopted_by_fetch_as_it_is(
    grokctl, seeded, loopback, tmp_path
):
    root = linked(seeded, tmp_path / "snapshot", tmp_path / "blobs")

    outcome = grokctl("fetch", seeded.torrent, "--to", root, "--force", *loopback, "--json")

    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.result["downloaded_bytes"] == 0
    assert (root / TENSOR).is_symlink()


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param("ckpt-0/..", id="the-folder-of-tensors"),
        pytest.param("checkpoints", id="the-reference-repository"),
        pytest.param("ckpt", id="the-first-upload"),
        pytest.param("snapshots", id="the-folder-of-a-cache"),
        pytest.param("flat", id="tensors-beside-the-configuration"),
    ],
)
def test_a_release_is_found_proven_and_mended_in_every_shape(
    grokctl, seeded, loopback, tmp_path, own, shape
):
    whole = copied(seeded, tmp_path / "whole")
    root = tmp_path / "theirs"
    if shape == "ckpt-0/..":
        named = whole.rename(root) / "ckpt-0"
    elif shape in {"checkpoints", "snapshots"}:
        root.mkdir()
        whole.rename(root / shape if shape == "checkpoints" else root / "x")
        if shape == "snapshots":
            (root / shape).mkdir()
            (root / "x").rename(root / shape / "0af3")
        named = root
    else:
        named = whole.rename(root)
        (root / "ckpt-0").rename(root / "ckpt")
        for path in (root / "ckpt").iterdir() if shape == "flat" else ():
            path.rename(root / path.name)
    (tensor,) = named.rglob("tensor00003_000")
    tensor.unlink()

    inspected = grokctl("inspect", named)
    given = ("--torrent-file", seeded.torrent)
    bad = grokctl("verify", named, *given, "--json")
    mended = grokctl("verify", named, *given, "--repair", *loopback, "--peer", seeded.peer)
    good = grokctl("verify", named, "--json")

    assert inspected.exit_code == 20
    assert bad.exit_code == 20
    assert {item["file"] for item in bad.result["damage"]} >= {TENSOR}
    assert mended.exit_code == 0, mended.stderr
    assert good.exit_code == 0
    assert good.result["proven"]
    assert (own / "adopted").is_dir()


@pytest.mark.usefixtures("own")
def test_a_release_on_a_read_only_disk_is_proven_seeded_and_known_to_be_proven(
    grokctl, seeded, loopback, tmp_path
):
    with tmpfs(tmp_path / "disk", "size=64m") as disk:
        root = copied(seeded, disk)
        remount(disk, "ro")

        proven = grokctl("verify", root, "--torrent-file", seeded.torrent)
        ratio = ("--seed-ratio", "0.000001")
        whole = grokctl("fetch", seeded.torrent, "--to", root, *loopback, "--dry-run", *ratio)
        planned = grokctl("reshard", root, "--devices", 1, "--out", tmp_path / "out")

    assert proven.exit_code == 0, proven.stderr
    assert whole.exit_code == 0, whole.stderr
    assert "cannot be written" in whole.stderr
    assert "every byte was proven" in planned.stderr


@pytest.mark.usefixtures("own")
def test_a_missing_file_is_advised_on_and_fetched_into_place(grokctl, seeded, loopback, tmp_path):
    root = copied(seeded, tmp_path / "local")
    (root / TENSOR).unlink()

    refused = grokctl("verify", root)
    fetched = grokctl(
        "fetch", seeded.torrent, "--to", root, "--force", *loopback, "--peer", seeded.peer, "--json"
    )

    assert refused.exit_code == 20
    assert f"--to {root} --force" in refused.hint
    assert fetched.result["downloaded_bytes"] < seeded.nbytes / 2


@pytest.mark.parametrize("suffix", [".!qB", ".part", ".incomplete", ".crdownload"])
@pytest.mark.usefixtures("own")
def test_what_another_client_began_is_taken_over_and_the_rest_is_named(
    grokctl, seeded, loopback, tmp_path, suffix
):
    root = copied(seeded, tmp_path / "local")
    (root / TENSOR).rename(root / f"{TENSOR}{suffix}")
    other = root / f"ckpt-0/tensor00004_000{suffix}"
    other.write_bytes(bytes(70_000))

    outcome = grokctl("fetch", seeded.torrent, "--to", root, "--force", *loopback, "--json")

    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.result["downloaded_bytes"] == 0
    assert not (root / f"{TENSOR}{suffix}").exists()
    assert other.exists()
    assert str(other) in outcome.stderr


@pytest.mark.usefixtures("own")
def test_a_different_release_is_kept_when_its_folder_is_adopted(
    grokctl, seeded, loopback, tmp_path
):
    root = copied(seeded, tmp_path / "local")
    theirs = os.urandom((root / TENSOR).stat().st_size + 5)
    (root / TENSOR).write_bytes(theirs)
    adopt = ("fetch", seeded.torrent, "--to", root, "--force", *loopback)

    planned = grokctl(*adopt, "--dry-run")
    counted = grokctl(*adopt, "--dry-run", "--json")
    fetched = grokctl(*adopt, "--peer", seeded.peer)

    assert "pieces fit; the rest is kept aside" in planned.stdout
    assert counted.result["fitting_pieces"] > 0
    assert fetched.exit_code == 0, fetched.stderr
    (kept,) = (root / ".grokctl" / "replaced").iterdir()
    assert (kept / TENSOR).stat().st_size == len(theirs)
    assert (kept / TENSOR).read_bytes() == theirs
    assert (root / TENSOR).read_bytes() == (seeded.root / TENSOR).read_bytes()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("model.gguf", b"GGUF\3\0\0\0", "a GGUF file"),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}", "a safetensors file"),
        ("renamed", b"GGUF\3\0\0\0", "a GGUF file"),
        ("array.npy", b"\x93NUMPY\1\0", "a numpy array"),
        ("pytorch.zip", b"PK\x03\x04", "a zip archive"),
        ("m.torrent", b"d8:announce", "a torrent"),
    ],
)
@pytest.mark.parametrize("verb", ["inspect", "verify"])
@pytest.mark.usefixtures("own")
def test_a_file_that_is_no_checkpoint_is_named(grokctl, tmp_path, name, data, words, verb):
    (tmp_path / name).write_bytes(data)

    outcome = grokctl(verb, tmp_path / name)

    assert outcome.exit_code == 2
    assert f"expected a checkpoint, found {words}" in outcome.error


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:9", "http://127.0.0.1:9/", "'http://127.0.0.1:9/'"]
)
@pytest.mark.usefixtures("own")
def test_the_hub_is_where_its_variable_says(
    grokctl, seeded, loopback, tmp_path, monkeypatch, endpoint
):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    options = (*loopback, "--mirror", "hf", "--stall-timeout", "0.5", "--json")

    outcome = grokctl("fetch", seeded.torrent, "--to", tmp_path / "got", *options)

    assert outcome.exit_code in {10, 11}
    record = json.loads((tmp_path / "got" / ".grokctl" / "unfinished.json").read_bytes())
    assert "http://127.0.0.1:9/xai-org/grok-1/resolve/main/" in record["options"]


@pytest.mark.usefixtures("own")
def test_a_variable_of_the_hub_that_is_no_address_is_named(grokctl, seeded, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")

    outcome = grokctl("fetch", seeded.torrent, "--to", tmp_path / "got", "--mirror", "hf")

    assert outcome.exit_code == 2
    assert "HF_ENDPOINT" in outcome.error


def test_a_reshard_fills_an_empty_folder_and_measures_its_disk(grokctl, home, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    reshard = ("reshard", "words", "--home", home, "--devices", 1, "--out")

    filled = grokctl(*reshard, empty)
    again = grokctl(*reshard, empty)
    with tmpfs(tmp_path / "volume", "size=1m") as volume:
        (volume / "lost+found").mkdir()
        full = grokctl(*reshard, volume, "--dry-run", "--json")
        refused = grokctl(*reshard, volume)
        remount(volume, "size=64m")
        fits = grokctl(*reshard, volume)
        replaced = grokctl(*reshard, volume, "--force")
        names = {path.name for path in volume.iterdir()}

    assert filled.exit_code == 0, filled.stderr
    assert not [path for path in empty.iterdir() if path.name.startswith(".")]
    assert again.exit_code == 2
    assert (full.exit_code, refused.exit_code) == (12, 12)
    assert str(tmp_path / "volume") in refused.error
    assert (fits.exit_code, replaced.exit_code) == (0, 0), fits.stderr + replaced.stderr
    assert names == {path.name for path in empty.iterdir()} | {"lost+found"}


def test_a_reshard_continues_in_a_folder_where_it_was_killed_while_it_published(
    grokctl, home, tmp_path
):
    out = tmp_path / "out"
    out.mkdir()
    reshard = ("reshard", "words", "--home", home, "--devices", 2, "--out", out)
    assert grokctl(*reshard).exit_code == 0
    partial = out / ".out.0123456789ab.partial"
    partial.mkdir()
    for name in ("grokctl.json", "SHA256SUMS"):
        (out / name).rename(partial / name)

    outcome = grokctl(*reshard)

    assert outcome.exit_code == 0, outcome.stderr
    assert grokctl("verify", out).exit_code == 0


@pytest.mark.usefixtures("own")
def test_a_torrent_file_that_is_no_torrent_is_refused(grokctl, seeded, tmp_path):
    root = copied(seeded, tmp_path / "local")
    (tmp_path / "page").write_bytes(b"<!DOCTYPE html>")

    for file in (tmp_path / "page", tmp_path / "nothing"):
        outcome = grokctl("verify", root, "--torrent-file", file)

        assert outcome.exit_code == 2, outcome.stderr
        assert file.name in outcome.error


def fetched(seeded, root: Path) -> Path:
    """The release as grokctl has fetched it, not verified yet."""
    copied(seeded, root)
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
        proven = grokctl("verify", root, "--json")
        again = grokctl("verify", root, "--json")
        after = grokctl("inspect", root, "--json")

    assert not before.result["proven"]
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
        grokctl("verify", root)
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
    (tensors / "tensor00003_000").unlink()
    outcomes += [grokctl(*named), grokctl(*named, "--json"), grokctl(*named, "-q")]

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
