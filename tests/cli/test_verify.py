"""What `grokctl verify` believes, what it hashes again, and how it mends."""

import os
import shutil

import pytest

TENSOR = "ckpt-0/tensor00003_000"


def repair(seeded, loopback):
    return ["--repair", "--peer", seeded.peer, *loopback]


def test_a_second_verify_hashes_nothing_and_says_so(grokctl, verified):
    outcome = grokctl("verify", verified, "--json")
    said = grokctl("verify", verified)

    assert outcome.exit_code == 0
    assert outcome.result["hashed_bytes"] == 0
    assert outcome.result["ok"] is True
    assert "untouched since their last proof" in said.stderr
    assert "every byte is right" in said.stdout
    assert "0 B" in said.stdout


def test_a_touched_file_is_hashed_again_and_no_other(grokctl, verified, seeded):
    size = (verified / TENSOR).stat().st_size
    os.utime(verified / TENSOR)

    outcome = grokctl("verify", verified, "--json")
    again = grokctl("verify", verified, "--json")

    assert outcome.exit_code == 0
    assert size <= outcome.result["hashed_bytes"] <= size + 2 * 16384 < seeded.nbytes
    assert again.result["hashed_bytes"] == 0


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
    assert "every byte is right" not in said.stdout
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


def test_repair_downloads_little(process, verified, seeded, flip_bit, loopback):
    flip_bit(verified / TENSOR)
    counting = (
        "import sys; from grokctl import cli, fetch\n"
        "real = fetch.fetch\n"
        "def counted(*arguments, **options):\n"
        "    done = real(*arguments, **options)\n"
        "    print(f'downloaded={done.downloaded}', file=sys.stderr)\n"
        "    return done\n"
        "fetch.fetch = counted\n"
        "cli.main()"
    )

    outcome = process.run("verify", verified, *repair(seeded, loopback), code=counting)

    assert outcome.exit_code == 0
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("downloaded=")]
    assert int(line.removeprefix("downloaded=")) == 16384


def test_repair_says_what_was_damaged_and_that_all_is_well(
    grokctl, verified, seeded, flip_bit, loopback
):
    flip_bit(verified / TENSOR)

    outcome = grokctl("verify", verified, *repair(seeded, loopback))

    assert outcome.exit_code == 0
    assert f"damaged: {TENSOR}: altered" in outcome.stderr
    assert "every byte is right" in outcome.stdout


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
    assert reasons.pop(TENSOR) in {"missing", "unreadable", "short"}
    assert set(reasons.values()) <= {"unproven"}


def test_a_link_to_a_good_file_is_as_good_as_the_file(grokctl, verified, seeded):
    (verified / TENSOR).unlink()
    (verified / TENSOR).symlink_to(seeded.root / TENSOR)

    outcome = grokctl("verify", verified, "--json")

    assert outcome.exit_code == 0


def test_a_release_without_a_name_for_itself_is_named(grokctl, verified, monkeypatch):
    monkeypatch.chdir(verified)

    outcome = grokctl("verify", ".")

    assert outcome.exit_code == 0
    assert outcome.stdout.startswith("words: ")


def test_a_ready_checkpoint_is_proven_whole(grokctl, cut):
    outcome = grokctl("verify", cut("words", 4).root, "--json")

    values = outcome.result
    assert outcome.exit_code == 0
    assert values["files"] == 5
    assert values["hashed_bytes"] == values["bytes"]


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
