"""`grokctl up`: fetch, verify and reshard in one command that goes on where it stopped."""

import json
import shutil

import pytest
from hub import files_in, hub_of

from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo
from grokctl.fetch import seeding


@pytest.fixture
def command(seeded, tmp_path, xla_cache):
    """From the seeder to a ready checkpoint for two devices."""
    home = tmp_path / "home"
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "xla").symlink_to(xla_cache)
    nobody = ("--no-dht", "--no-lsd", "--stall-timeout", 20)
    return ("up", seeded.magnet, "--devices", 2, "--peer", seeded.peer, *nobody, "--home", home)


def test_it_leads_from_a_magnet_link_to_a_ready_checkpoint_and_again_to_the_same(
    grokctl, seeded, command, tmp_path
):
    first = grokctl(*command, "--json")
    again = grokctl(*command, "--json")

    assert first.exit_code == again.exit_code == 0, (first, again)
    made, kept = first.result, again.result
    assert made["proven_by"] == "infohash"
    assert made["downloaded_bytes"] >= seeded.nbytes
    assert made["release"] == str(tmp_path / "home/releases/words")
    assert made["resharded"]
    assert (kept["downloaded_bytes"], kept["resharded"]) == (0, False)
    assert kept["ready"] == made["ready"]
    assert grokctl("verify", made["ready"], "--json").result["proven"]


def test_it_ends_with_text(grokctl, command):
    outcome = grokctl(*command, "-p", "The import statement", "-q")

    assert outcome.exit_code == 0, outcome
    assert outcome.stdout.strip()


def test_without_a_swarm_it_says_what_the_result_is_proven_by(
    grokctl, seeded, tmp_path, monkeypatch
):
    monkeypatch.setattr("grokctl.transfer.hub_fetch.METADATA_S", 0.2)
    home = ("--no-dht", "--no-lsd", "--home", tmp_path / "home", "--json")
    with hub_of(files_in(seeded.root)) as hub:
        options = ("--mirror", hub.mirror, "--devices", 1, *home)
        result = grokctl("up", seeded.magnet, *options).result

    assert result["proven_by"] == "hub sha256"
    assert hub.endpoint in result["root_of_trust"]
    assert "the infohash proved none of it" in grokctl("verify", result["ready"]).stdout


def test_damage_ends_it_before_anything_is_published(grokctl, command, tmp_path):
    root = tmp_path / "home/releases/words"
    grokctl("fetch", *command[1:2], "--to", root, *command[4:])
    path = root / "ckpt-0/tensor00002_000"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)

    outcome = grokctl(*command)

    assert outcome.exit_code == 20
    assert not any((tmp_path / "home").glob("ready/*/grokctl.json"))


def test_a_torrent_that_promises_no_release_is_refused_with_another_as_advice(
    grokctl, seeded, command, tmp_path
):
    root = tmp_path / "words"
    shutil.copytree(seeded.root, root)
    (root / "ckpt-0/tensor00002_000").write_bytes(b"no pickle" * 1000)
    data = build_metainfo(root, list(seeded.files), name="words", piece_length=2**14)
    magnet = f"magnet:?xt=urn:btih:{parse_metainfo(data, source='words').infohash}"
    with seeding(root, data) as (host, port):
        words = [command[0], magnet, *command[2:5], f"{host}:{port}", *command[6:]]
        outcome = grokctl(*words)

    assert outcome.exit_code == 20
    assert "tensor00002_000" in outcome.error
    assert outcome.hint.startswith(f"grokctl fetch --home {tmp_path / 'home'}  # another release")
    assert not any((tmp_path / "home").glob("ready/*/grokctl.json"))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        pytest.param({"--peer": "127.0.0.1:9", "--stall-timeout": 1}, 11, id="no-peer"),
        pytest.param({"--devices": 3}, 30, id="no-such-mesh"),
        pytest.param({"--max-download": "much"}, 2, id="usage"),
    ],
)
def test_its_exit_code_is_that_of_the_stage_that_failed(grokctl, command, changes, code):
    words = list(command)
    for name, value in changes.items():
        if name in words:
            words[words.index(name) + 1] = value
        else:
            words += [name, value]

    assert grokctl(*words).exit_code == code


def test_a_killed_command_goes_on(process, command, seeded, tmp_path):
    home = tmp_path / "home"
    with process.start(*command, "--json", "--max-download", "2MB") as running:
        process.await_that(lambda: any(home.glob("releases/words/ckpt-0/*")))
        running.kill()

    outcome = process.run(*command, "--json")

    assert outcome.exit_code == 0, outcome
    assert json.loads(outcome.stdout)["proven_by"] == "infohash"
    for name in seeded.files:
        assert (home / "releases/words" / name).read_bytes() == (seeded.root / name).read_bytes()
