"""`grokctl fetch` with real disks, signals and attacks, and its output."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager, suppress

import pytest
from servers import Handler, libtorrent_seeder, serving

from grokctl.checkpoint.torrent import read_metainfo
from grokctl.text import format_bytes

MAP = "·░▒▓█"


@pytest.fixture
def command(seeded, tmp_path, loopback):
    """A fetch of the release with the tokenizer from its seeder."""
    root = tmp_path / "words"
    return ("fetch", seeded.magnet, "--to", root, "--peer", seeded.peer, *loopback)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "words"


def assert_arrived(seeded, root):
    for name in seeded.files:
        assert (root / name).read_bytes() == (seeded.root / name).read_bytes(), name


def assert_failed(outcome, code, *words, hint=""):
    assert outcome.exit_code == code, outcome
    assert outcome.stdout == ""
    for word in words:
        assert word in outcome.error
    assert hint in (outcome.hint or "")


def done_in(line):
    """The downloaded bytes in a line of `--json`."""
    event = json.loads(line)
    is_progress = (event["event"], event.get("stage")) == ("advanced", "fetch")
    return event["done"] if is_progress else 0


def until(running, nbytes):
    """Read progress until this many bytes are downloaded."""
    seen = ""
    for line in running.stderr:
        seen += line
        if done_in(line) >= nbytes:
            return seen
    raise AssertionError(seen)


# --- the disk


@contextmanager
def disk(folder, options):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path):
    """Fill a disk."""
    with path.open("wb") as ballast, suppress(OSError):
        while True:
            os.write(ballast.fileno(), bytes(2**16))


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_said_before_a_byte_moves_and_a_larger_one_is_filled(
    process, grokctl, seeded, tmp_path, loopback
):
    with disk(tmp_path / "disk", "size=300k") as small:
        arguments = ("fetch", seeded.magnet, "--to", small / "words", "--peer", seeded.peer)
        refused = process.run(*arguments, *loopback)
        left_behind = [path for path in small.rglob("*") if path.is_file()]
        remount(small, "size=8m")
        finished = grokctl(*arguments, *loopback, "--json")

        assert_failed(refused, 12, f"{format_bytes(seeded.nbytes)} free", hint="df -h")
        assert left_behind == []
        assert finished.exit_code == 0
        assert finished.result["complete"] is True
        assert_arrived(seeded, small / "words")


def test_a_disk_that_others_fill_on_the_way_costs_nothing_that_came(
    process, grokctl, seeded, tmp_path, loopback
):
    with disk(tmp_path / "disk", f"size={seeded.nbytes + 300_000}") as small:
        arguments = ("fetch", seeded.magnet, "--to", small / "words", "--peer", seeded.peer)
        slowly = ("--max-download", "400kB", "--json")
        with process.start(*arguments, *loopback, *slowly) as running:
            seen = until(running, 200_000)
            fill(small / "ballast")
            stdout, rest = running.communicate(timeout=60)
        remount(small, "size=16m")
        finished = grokctl(*arguments, *loopback, "--json")

        assert running.returncode == 12, seen + rest
        assert json.loads(stdout)["exit_code"] == 12
        assert "No space left" in rest
        assert finished.exit_code == 0
        assert 0 < finished.result["downloaded_bytes"] < seeded.nbytes - 100_000
        assert_arrived(seeded, small / "words")


def test_a_limit_on_the_size_of_files_is_said_before_a_byte_moves(
    process, grokctl, seeded, command, root
):
    largest = max(file.length for file in read_metainfo(seeded.torrent).files)

    limited = (
        f"import resource; hard = resource.RLIM_INFINITY\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest - 1}, hard))"
    )

    refused = process.run(*command, code=limited)
    finished = grokctl(*command)

    assert_failed(refused, 12, f"{largest:,}", f"{largest - 1:,}", hint="ulimit -f unlimited")
    assert finished.exit_code == 0
    assert_arrived(seeded, root)


def test_a_disk_without_names_left_is_said_before_a_byte_moves(
    process, grokctl, seeded, tmp_path, loopback
):
    with disk(tmp_path / "disk", "size=8m,nr_inodes=10") as small:
        arguments = ("fetch", seeded.magnet, "--to", small / "words", "--peer", seeded.peer)
        refused = process.run(*arguments, *loopback)
        planned = grokctl(*arguments, *loopback, "--dry-run", "--json")

    assert_failed(refused, 12, "more files", hint="df -i")
    assert (planned.exit_code, planned.result["fits"]) == (12, False)
    failed = [found["name"] for found in planned.result["checks"] if found["status"] == "fail"]
    assert failed == ["files"]


def test_a_folder_that_cannot_be_written_is_said_before_a_byte_moves(
    process, grokctl, seeded, tmp_path, loopback
):
    with disk(tmp_path / "disk", "size=8m") as small:
        arguments = ("fetch", seeded.magnet, "--to", small / "words", "--peer", seeded.peer)
        assert grokctl(*arguments, *loopback, "--only", "config.json").exit_code == 0
        remount(small, "ro")
        refused = process.run(*arguments, *loopback)
        planned = grokctl(*arguments, *loopback, "--dry-run")

    assert_failed(refused, 10, str(small), hint="ls -ld")
    assert planned.exit_code == 10
    assert "cannot be written to" in planned.stdout


# --- attacks


@pytest.mark.parametrize(
    "place", ["ckpt-0", "ckpt-0/tensor00003_000", "config.json", "release.torrent", ".grokctl"]
)
def test_a_planted_link_is_refused_and_its_target_untouched(
    grokctl, seeded, loopback, place, tmp_path
):
    root, victim = tmp_path / "words", tmp_path / "victim"
    victim.mkdir()
    (victim / "secret").write_bytes(b"precious")
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).symlink_to(victim / "secret" if "." in place[1:] else victim)

    outcome = grokctl("fetch", seeded.torrent, "--to", root, *loopback, "--force")

    assert_failed(outcome, 10, place, "symbolic link", hint="ls -ld")
    assert [path.name for path in victim.iterdir()] == ["secret"]
    assert (victim / "secret").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc", "..%2F..%2Fevil", "%1b%5B2J", ".", "a%00b", "~"]
)
def test_a_magnets_name_leads_nowhere(grokctl, seeded, tmp_path, loopback, name):
    home = tmp_path / "home"
    magnet = seeded.magnet.partition("&")[0] + f"&dn={name}"

    outcome = grokctl("fetch", magnet, "--peer", seeded.peer, *loopback, "--home", home, "--json")

    (root,) = (home / "releases").iterdir()
    assert outcome.exit_code == 0
    assert outcome.result["release"] == str(root)
    assert seeded.magnet.partition("btih:")[2].startswith(root.name)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert "\x1b" not in outcome.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"garbage", "invalid torrent", id="garbage"),
        pytest.param(None, "infohash", id="another"),
    ],
)
def test_a_torrent_that_is_not_the_one_is_refused(
    grokctl, seeded, tmp_path, loopback, content, words
):
    given = tmp_path / "given.torrent"
    given.write_bytes(content or seeded.torrent.read_bytes().replace(b"5:words", b"5:other"))

    outcome = grokctl(
        *("fetch", seeded.magnet, "--torrent-file", given, "--to", tmp_path / "words", *loopback)
    )

    assert_failed(outcome, 10, "given.torrent", words)
    assert not (tmp_path / "words").exists()


def test_a_torrent_that_is_not_there_is_a_usage_error(grokctl, seeded, tmp_path, loopback):
    outcome = grokctl(
        *("fetch", seeded.magnet, "--torrent-file", tmp_path / "nothing.torrent"),
        *("--to", tmp_path / "words", *loopback),
    )

    assert_failed(outcome, 2, "nothing.torrent")
    assert list(tmp_path.iterdir()) == []


def test_a_torrent_file_is_enough_where_nobody_gives_metadata(grokctl, seeded, command, root):
    outcome = grokctl(*command, "--torrent-file", seeded.torrent, "--json")

    assert outcome.exit_code == 0
    assert not [event for event in outcome.events if event.get("stage") == "metadata"]
    assert_arrived(seeded, root)


@pytest.mark.parametrize("peer", ["a..b:80", f"{'x' * 70}:80", "no.such.name.invalid:80"])
def test_a_peer_of_no_known_name_is_said(grokctl, seeded, tmp_path, loopback, peer):
    outcome = grokctl("fetch", seeded.torrent, "--to", tmp_path / "x", "--peer", peer, *loopback)

    assert_failed(outcome, 10, peer)


def test_two_at_once_in_one_folder_are_one_too_many(process, grokctl, seeded, command, root):
    with process.start(*command, "--max-download", "800kB", "--json") as running:
        until(running, 50_000)
        second = grokctl(*command)
        stdout, stderr = running.communicate(timeout=60)

    assert_failed(second, 10, str(root))
    assert running.returncode == 0, stderr
    assert json.loads(stdout)["downloaded_bytes"] == seeded.nbytes
    assert_arrived(seeded, root)


# --- a part of it


@pytest.mark.parametrize(
    ("chosen", "layers"),
    [
        pytest.param(["--layers", "0"], {0}, id="one"),
        pytest.param(["--layers", "0-1"], {0, 1}, id="a-range"),
        pytest.param(["--layers", " 1 , 0 "], {0, 1}, id="a-list"),
        pytest.param(["--layers", "1", "--only", "tensor00000*"], {1, None}, id="and-more"),
    ],
)
def test_layers_are_fetched_by_number(grokctl, command, root, chosen, layers):
    outcome = grokctl(*command, *chosen, "--json")

    first = {None: range(1), 0: range(2, 14), 1: range(14, 26)}
    expected = {f"tensor{index:05d}_000" for layer in layers for index in first[layer]}
    assert outcome.exit_code == 0
    assert {path.name for path in (root / "ckpt-0").iterdir()} == expected
    assert outcome.result["complete"] is False
    assert (root / "config.json").is_file()


@pytest.mark.parametrize("text", ["5-", "a", "1-0", "", "-1", "0-1-2", "0,,1", "1.5", "\u0661"])
def test_layers_that_are_no_numbers_are_a_usage_error(grokctl, seeded, loopback, text, tmp_path):
    outcome = grokctl(
        "fetch", seeded.torrent, f"--layers={text}", "--to", tmp_path / "x", *loopback
    )

    assert_failed(outcome, 2, "layers", repr(text), hint="--layers 0-3,7")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("text", ["2", "0-9999", "9"])
def test_layers_that_the_model_has_not_are_a_usage_error(grokctl, seeded, loopback, text, tmp_path):
    outcome = grokctl("fetch", seeded.torrent, "--layers", text, "--to", tmp_path / "x", *loopback)

    assert_failed(outcome, 2, "layers are 0 to 1", hint="--layers")
    assert not (tmp_path / "x").exists()


# --- signals


@pytest.mark.parametrize(("source", "stop"), [("swarm", signal.SIGTERM), ("mirror", signal.SIGINT)])
def test_a_stopped_download_ends_soon_with_resume_data_and_only_the_rest_comes_later(
    process, grokctl, seeded, tmp_path, loopback, source, stop
):
    root = tmp_path / "words"
    with serving(Handler, seeded.root) as server:
        where = ["--peer", seeded.peer] if source == "swarm" else ["--mirror", server.url]
        arguments = ("fetch", seeded.torrent, "--to", root, *where, *loopback, "--json")
        with process.start(*arguments, "--max-download", "400kB") as running:
            seen = until(running, 250_000)
            began = time.monotonic()
            running.send_signal(stop)
            stdout, rest = running.communicate(timeout=30)
            took = time.monotonic() - began
        has_resume = (root / ".grokctl/resume").stat().st_size > 0
        finished = grokctl(*arguments)

    assert running.returncode == 130, seen + rest
    assert took < 15
    assert stdout == ""
    assert "resumes where it stopped" in rest
    assert "Traceback" not in seen + rest
    assert has_resume
    assert finished.exit_code == 0
    assert finished.result["downloaded_bytes"] <= seeded.nbytes - 250_000
    # resume data is believed; only what lies beside a gap may need a look, and how many gaps there
    # are is the swarm's matter: without that data it would be all of the 250,000 and more
    looked_at = [
        event["total"]
        for event in finished.events
        if event["event"] == "started" and event["stage"] == "verify"
    ]
    assert sum(looked_at) < 250_000 // 2
    assert_arrived(seeded, root)


def test_a_kill_while_files_are_checked_costs_nothing(process, grokctl, seeded, command, root):
    slow = "patch('integrity.pieces:_PieceReader.check', delayed(0.01))"
    first = grokctl(*command)
    (root / ".grokctl/resume").unlink()
    chosen = random.Random(7)

    for _ in range(2):
        with process.start(*command, "--json", code=slow) as running:
            assert any('"verify"' in line for line in running.stderr)
            threading.Event().wait(chosen.uniform(0, 0.3))
            running.kill()
    finished = grokctl(*command, "--json")

    assert first.exit_code == 0
    assert finished.exit_code == 0
    assert finished.result["downloaded_bytes"] == 0
    assert_arrived(seeded, root)


def test_a_kill_in_the_very_first_moment_costs_nothing(grokctl, seeded, command, root):
    root.mkdir()
    (root / ".release.torrent.abc123").write_bytes(b"d4:in")  # a write that never became one

    outcome = grokctl(*command, "--json")

    assert outcome.exit_code == 0
    assert_arrived(seeded, root)


# --- hints


def pasted(hint):
    """The arguments of a hint that is a grokctl command."""
    name, *arguments = shlex.split(hint, comments=True)
    assert name == "grokctl"
    return arguments


@pytest.mark.parametrize("source", ["magnet", "torrent"])
def test_the_hint_of_a_stall_goes_on_in_the_same_folder(
    grokctl, seeded, tmp_path, loopback, source
):
    root = tmp_path / "my words"
    some = ("--peer", seeded.peer, "--only", "tensor00001*")
    assert grokctl("fetch", seeded.magnet, "--to", root, *some, *loopback).exit_code == 0

    stalled = grokctl(
        *("fetch", getattr(seeded, source), "--to", root, *loopback, "--stall-timeout", 1)
    )
    finished = grokctl(*pasted(stalled.hint), "--peer", seeded.peer, *loopback, "--json")

    assert stalled.exit_code == 11
    assert finished.exit_code == 0, finished
    assert finished.result["release"] == str(root)
    assert finished.result["downloaded_bytes"] < seeded.nbytes
    assert_arrived(seeded, root)


def test_the_hint_about_a_folder_of_something_else_leads_to_one_that_works(
    grokctl, seeded, tmp_path, loopback
):
    folder = tmp_path / "my thesis"
    folder.mkdir()
    (folder / "thesis.tex").touch()

    refused = grokctl("fetch", seeded.magnet, "--to", folder, *loopback)
    finished = grokctl(*pasted(refused.hint), "--peer", seeded.peer, *loopback, "--json")

    assert refused.exit_code == 10
    assert finished.exit_code == 0, finished
    assert_arrived(seeded, folder / "words")


def test_the_hint_about_files_that_somebody_copied_adopts_them(grokctl, seeded, tmp_path, loopback):
    folder = tmp_path / "my copy"
    shutil.copytree(seeded.root, folder)

    refused = grokctl("fetch", seeded.magnet, "--to", folder, *loopback)
    finished = grokctl(*pasted(refused.hint), "--peer", seeded.peer, *loopback, "--json")

    assert refused.exit_code == 10
    assert finished.exit_code == 0, finished
    assert finished.result["downloaded_bytes"] == 0


# --- what programs see


def test_liars_are_named_in_the_result_and_all_sources_while_it_goes_on(
    process, seeded, tmp_path, loopback
):
    class Lying(Handler):
        def send_part(self, data, first, last):
            super().send_part(bytes(len(data)), first, last)

    metainfo = read_metainfo(seeded.torrent)
    poisoned = tmp_path / "poisoned"
    for file in metainfo.files:
        place = poisoned / "/".join(file.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(bytes(file.length))
    places = {file.index: "/".join(file.path) for file in metainfo.files}

    with (
        serving(Lying, seeded.root) as mirror,
        libtorrent_seeder(
            seeded.torrent.read_bytes(), poisoned, places, disable_hash_checks=True
        ) as (liar, _),
    ):
        outcome = process.run(
            *("fetch", seeded.torrent, "--to", tmp_path / "words", *loopback, "--json"),
            *("--peer", f"127.0.0.1:{liar}", "--peer", seeded.peer, "--mirror", mirror.url),
            *("--tracker", "http://127.0.0.1:9/announce", "--max-download", "1MB"),
        )

    assert outcome.exit_code == 0, outcome
    troubles = {found["source"]: found["reason"] for found in outcome.result["troubles"]}
    assert troubles.keys() == {mirror.name, "peer 127.0.0.1"}
    assert "wrong bytes" in troubles[mirror.name]
    assert "bad data" in troubles["peer 127.0.0.1"]
    shares = {found["source"]: found["nbytes"] for found in outcome.result["sources"]}
    assert shares.keys() == {"swarm", mirror.name}
    assert sum(shares.values()) == outcome.result["downloaded_bytes"]
    assert_arrived(seeded, tmp_path / "words")

    told = [event for event in outcome.events if event.get("facts")]
    for event in told:
        assert dict(event["facts"]).keys() >= shares.keys()
        assert all(0 <= part <= 1 for part in event["parts"])
    assert any(0 < sum(event["parts"]) < len(event["parts"]) for event in told)


def test_the_result_says_what_was_fetched_from_whom(grokctl, seeded, command):
    first = grokctl(*command, "--json").result
    again = grokctl(*command, "--json").result

    assert first["tokenizer"] is True
    assert first["sources"] == [{"source": "swarm", "nbytes": seeded.nbytes}]
    assert (first["troubles"], again["downloaded_bytes"]) == ([], 0)
    assert (first["verified"], again["verified"]) == (False, False)


# --- what people see


OFTEN = """
def five_times_as_often(lines):
    return lambda note: lines(note, every=1.0)
