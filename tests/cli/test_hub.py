"""`grokctl fetch` from a hub where no peer sends the torrent, and what later commands say."""

import shutil
from dataclasses import replace

import pytest
from exports import WIDE
from hub import NAME, files_in, hub_of

from grokctl.checkpoint.miniature import write_miniature


@pytest.fixture
def hub(seeded):
    with hub_of(files_in(seeded.root, "ckpt")) as hub:
        yield hub


@pytest.fixture
def of_hub(seeded, hub, loopback, tmp_path, monkeypatch):
    """A fetch of the release with the tokenizer from a hub that `HF_ENDPOINT` names."""
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr("grokctl.transfer.hub_fetch.METADATA_S", 0.2)
    to = ("--to", tmp_path / "words", "--mirror", "hf", "--stall-timeout", 30)
    return ("fetch", seeded.magnet, *to, *loopback)


def test_every_command_says_what_the_release_is_proven_by(grokctl, seeded, hub, of_hub, tmp_path):
    root, home = tmp_path / "words", tmp_path / "home"

    fetched = grokctl(*of_hub, "--json").result
    verified = grokctl("verify", root, "--json").result
    resharded = grokctl("reshard", root, "--devices", 2, "--home", home, "--json").result
    ready = grokctl("verify", resharded["ready"], "--json").result
    inspected = grokctl("inspect", root)
    upgraded = grokctl("verify", root, "--torrent-file", seeded.torrent, "--json").result
    again = grokctl("verify", root, "--json").result

    trust = fetched["root_of_trust"]
    assert f"{hub.endpoint}/{NAME}" in trust
    assert (fetched["verified"], fetched["proven_by"]) == (False, "hub sha256")
    assert fetched["downloaded_bytes"] == fetched["bytes"]
    assert fetched["git_blobs"] == ["config.json"]
    assert (verified["ok"], verified["proven"]) == (True, False)
    assert (verified["proven_by"], verified["root_of_trust"]) == ("hub sha256", trust)
    assert verified["hashed_bytes"] == 0
    assert (resharded["proven"], resharded["proven_by"]) == (False, "hub sha256")
    assert_made_of(trust, ready)
    assert "the infohash proves none of it" in " ".join(
        (inspected.stdout + inspected.stderr).split()
    )
    assert (upgraded["proven"], upgraded["proven_by"]) == (True, "infohash")
    assert again["hashed_bytes"] == 0
    assert len(hub.parts) == len(set(hub.parts))  # and nothing was fetched again


def test_exports_carry_what_the_release_is_proven_by(grokctl, loopback, tmp_path, monkeypatch):
    write_miniature(tmp_path / "wide", replace(WIDE, num_layers=1))
    root, home = tmp_path / "of-hub", ("--home", tmp_path / "home", "--json")
    monkeypatch.setattr("grokctl.transfer.hub_fetch.METADATA_S", 0.2)
    with hub_of(files_in(tmp_path / "wide")) as hub:
        magnet = f"magnet:?xt=urn:btih:{'ab' * 20}"
        trust = grokctl(
            *("fetch", magnet, "--to", root, "--mirror", hub.mirror, *loopback, "--json")
        ).result["root_of_trust"]

    ready = grokctl("reshard", root, "--devices", 1, *home).result["ready"]
    of_release = grokctl("export", root, *home).result
    of_ready = grokctl("export", ready, "--out", tmp_path / "from-ready", *home).result
    shutil.copytree(ready, tmp_path / "copy")
    of_copy = grokctl("export", tmp_path / "copy", "--out", tmp_path / "from-copy", *home).result

    for made in (of_release, of_ready):
        assert (made["proven"], made["proven_by"]) == (False, "hub sha256")
        verified = grokctl("verify", made["export"], "--json").result
        assert_made_of(trust, verified)
        inspected = grokctl("inspect", made["export"], "--json").result
        assert (inspected["proven"], inspected["proven_by"]) == (False, "hub sha256")
    copied = grokctl("verify", tmp_path / "copy", "--json").result
    assert (copied["ok"], copied["proven_by"], copied["root_of_trust"]) == (True, None, None)
    assert f"had {trust}; this copy was not made here" in copied["doubt"]
    assert of_copy["proven_by"] is None


def assert_made_of(trust, verified):
    """That a verification says what the release of a folder was proven by."""
    assert (verified["ok"], verified["proven"]) == (True, False)
    assert (verified["proven_by"], verified["root_of_trust"]) == ("hub sha256", trust)
    doubt = f"made from a release that had {trust}; the infohash proved none of it"
    assert (verified["doubt"], verified["hashed_bytes"]) == (doubt, 0)


def test_people_read_it_in_a_line(grokctl, of_hub, tmp_path):
    fetched = grokctl(*of_hub)
    verified = grokctl("verify", tmp_path / "words")

    assert "asking the hub" in fetched.stderr
    assert "proven by" in fetched.stdout
    assert "--torrent-file" in fetched.stdout
    assert "every byte has the sha256 that" in verified.stdout


def test_damage_is_mended_from_the_hub(grokctl, hub, of_hub, tmp_path):
    root = tmp_path / "words"
    grokctl(*of_hub)
    path = root / "ckpt-0/tensor00002_000"
    path.write_bytes(path.read_bytes()[:-9])

    refused = grokctl("verify", root, "--json")
    mended = grokctl("verify", root, "--repair", "--no-dht", "--no-lsd", "--json")

    assert refused.exit_code == 20
    assert mended.exit_code == 0, mended
    assert mended.result["proven_by"] == "hub sha256"
    assert 0 < mended.result["downloaded_bytes"] < path.stat().st_size
    assert path.read_bytes() == hub.files["ckpt/tensor00002_000"]


def test_a_hub_that_refuses_fails_the_fetch(grokctl, hub, of_hub):
    hub.promised.clear()

    outcome = grokctl(*of_hub)

    assert outcome.exit_code == 10
    assert "has no tensorNNNNN_000" in outcome.error


def test_a_full_disk_is_found_before_a_byte_moves(grokctl, hub, of_hub, small_disk):
    outcome = grokctl(*of_hub, "--to", small_disk / "words")

    assert outcome.exit_code == 12
    assert hub.parts == []


def test_a_mirror_and_none_cannot_both_be_meant(grokctl, of_hub):
    outcome = grokctl(*of_hub, "--no-mirror")

    assert outcome.exit_code == 2
    assert "expected one of them" in outcome.error
