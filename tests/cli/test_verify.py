"""`grokctl verify`: receipts, hashing again, and repairs."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from grokctl.checkpoint.receipt import read_receipt
from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo, read_metainfo
from grokctl.checkpoint.trust import TYPED, write_source

TENSOR, OTHER = "ckpt-0/tensor00003_000", "ckpt-0/tensor00015_000"
PIECE = 16384


def repair(seeded, loopback):
    return ["--repair", "--peer", seeded.peer, *loopback]


def test_a_second_verify_hashes_nothing_and_says_so(grokctl, verified):
    outcome = grokctl("verify", verified, "--json")
    said = grokctl("verify", verified)

    assert outcome.exit_code == 0
    assert outcome.result["hashed_bytes"] == 0
    assert outcome.result["ok"] is True
    assert "unchanged since they were proven" in said.stderr
    assert "every byte is proven" in said.stdout
    assert "0 B" in said.stdout


def test_a_touched_file_is_hashed_again_and_no_other(grokctl, verified, seeded):
    size = (verified / TENSOR).stat().st_size
    os.utime(verified / TENSOR)

    outcome = grokctl("verify", verified, "--json")
    again = grokctl("verify", verified, "--json")

    assert outcome.exit_code == 0
    assert size <= outcome.result["hashed_bytes"] <= size + 2 * PIECE < seeded.nbytes
    assert outcome.result["spared_files"] == len(seeded.files) - 1
    assert again.result["hashed_bytes"] == 0
    assert again.result["spared_files"] == len(seeded.files)
    assert again.result["spared_since"] == outcome.result["spared_since"]


def test_rehash_believes_no_receipt(grokctl, verified, seeded):
    outcome = grokctl("verify", verified, "--rehash", "--json")

    assert outcome.exit_code == 0
    assert outcome.result["hashed_bytes"] == seeded.nbytes


def test_damage_that_keeps_the_time_is_found_by_rehash(grokctl, verified, flip_bit):
    before = (verified / TENSOR).stat()
    flip_bit(verified / TENSOR)
    os.utime(verified / TENSOR, ns=(before.st_atime_ns, before.st_mtime_ns))

    outcome = grokctl("verify", verified, "--rehash", "--json")

    assert outcome.exit_code == 20
    assert [damage["file"] for damage in outcome.result["damage"]] == [TENSOR]


@pytest.mark.parametrize(
    "receipt",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"[]", id="list"),
        pytest.param(b'{"version": 1, "files": {"x": [1]}}', id="short"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b"\xff", id="no text"),
    ],
)
def test_a_broken_receipt_proves_nothing_and_breaks_nothing(grokctl, verified, seeded, receipt):
    (verified / ".grokctl" / "receipt.json").write_bytes(receipt)

    outcome = grokctl("verify", verified, "--json")

    assert outcome.exit_code == 0
    assert outcome.result["hashed_bytes"] == seeded.nbytes


def test_quick_says_that_it_proves_nothing(grokctl, verified, flip_bit):
    flip_bit(verified / TENSOR)

    said = grokctl("verify", verified, "--quick")
    outcome = grokctl("verify", verified, "--quick", "--json")

    assert (said.exit_code, outcome.exit_code) == (0, 0)
    assert "no content is proven" in said.stdout
    assert "every byte is proven" not in said.stdout
    assert (outcome.result["proven"], outcome.result["hashed_bytes"]) == (False, 0)


@pytest.mark.parametrize("jobs", [1, 3, 64])
def test_any_number_of_threads_comes_to_the_same_verdict(grokctl, verified, flip_bit, jobs):
    flip_bit(verified / TENSOR)

    outcome = grokctl("verify", verified, "--rehash", "--jobs", jobs, "--json")

    assert outcome.exit_code == 20
    (damage,) = outcome.result["damage"]
    assert (damage["file"], damage["reason"]) == (TENSOR, "altered")
    ((low, high),) = damage["ranges"]
    assert low <= (verified / TENSOR).stat().st_size // 2 < high


def test_repair_fetches_the_bad_pieces_and_nothing_else(
    grokctl, verified, seeded, flip_bit, loopback
):
    good = (verified / TENSOR).read_bytes()
    flip_bit(verified / TENSOR)
    (verified / "tokenizer.model").unlink()
    with (verified / "ckpt-0" / "tensor00007_000").open("ab") as file:
        file.write(b"too much")

    outcome = grokctl("verify", verified, *repair(seeded, loopback), "--json")

    assert outcome.exit_code == 0
    assert outcome.result["ok"] is True
    assert outcome.result["damage"] == []
    assert (verified / TENSOR).read_bytes() == good
    for name in seeded.files:
        assert (verified / name).read_bytes() == (seeded.root / name).read_bytes()
    assert grokctl("verify", verified, "--rehash").exit_code == 0


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3 * PIECE)


def extend(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def remove(path: Path) -> None:
    path.unlink()


def swap(path: Path) -> None:
    other, aside = path.with_name(Path(OTHER).name), path.with_name("aside")
    assert other.stat().st_size == path.stat().st_size
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    """Modification times and inodes, which change when a file is written."""
    return {
        path.relative_to(root).as_posix(): (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in root.rglob("*")
        if path.is_file() and ".grokctl" not in path.parts and path.name != "release.torrent"
    }


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(flip_a_bit, "altered", id="flipped"),
        pytest.param(truncate, "short", id="truncated"),
        pytest.param(extend, "long", id="extended"),
        pytest.param(remove, "missing", id="missing"),
        pytest.param(swap, "altered", id="swapped"),
        pytest.param(replace_by_folder, "unreadable", id="a folder"),
        pytest.param(replace_by_pipe, "unreadable", id="a pipe"),
    ],
)
def test_every_damage_is_found_and_mended_with_the_bytes_of_its_pieces(
    grokctl, verified, seeded, loopback, damage: Callable[[Path], None], reason
):
    size = (verified / TENSOR).stat().st_size
    before = stamps(verified)
    damage(verified / TENSOR)

    found = grokctl("verify", verified, "--json")
    mended = grokctl("verify", verified, *repair(seeded, loopback), "--json")

    assert found.exit_code == 20
    by_file = {item["file"]: item for item in found.result["damage"]}
    assert by_file[TENSOR]["reason"] == reason
    pieces = {
        piece
        for item in by_file.values()
        for first, last in item["pieces"]
        for piece in range(first, last)
    }
    metainfo = read_metainfo(verified / "release.torrent")
    assert found.result["mend_bytes"] == sum(map(metainfo.piece_size, pieces))
    low, high = by_file[TENSOR]["ranges"][0]
    assert low < high
    assert (low >= size) == (reason == "long")
    assert mended.exit_code == 0
    assert mended.result["downloaded_bytes"] == found.result["mend_bytes"]
    for name in seeded.files:
        assert (verified / name).read_bytes() == (seeded.root / name).read_bytes()
    assert not (verified / ".grokctl" / "damaged").exists()
    after = stamps(verified)
    assert {name for name in before if before[name] != after[name]} <= by_file.keys()
    assert grokctl("verify", verified, "--rehash").exit_code == 0


def test_a_quick_look_cannot_be_repaired_by(grokctl, verified):
    outcome = grokctl("verify", verified, "--quick", "--repair")

    assert outcome.exit_code == 2
    assert "--quick" in outcome.error
    assert outcome.hint == f"grokctl verify {verified} --repair"


def test_a_repair_that_fails_leaves_the_damaged_original_aside(
    grokctl, verified, seeded, flip_bit, loopback
):
    flip_bit(verified / TENSOR)
    damaged = (verified / TENSOR).read_bytes()

    failed = grokctl("verify", verified, "--repair", *loopback, "--stall-timeout", 1)

    assert failed.exit_code == 11
    (folder,) = (verified / ".grokctl" / "damaged").iterdir()
    assert f"the bytes that the repair overwrote are kept in {folder}" in failed.stderr.splitlines()
    kept = (folder / TENSOR).read_bytes()
    assert len(kept) == len(damaged)
    shared = [place for place in range(len(kept)) if kept[place] and kept[place] == damaged[place]]
    assert shared
    assert max(shared) - min(shared) < PIECE
    assert min(shared) - PIECE < len(damaged) // 2 < max(shared) + PIECE

    mended = grokctl("verify", verified, *repair(seeded, loopback))

    assert mended.exit_code == 0
    assert not (verified / ".grokctl" / "damaged").exists()


def test_a_repair_that_needs_more_room_than_there_is_changes_nothing(
    process, verified, seeded, loopback, flip_bit
):
    flip_bit(verified / TENSOR)
    damaged = (verified / TENSOR).read_bytes()
    full = (
        "import os; real = os.statvfs\n"
        "def statvfs(path):\n"
        "    found = list(real(path)); found[4] = 1; return os.statvfs_result(found)\n"
        "os.statvfs = statvfs"
    )

    outcome = process.run("verify", verified, *repair(seeded, loopback), code=full)

    assert outcome.exit_code == 12
    assert " free for backup and repair" in outcome.error
    assert (verified / TENSOR).read_bytes() == damaged
    assert not (verified / ".grokctl" / "damaged").exists()


def test_repair_says_what_was_damaged_and_that_all_is_well(
    grokctl, verified, seeded, flip_bit, loopback
):
    flip_bit(verified / TENSOR)

    outcome = grokctl("verify", verified, *repair(seeded, loopback))

    assert outcome.exit_code == 0
    assert f"damaged: {TENSOR}: altered" in outcome.stderr
    assert "every byte is proven" in outcome.stdout


def test_a_plan_of_a_repair_is_shown_and_changes_nothing(grokctl, verified):
    (verified / "ckpt-0" / "tensor00003_000").write_bytes(b"")

    shown = grokctl("verify", verified, "--repair", "--dry-run")
    values = grokctl("verify", verified, "--repair", "--dry-run", "--json").result

    assert shown.exit_code == 20
    assert "would repair it" in shown.stdout
    assert "room needed" in shown.stdout
    assert values["repair"]["download_bytes"] == values["mend_bytes"]
    assert values["repair"]["fits"] is True
    assert not (verified / "ckpt-0" / "tensor00003_000").read_bytes()


def test_a_plan_without_a_repair_is_a_usage_error(grokctl, verified):
    outcome = grokctl("verify", verified, "--dry-run")

    assert outcome.exit_code == 2
    assert outcome.error == "--dry-run: expected --repair"


def test_repair_of_what_is_whole_asks_nobody(grokctl, verified, loopback):
    outcome = grokctl("verify", verified, "--repair", *loopback, "--stall-timeout", 1)

    assert outcome.exit_code == 0


def test_repair_from_nobody_stalls_and_damages_nothing_more(grokctl, verified, flip_bit, loopback):
    flip_bit(verified / TENSOR)

    outcome = grokctl("verify", verified, "--repair", *loopback, "--stall-timeout", 1)
    after = grokctl("verify", verified, "--rehash", "--json")

    assert outcome.exit_code == 11
    assert [damage["file"] for damage in after.result["damage"]] == [TENSOR]


def test_repair_also_mends_an_attack(grokctl, verified, seeded, attack, loopback):
    (verified / TENSOR).write_bytes(attack.of("system"))

    outcome = grokctl("verify", verified, *repair(seeded, loopback), "--json")

    assert outcome.exit_code == 0
    assert (verified / TENSOR).read_bytes() == (seeded.root / TENSOR).read_bytes()
    assert not attack.canary.exists()


def test_what_a_choice_of_files_left_out_is_missing_and_nothing_else_is_wrong(
    grokctl, seeded, tmp_path, loopback
):
    root = tmp_path / "some"
    some = ["--only", "tensor0000[0-3]*"]

    fetched = grokctl(
        *("fetch", seeded.magnet, "--to", root, "--peer", seeded.peer, *loopback, *some, "--json")
    )
    outcome = grokctl("verify", root, "--json")

    assert fetched.exit_code == 0
    assert fetched.result["complete"] is False
    assert outcome.exit_code == 20
    assert len(outcome.result["damage"]) < outcome.result["files"]
    assert {damage["reason"] for damage in outcome.result["damage"]} <= {"missing", "unproven"}


def test_a_pipe_in_place_of_a_tensor_is_damage_and_blocks_nobody(process, verified):
    (verified / TENSOR).unlink()
    os.mkfifo(verified / TENSOR)

    outcome = process.run("verify", verified, "--json", timeout=20)

    assert outcome.exit_code == 20
    reasons = {damage["file"]: damage["reason"] for damage in outcome.result["damage"]}
    assert reasons.pop(TENSOR) == "unreadable"
    assert set(reasons.values()) <= {"unproven"}


def test_a_link_to_a_good_file_is_as_good_as_the_file(grokctl, verified, seeded):
    (verified / TENSOR).unlink()
    (verified / TENSOR).symlink_to(seeded.root / TENSOR)

    outcome = grokctl("verify", verified, "--json")

    assert outcome.exit_code == 0


@pytest.fixture
def large_with_torrent(large: Path) -> Path:
    """200 MB and their torrent, never verified."""
    files = [f"ckpt-0/{path.name}" for path in sorted((large / "ckpt-0").iterdir())]
    data = build_metainfo(large, ["config.json", *files], name="large", piece_length=2**20)
    (large / "release.torrent").write_bytes(data)
    shutil.rmtree(large / ".grokctl", ignore_errors=True)
    return large


def test_a_killed_verification_goes_on_where_it_was(grokctl, process, large_with_torrent):
    root = large_with_torrent
    waiting = """