patch("screen.console:Lines", five_times_as_often)
"""
"""The first line after a second instead of five."""


def test_plain_lines_name_rate_and_peers(process, command):
    with process.start(*command, "--max-download", "100kB", code=OFTEN) as running:
        line = next(line for line in running.stderr if " left" in line)
        running.kill()

    assert re.search(r"fetch: [\d.]+ kB of 1\.\d MB · \d+% · [\d.]+ kB/s · .* left", line)
    assert "1 peer" in line
    assert "\x1b" not in line


def test_plain_lines_say_what_it_waits_for(process, seeded, tmp_path, loopback):
    arguments = ("fetch", seeded.torrent, "--to", tmp_path / "x", *loopback)

    outcome = process.run(*arguments, "--stall-timeout", 2, code=OFTEN)

    assert outcome.exit_code == 11
    assert re.search(r"^fetch: .*waiting for peers", outcome.stderr, re.MULTILINE)


def on_a_terminal(process, *arguments, until, columns=80):
    """The terminal output of a command that is interrupted once all patterns have appeared."""
    leader, follower = os.openpty()
    environment = process.environment(TERM="xterm", COLUMNS=str(columns), LINES="24")
    with process.start(
        *arguments, env=environment, stdin=follower, stdout=follower, stderr=follower
    ) as running:
        os.close(follower)
        said, left = b"", list(until)
        while part := _read(leader):
            said += part
            if left and not (left := [mark for mark in left if not re.search(mark, _shown(said))]):
                running.send_signal(signal.SIGINT)
        running.wait(timeout=60)
    os.close(leader)
    return running.returncode, _shown(said)


def _shown(said):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode(errors="replace"))


def _read(leader):
    try:
        return os.read(leader, 65536)
    except OSError:
        return b""


@pytest.mark.parametrize("columns", [60, 80])
def test_a_terminal_shows_a_map_and_who_sends_how_much(process, seeded, command, columns):
    with serving(Handler, seeded.root) as server:
        code, said = on_a_terminal(
            *(process, *command, "--mirror", server.url, "--max-download", "300kB"),
            until=[
                rf"pieces +[{MAP}]+",
                r"swarm +[\d.]+ [kM]?B/s",
                rf"{server.name} +[\d.]+ [kM]?B/s",
            ],
            columns=columns,
        )

    assert code == 130
    assert "resumes where it stopped" in said
    assert max(map(len, said.replace("\r", "\n").splitlines())) <= columns


def test_a_terminal_shows_what_it_waits_for(process, seeded, tmp_path, loopback):
    code, _ = on_a_terminal(
        *(process, "fetch", seeded.torrent, "--to", tmp_path / "x", *loopback),
        until=[r"waiting for +peers"],
    )

    assert code == 130
