"""What earlier versions wrote is opened, continued or refused with a sentence.

Every folder of `data/yesterday` is what the grokctl of one commit left on disk; `make.py` beside
them adds another. A copy of a file has another inode, on another device, at another time. So where
a version compares files with what it noted about them, `rebuilt` puts back the time that a receipt
names, and writes the copy's inode and device into it; every other byte is the kept one. Journals
are found by a digest of the same facts: `partial_name` computes it as version 1 does.
"""

import hashlib
import json
import os
import select
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard
from places import DATA

from grokctl.checkpoint.ready import open_ready
from grokctl.checkpoint.sums import not_made_here
from grokctl.fetch import seeding

YESTERDAY = DATA / "yesterday"
RELEASE = YESTERDAY / "release"
KEPT = sorted(path for path in YESTERDAY.iterdir() if (path / "expected.json").is_file())
READY = [
    pytest.param(kept, path.name, id=f"{kept.name}-{path.name}")
    for kept in KEPT
    for path in sorted((kept / "home/ready").iterdir())
]
KILLED = [
    pytest.param(kept, path, id=f"{kept.name}{path.name.rsplit('.', 2)[0]}")
    for kept in KEPT
    for path in sorted((kept / "killed-reshard").iterdir())
]
PRIVATE = ".grokctl"
FILES = sorted(
    path.relative_to(RELEASE).as_posix() for path in RELEASE.rglob("*") if path.is_file()
)
NBYTES = sum((RELEASE / name).stat().st_size for name in FILES)
PIECE = 2**14
FUTURE = 999
"""The version of a file that nobody has defined yet."""


@pytest.fixture(params=KEPT, ids=lambda kept: kept.name)
def kept(request):
    """What one version left."""
    return request.param


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """Somebody who has the release."""
    root = shutil.copytree(RELEASE, tmp_path_factory.mktemp("peer") / "miniature")
    torrent = (KEPT[0] / "home/releases/miniature/release.torrent").read_bytes()
    with seeding(root, torrent) as (host, port):
        yield f"{host}:{port}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home for today's compilation cache."""
    return tmp_path_factory.mktemp("today")


def expected_of(kept):
    return json.loads((kept / "expected.json").read_text())