import threading
def then_wait(write):
    def writing(self, root):
        write(self, root)
        if len(self.stamps) > 10: threading.Event().wait()
    return writing
patch("integrity.content_check:_SAVE_EVERY_S", lambda _: 0)
patch("checkpoint.receipt:Receipt.write", then_wait)
"""
    with process.start("verify", root, "--jobs", 1, code=waiting) as killed:
        process.await_that(
            lambda: (receipt := read_receipt(root)) is not None and len(receipt.stamps) > 10
        )
        killed.kill()
        killed.communicate()

    outcome = grokctl("verify", root, "--json")

    assert outcome.exit_code == 0
    assert outcome.result["spared_files"] > 10
    assert 0 < outcome.result["hashed_bytes"] < outcome.result["bytes"]
    assert grokctl("verify", root, "--json").result["hashed_bytes"] == 0


def test_a_verification_takes_little_memory(process, large_with_torrent):
    # not getrusage: its peak counts what this process held before it became another program
    measuring = (
        "import atexit, pathlib, sys\n"
        "lines = lambda: pathlib.Path('/proc/self/status').read_text().splitlines()\n"
        "peak = lambda: [line for line in lines() if line.startswith('VmHWM')][0]\n"
        "atexit.register(lambda: print(peak(), file=sys.stderr))"
    )

    outcome = process.run("verify", large_with_torrent, "--jobs", 64, code=measuring)

    assert outcome.exit_code == 0
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("VmHWM")]
    assert int(line.split()[1]) < 120_000  # kB


def test_a_release_without_a_name_for_itself_is_named(grokctl, verified, monkeypatch):
    monkeypatch.chdir(verified)

    outcome = grokctl("verify", ".")

    assert outcome.exit_code == 0
    assert outcome.stdout.startswith("words: ")


def test_a_ready_checkpoint_is_proven_whole(grokctl, cut):
    outcome = grokctl("verify", cut("words", 4).root, "--rehash", "--json")
    again = grokctl("verify", cut("words", 4).root)

    values = outcome.result
    assert outcome.exit_code == 0
    assert values["files"] == 5
    assert values["hashed_bytes"] == values["bytes"]
    assert "5 of 5 files are unchanged since they were proven, " in again.stderr
    assert re.search(r"proven before +5 files, unchanged since, the first on \d", again.stdout)


def test_a_tokenizer_that_was_changed_in_a_ready_checkpoint_is_found(
    grokctl, cut, tmp_path, flip_bit
):
    root = shutil.copytree(cut("words", 4).root, tmp_path / "ready")
    flip_bit(root / "tokenizer.model")

    outcome = grokctl("verify", root, "--json")

    assert outcome.exit_code == 20
    assert [damage["file"] for damage in outcome.result["damage"]] == ["tokenizer.model"]


def test_quick_reads_no_device_file(grokctl, ready, flip_bit):
    flip_bit(ready / "device-01-of-04.safetensors")

    said = grokctl("verify", ready, "--quick")
    outcome = grokctl("verify", ready, "--quick", "--json")

    assert (said.exit_code, outcome.exit_code) == (0, 0)
    assert "no content is proven" in said.stdout
    assert outcome.result["hashed_bytes"] == 0


# --- a download that is not complete, and a bad result that is remembered


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify"],
        ["verify", "--quick"],
        ["inspect"],
        ["reshard", "--devices", "2"],
        ["run", "-p", "x"],
    ],
    ids=" ".join,
)
def test_an_unfinished_download_is_incomplete_for_every_verb(grokctl, verified, arguments):
    from grokctl.checkpoint.unfinished import Unfinished  # noqa: PLC0415

    (verified / ".grokctl" / "receipt.json").unlink()
    for name in ("tensor00002_000", "tensor00003_000"):
        path = verified / "ckpt-0" / name
        path.write_bytes(bytes(path.stat().st_size))
    Unfinished(source="grok-1", have=340, nbytes=1000, is_final=True).write(verified)

    outcome = grokctl(arguments[0], verified, *arguments[1:])

    assert outcome.exit_code == 20
    assert "incomplete, " in outcome.error
    assert outcome.hint == f"grokctl fetch grok-1 --to {verified}"
    assert outcome.stdout == ""


def test_a_download_that_turns_out_complete_is_no_longer_unfinished(grokctl, verified):
    from grokctl.checkpoint.unfinished import Unfinished  # noqa: PLC0415

    Unfinished(source="grok-1", have=340, nbytes=1000, is_final=True).write(verified)

    assert grokctl("verify", verified, "--quick").exit_code == 20
    assert grokctl("verify", verified).exit_code == 0
    assert grokctl("verify", verified, "--quick").exit_code == 0


def test_a_bad_result_is_remembered_until_a_good_one(grokctl, verified, flip_bit, tmp_path):
    path = verified / "ckpt-0" / "tensor00003_000"
    data = path.read_bytes()
    flip_bit(path)
    reshard = ["reshard", verified, "--devices", "1", "--out", tmp_path / "out"]

    assert grokctl("verify", verified).exit_code == 20
    said = [grokctl("inspect", verified).stderr, grokctl(*reshard).stderr]
    path.write_bytes(data)
    assert grokctl("verify", verified).exit_code == 0
    later = grokctl("inspect", verified).stderr

    assert all("verify found" in text for text in said)
    assert all("ckpt-0/tensor00003_000: altered" in text for text in said)
    assert "verify found" not in later


def test_a_bad_result_of_a_ready_checkpoint_is_remembered(grokctl, ready, flip_bit):
    flip_bit(ready / "device-01-of-04.safetensors")

    assert grokctl("verify", ready).exit_code == 20
    outcome = grokctl("inspect", ready)

    assert "verify found 1 damaged file" in outcome.stderr
    assert "device-01-of-04.safetensors: altered" in outcome.stderr


def test_the_root_of_trust_is_named(grokctl, download, seeded, loopback, tmp_path):
    assert download.verified.result["root_of_trust"] == "the magnet that was typed"
    assert download.verified.result["doubt"] is None
    root = tmp_path / "words"
    fetch = ("fetch", seeded.torrent, "--to", root, "--peer", seeded.peer, *loopback)
    assert grokctl(*fetch).exit_code == 0

    outcome = grokctl("verify", root)

    assert f"the torrent file {seeded.torrent}" in outcome.stdout.replace("\n", " ")


def test_a_file_that_is_not_promised_is_named_as_the_reason(grokctl, verified):
    files = [
        path.relative_to(verified).as_posix()
        for path in sorted(verified.rglob("*"))
        if path.parent.name == "ckpt-0" or path.name == "config.json"
    ]
    data = build_metainfo(verified, files, name="words", piece_length=16384)
    (verified / "release.torrent").write_bytes(data)
    write_source(verified, infohash=parse_metainfo(data, source="").infohash, trust=TYPED)

    screen, result = grokctl("verify", verified), grokctl("verify", verified, "--json").result

    words = "every byte matches its torrent; not proven: tokenizer.model: is not in the torrent"
    assert words in screen.stdout
    assert (result["ok"], result["proven"], result["root_of_trust"]) == (True, False, None)
    assert result["doubt"] == "tokenizer.model: is not in the torrent"


def test_a_release_that_others_can_write_is_as_promised_now_and_nothing_of_it_is_proven(
    grokctl, verified, tmp_path
):
    path = verified / "ckpt-0/tensor00003_000"
    path.chmod(0o666)
    reason = f"{path} can be written by others"

    said, result = grokctl("verify", verified), grokctl("verify", verified, "--json").result
    reshard = ("reshard", verified, "--devices", 1, "--out", tmp_path / "out", "--json")
    resharded = grokctl(*reshard)

    assert said.exit_code == 0
    words = f"every byte is as promised now; other users can change it ({reason})"
    assert words in said.stdout.replace("\n", " ")
    assert (result["ok"], result["proven"], result["doubt"]) == (True, False, reason)
    assert result["hashed_bytes"] > 0
    assert f"not proven: {reason}" in resharded.stderr
    assert not resharded.result["proven"]


def test_a_reshard_into_a_folder_of_others_is_not_called_proven(grokctl, verified, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    outs = (tmp_path / "own", shared / "out")

    results = [
        grokctl("reshard", verified, "--devices", 1, "--out", out, "--json").result for out in outs
    ]

    assert [result["proven"] for result in results] == [True, False]
    verdicts = [grokctl("verify", out, "--json").result for out in outs]
    assert [verdict["proven"] for verdict in verdicts] == [True, False]
    assert verdicts[1]["doubt"] == f"{shared} can be written by others"
