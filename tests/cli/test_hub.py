"""`grokctl fetch` from a hub where no peer sends the torrent, and what later commands say."""

import pytest
from hub import NAME, files_in, hub_of


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
    assert trust in ready["doubt"]
    assert "the infohash proves none of it" in " ".join(
        (inspected.stdout + inspected.stderr).split()
    )
    assert (upgraded["proven"], upgraded["proven_by"]) == (True, "infohash")
    assert again["hashed_bytes"] == 0
    assert len(hub.parts) == len(set(hub.parts))  # and nothing was fetched again


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