def contents(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def bytes_of(root):
    """A release's files one after the other, zeros where nothing is: as the torrent has them."""
    found = b""
    for name in FILES:
        data = (root / name).read_bytes() if (root / name).exists() else b""
        found += data.ljust((RELEASE / name).stat().st_size, b"\0")
    return found


def rebuilt(left, root):
    """A release as a version left it, with the receipt of files that are there."""
    shutil.copytree(RELEASE, root)
    shutil.copytree(left, root, dirs_exist_ok=True)
    path = root / PRIVATE / "receipt.json"
    receipt = json.loads(path.read_text())
    for name, (size, mtime, _, _) in receipt["files"].items():
        os.utime(root / name, ns=(mtime, mtime))
        status = (root / name).stat()
        assert status.st_size == size
        receipt["files"][name] = [size, mtime, status.st_ino, status.st_dev]
    path.write_text(json.dumps(receipt, indent=1))
    return root


@pytest.fixture
def release(kept, tmp_path):
    """The release that was fetched and verified."""
    return rebuilt(kept / "home/releases/miniature", tmp_path / "miniature")


def change(path, **values):
    """Change a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def stages(outcome):
    return [event["stage"] for event in outcome.events if event["event"] == "started"]


def notes(outcome):
    return [event["message"] for event in outcome.events if event["event"] == "noted"]


# --- ready checkpoints


@pytest.mark.parametrize(("kept", "name"), READY)
def test_a_ready_checkpoint_says_what_it_said(grokctl, kept, name, home, tmp_path):
    expected = expected_of(kept)
    result = expected["ready"][name]
    root = shutil.copytree(kept / "home/ready" / name, tmp_path / name)
    how = (root, "--mesh", result["mesh"], "--compute", "float32", "--home", home, "--json")

    verified = grokctl("verify", root, "--json")
    score = grokctl("score", *how, "--token-ids", expected["ids"])

    assert verified.result["ok"]
    assert not verified.result["proven"]  # it has no receipt of its reshard
    is_claimed = json.loads((root / "grokctl.json").read_bytes())["source"]["proven"]
    words = (
        not_made_here(open_ready(root)) if is_claimed else "made from a release that was not proven"
    )
    assert verified.result["doubt"] == words
    assert score.result["nll"] == pytest.approx(result["nll"], abs=1e-4)


def test_the_loop_offers_what_was_typed_and_completes_it_as_it_did(process, kept, tmp_path):
    home = shutil.copytree(kept / "home", tmp_path / "home")
    expected, (name, result) = expected_of(kept), next(iter(expected_of(kept)["ready"].items()))
    leader, follower = os.openpty()

    def until(mark):
        seen = b""
        while not seen.endswith(mark.encode()):
            assert select.select([leader], [], [], 60)[0], seen
            seen += os.read(leader, 1)  # what comes after the mark is for the next one

    with process.start(
        *("run", name, "--mesh", result["mesh"], "--compute", "float32", "--home", home),
        *("--temperature", 0, "-n", expected["max_tokens"], "--ignore-eos"),
        env=process.environment(TERM="xterm", JAX_NUM_CPU_DEVICES="2"),
        **dict.fromkeys(("stdin", "stdout", "stderr"), follower),
    ) as running:
        os.close(follower)
        try:
            until("> ")
            os.write(leader, b"\x1b[A\x1b[A")  # what was typed before the last line
            until(expected["prompt"])
            os.write(leader, b"\r")
            until(expected["prompt"] + expected["text"])
            until("> ")
            os.write(leader, b"\x04")
            running.wait(timeout=60)
        finally:
            os.close(leader)  # hangs up

    assert running.returncode == 0


@pytest.mark.parametrize("command", ["run", "score", "verify", "inspect", "reshard"])
def test_a_ready_checkpoint_of_the_future_is_refused(grokctl, kept, tmp_path, command):
    root = shutil.copytree(kept / "home/ready/miniature-int8-2", tmp_path / "ready")
    change(root / "grokctl.json", version=FUTURE)
    before = contents(tmp_path)
    options = {
        "run": ("-p", "import"),
        "score": ("--token-ids", "1,2"),
        "reshard": ("--mesh", "model=1", "--out", tmp_path / "out"),
    }

    outcome = grokctl(command, root, *options.get(command, ()))

    assert outcome.exit_code == 20
    assert f"expected grokctl-ready version 1, found grokctl-ready version {FUTURE}" in (
        outcome.error
    )
    assert outcome.hint == "install the grokctl that wrote it, or reshard again"
    assert contents(tmp_path) == before


# --- reshards that were killed


def plain(path):
    """A device file as it is decompressed."""
    data = path.read_bytes()
    if path.suffix != ".zst":
        return data
    with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
        return reader.read()


def partial_name(out, compression, files, release):
    """Name of the folder that version 1 writes to, of these sources for these files."""
    hasher = hashlib.sha256(str(compression).encode())
    for file in files:
        data = plain(file)
        hasher.update(data[: 8 + int.from_bytes(data[:8], "little")])  # safetensors' header
    for path in sorted((release / "ckpt-0").iterdir()):
        status = path.stat()
        stamp = (
            f"Stamp(size={status.st_size}, mtime_ns={status.st_mtime_ns}, "
            f"inode={status.st_ino}, device={status.st_dev})"
        )
        hasher.update(f"({str(path.resolve())!r}, {stamp})".encode())
    return f".{out.name}.{hasher.hexdigest()[:12]}.partial"


@dataclass(frozen=True)
class Killed:
    """A reshard that was killed, its files where they were, and the command that goes on."""

    arguments: tuple[object, ...]
    out: Path
    partial: Path
    like: Path
    """The ready checkpoint that an uninterrupted run made, compressed or not."""


@pytest.fixture
def killed(kept, left, release, tmp_path):
    """The command finds what it left by the names and stamps of its sources."""
    name, compression = left.name[1:].partition(".")[0], None
    arguments = ("reshard", release, "--mesh", "model=2")
    like = kept / "home/ready/miniature-int8-2"
    if name == "int4-zst":
        compression = "zstd:3"
        arguments += ("--precision", "int4", "--compress", compression)
        like = kept / "home/ready/miniature-int4-2"
    out = tmp_path / "ready" / name
    files = sorted(left.glob("device-*"))
    partial = out.parent / partial_name(out, compression, files, release)
    shutil.copytree(left, partial)
    return Killed((*arguments, "--out", out, "--json"), out, partial, like)


@pytest.mark.parametrize(("kept", "left"), KILLED)
def test_a_killed_reshard_goes_on_and_ends_as_if_it_had_not_been(grokctl, killed):
    done = len((killed.partial / "journal").read_bytes().splitlines())
    inodes = {path.name: path.stat().st_ino for path in killed.partial.glob("device-*")}
    release = killed.arguments[1]
    named = ("--torrent-file", release / "release.torrent")
    assert grokctl("verify", release, *named, "--json").result["proven"]

    outcome = grokctl(*killed.arguments)

    assert outcome.exit_code == 0
    # it did not look at the times of change: who knows what it has read
    assert not outcome.result["proven"]
    message = "begun by an earlier version, or elsewhere; its result will not count as proven"
    assert f"{killed.partial}: {message}" in notes(outcome)
    tensors = json.loads((killed.like / "grokctl.json").read_bytes())["tensors"]
    assert f"continuing after {done} of {len(tensors)} tensors of an interrupted run" in notes(
        outcome
    )
    assert [path.name for path in killed.out.parent.iterdir()] == [killed.out.name]
    for path in killed.out.glob("device-*"):
        assert path.stat().st_ino == inodes[path.name]
        assert plain(path) == (killed.like / path.name.removesuffix(".zst")).read_bytes()
    found, like = (
        json.loads((root / "grokctl.json").read_bytes()) for root in (killed.out, killed.like)
    )
    for key in ("tensors", "config", "mesh", "precision"):
        assert found[key] == like[key]
    unproven = {"infohash": None, "proven": False, "verified_at": None}
    assert found["source"] == like["source"] | unproven
    assert grokctl("verify", killed.out).exit_code == 0


@pytest.mark.parametrize(("kept", "left"), KILLED)
def test_a_killed_reshard_of_other_files_is_named_and_left_alone(grokctl, killed, left):
    other = killed.partial.rename(killed.partial.with_name(left.name))  # as a copy has it
    before = contents(other)

    outcome = grokctl(*killed.arguments)

    assert outcome.exit_code == 0
    assert any(note.startswith(f"{other}: left by another run") for note in notes(outcome))
    assert contents(other) == before


@pytest.mark.parametrize(("kept", "left"), KILLED)
def test_a_journal_of_the_future_is_not_believed(grokctl, killed):
    journal = killed.partial / "journal"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    journal.write_text("".join(json.dumps({"version": FUTURE, "entry": e}) + "\n" for e in lines))

    outcome = grokctl(*killed.arguments)

    assert outcome.exit_code == 0
    assert "starting again: the journal of an interrupted run does not match its files" in (
        notes(outcome)
    )
    for path in killed.out.glob("device-*"):
        assert plain(path) == (killed.like / path.name.removesuffix(".zst")).read_bytes()


# --- receipts


WITHOUT_CTIME = (
    ".grokctl/receipt.json: expected a receipt of version 3, found version 1, which lacks the "
    "times of change (ctime)"
)


def test_a_receipt_without_times_of_change_is_named_and_everything_is_hashed_once(grokctl, release):
    before = contents(release)

    outcome, again = (grokctl("verify", release, "--json") for _ in range(2))

    assert outcome.exit_code == again.exit_code == 0
    assert f"{WITHOUT_CTIME}; hashing every file" in notes(outcome)
    assert (outcome.result["spared_files"], outcome.result["hashed_bytes"]) == (0, NBYTES)
    assert (again.result["spared_files"], again.result["hashed_bytes"]) == (len(FILES), 0)
    after = contents(release)
    assert {name for name in after if after[name] != before[name]} == {".grokctl/receipt.json"}


def test_a_magnet_of_an_earlier_version_has_no_mac_and_the_torrent_is_named_once(grokctl, release):
    found = grokctl("verify", release, "--json")
    words = found.result["doubt"].partition("; if you know where it comes from: grokctl ")
    assert words[0] == (
        "release.torrent in the folder: .grokctl/source.json: has no MAC of this user"
    )
    assert not found.result["proven"]

    named, again = grokctl(*shlex.split(words[2]), "--json"), grokctl("verify", release, "--json")

    for outcome in (named, again):
        assert (outcome.result["proven"], outcome.result["hashed_bytes"]) == (True, 0)
        assert outcome.result["root_of_trust"].startswith("the torrent file ")


def test_a_run_says_why_a_receipt_without_times_of_change_is_not_enough(grokctl, release):
    outcome = grokctl("inspect", release, "--json")

    assert not outcome.result["proven"]
    assert any(f"not proven: {WITHOUT_CTIME}" in note for note in notes(outcome))
    assert any(f"(grokctl verify {release})" in note for note in notes(outcome))


def test_a_receipt_of_other_files_spares_none(grokctl, kept, release):
    # as a copy without its times has it: everything is hashed again, and noted anew
    shutil.copy(kept / "home/releases/miniature/.grokctl/receipt.json", release / PRIVATE)

    outcome, again = (grokctl("verify", release, "--json") for _ in range(2))

    assert outcome.result["hashed_bytes"] == NBYTES
    assert (again.result["spared_files"], again.result["hashed_bytes"]) == (len(FILES), 0)


def test_a_stopped_verification_without_times_of_change_begins_again(grokctl, kept, tmp_path):
    root = rebuilt(kept / "stopped-verify", tmp_path / "miniature")

    outcome = grokctl("verify", root, "--json")

    assert outcome.exit_code == 0
    assert f"{WITHOUT_CTIME}; hashing every file" in notes(outcome)
    assert (outcome.result["spared_files"], outcome.result["hashed_bytes"]) == (0, NBYTES)


def test_a_receipt_of_the_future_is_not_believed_and_everything_is_hashed(grokctl, release):
    receipt = release / PRIVATE / "receipt.json"
    change(receipt, version=FUTURE)
    before = contents(release)

    outcome = grokctl("verify", release, "--json")

    assert outcome.exit_code == 0
    assert (
        ".grokctl/receipt.json: expected a receipt of version 3, found version 999"
        in (notes(outcome)[0])
    )
    assert outcome.result["hashed_bytes"] == NBYTES
    after = contents(release)
    assert before.keys() == after.keys()
    assert {name for name in after if after[name] != before[name]} == {".grokctl/receipt.json"}


# --- fetches


def test_a_complete_fetch_has_nothing_to_do(grokctl, kept, release, loopback):
    outcome = grokctl("fetch", expected_of(kept)["magnet"], "--to", release, *loopback, "--json")

    assert outcome.exit_code == 0
    assert outcome.result["downloaded_bytes"] == 0
    assert outcome.result["complete"]
    assert not outcome.result["verified"]  # the receipt lacks the times of change
    assert "verify" not in stages(outcome)  # resume data are believed
    assert grokctl("verify", release).exit_code == 0
    again = grokctl("fetch", expected_of(kept)["magnet"], "--to", release, *loopback, "--json")
    assert again.result["verified"]  # a fetch that has nothing to do touches no file
    assert grokctl("verify", release, "--json").result["hashed_bytes"] == 0


def test_a_killed_fetch_goes_on(grokctl, kept, peer, loopback, tmp_path):
    root = shutil.copytree(kept / "killed-fetch", tmp_path / "miniature")
    whole, there = bytes_of(RELEASE), bytes_of(root)
    good = sum(
        len(whole[start : start + PIECE])
        for start in range(0, NBYTES, PIECE)
        if whole[start : start + PIECE] == there[start : start + PIECE]
    )
    fetch = ("fetch", expected_of(kept)["magnet"], "--to", root, "--peer", peer, *loopback)

    outcome = grokctl(*fetch, "--json")

    assert outcome.exit_code == 0
    assert 0 < good < NBYTES
    assert outcome.result["downloaded_bytes"] == NBYTES - good
    hashed = next(event["total"] for event in outcome.events if event.get("stage") == "verify")
    assert hashed <= NBYTES - good  # what resume data claim is believed
    assert bytes_of(root) == whole
    assert grokctl("verify", root).exit_code == 0


@pytest.mark.parametrize(
    ("name", "data"),
    [
        pytest.param(name, data, id=name)
        for name, data in {
            "source.json": json.dumps({"version": FUTURE, "infohashes": []}).encode(),
            "resume": b"d11:file-format22:libtorrent resume file12:file-versioni999ee",
            "receipt.json": json.dumps({"version": FUTURE}).encode(),
        }.items()
    ],
)
def test_a_fetch_beside_files_of_the_future_loses_nothing(
    grokctl, kept, release, loopback, name, data
):
    assert grokctl("verify", release).exit_code == 0
    (release / PRIVATE / "resume").unlink()
    (release / PRIVATE / name).write_bytes(data)

    outcome = grokctl("fetch", expected_of(kept)["magnet"], "--to", release, *loopback, "--json")

    assert outcome.exit_code == 0
    assert outcome.result["downloaded_bytes"] == 0
    assert outcome.result["verified"] is (name != "receipt.json")
    assert "verify" in stages(outcome)  # nothing claims the pieces, so they are hashed
    assert bytes_of(release) == bytes_of(RELEASE)


# --- repairs


def test_a_repair_that_nobody_answered_is_done(grokctl, kept, peer, loopback, tmp_path):
    root = rebuilt(kept / "failed-repair", tmp_path / "miniature")
    (aside,) = (root / PRIVATE / "damaged").iterdir()
    (name,) = {path.name for path in (kept / "failed-repair/ckpt-0").iterdir()}
    damaged = (root / "ckpt-0" / name).read_bytes()
    assert (aside / "ckpt-0" / name).read_bytes() == damaged

    found = grokctl("verify", root, "--json")
    still = grokctl("verify", root, "--json")
    assert aside.is_dir()
    mended = grokctl("verify", root, "--repair", "--peer", peer, *loopback, "--json")

    assert found.exit_code == still.exit_code == 20
    assert f"ckpt-0/{name}" in {damage["file"] for damage in found.result["damage"]}
    assert found.result["spared_files"] == 0 < still.result["spared_files"]
    assert mended.exit_code == 0
    assert mended.result["downloaded_bytes"] == found.result["mend_bytes"] == PIECE
    assert bytes_of(root) == bytes_of(RELEASE)
    assert not aside.parent.exists()
