"""Releases that other tools downloaded: found, proven and mended where they are."""

import json
import os
from pathlib import Path

import pytest
from copies import TENSOR, copied, flip, linked
from mounts import remount, tmpfs


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A home for the proofs of one test."""
    monkeypatch.setenv("GROKCTL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


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
    assert [path.name for path in empty.iterdir() if path.name.startswith(".")] == [".grokctl"]
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
