"""`--max-memory`: experts that do not fit come from the disk, and the text is the same."""

import json
import shutil
import signal
import subprocess

import pytest

EXACT = ("--compute", "float32", "--ignore-eos", "--temperature", 0)
SOME, MORE = ("--max-memory", "2MB"), ("--max-memory", "2.5MB")
"""Memory for 2, and for 8, of the 16 experts of the release with the tokenizer."""
PROMPT = "The import statement"


@pytest.fixture(scope="module")
def say(grokctl, home, cut):
    """Run the release with the tokenizer on one device."""

    def run(*arguments, root=None):
        given = root or cut("words", 1).root
        return grokctl("run", given, "-p", PROMPT, "--home", home, *EXACT, *arguments)

    return run


@pytest.fixture(scope="module")
def resident(say):
    """A text with all experts in memory."""
    return say("-n", 12, "--json").result


@pytest.fixture(scope="module")
def streamed(say):
    """The same with two of sixteen."""
    outcome = say("-n", 12, *SOME, "--json")
    assert outcome.exit_code == 0
    return outcome


def test_the_text_is_the_same_and_numbers_say_what_came_from_the_disk(resident, streamed):
    found, stats = streamed.result, streamed.result["stats"]

    assert found["tokens"] == resident["tokens"]
    assert found["text"] == resident["text"]
    assert stats["disk_bytes_per_token"] > 0
    assert 0 <= stats["hit_rate"] < 1
    assert stats["disk_fraction"] > 0
    assert stats["waited_s"] > 0
    assert stats["pages"].startswith("2 of 16 experts in memory, the others read from the disk")
    one = 68_448  # bytes of an expert; of two layers each token chooses two
    assert stats["disk_bytes_per_token"] == pytest.approx((1 - stats["hit_rate"]) * 4 * one, abs=1)
    none = resident["stats"]
    assert (none["hit_rate"], none["disk_bytes_per_token"], none["waited_s"]) == (None, None, 0)


def test_a_line_says_what_stays_and_what_a_token_takes_before_it_starts(streamed):
    events = streamed.events
    notes = [event["message"] for event in events if event["event"] == "noted"]
    (words,) = (note for note in notes if "a token, at" in note)
    stages = [event.get("stage") for event in events]

    assert words.startswith("2 of 16 experts in memory, the others read from the disk ")
    assert any("2 of 16 experts in memory and the others from the disk" in note for note in notes)
    assert {"event": "finished", "stage": "stream"} in events
    assert stages.index("stream") > stages.index("load")
    assert events.index(next(e for e in events if e.get("message") == words)) < stages.index(
        "stream"
    )


def test_more_memory_hits_more_often(say, resident):
    found = say("-n", 12, *MORE, "--stats")

    assert found.exit_code == 0
    assert found.stdout == resident["text"] + "\n"
    assert "8 of 16 experts in memory" in found.stderr
    assert "a token from the disk at " in found.stderr


def test_many_prompts_share_what_is_read_and_score_and_bench_stream_as_well(
    grokctl, home, cut, resident, tmp_path
):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": PROMPT, "max_tokens": 12}, {"prompt": "a", "max_tokens": 3}] * 2
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    root = cut("words", 1).root
    given = (root, "--home", home, "--compute", "float32", *SOME)

    many = grokctl("run", *given, "--prompts-file", prompts, *EXACT[2:], "--batch", 3, "--json")
    scores = [
        grokctl("score", *given[: -len(cut_off)] if cut_off else given, "--token-ids", "1,2,3,4")
        for cut_off in ((), SOME)
    ]
    bench = grokctl("bench", *given, "--prompt-tokens", "3", "--batch", "1", "-n", 3, "--json")

    *texts, last = (json.loads(line) for line in many.stdout.splitlines())
    assert [one["text"] for one in texts if one["index"] in {0, 2}] == [resident["text"]] * 2
    assert last["stats"]["hit_rate"] < 1
    assert scores[0].stdout == scores[1].stdout
    assert bench.result["rows"][0]["disk_bytes_per_step"] > 0


def test_too_little_memory_is_refused_with_all_numbers(say):
    refused = say("-n", 1, "--max-memory", "1MB")

    assert refused.exit_code == 40
    assert "with all other experts on the disk (" in refused.error
    assert "of 1.0 MB are free for it" in refused.error
    assert refused.hint is not None


def test_compressed_files_are_refused_with_the_command_that_makes_plain_ones(
    grokctl, home, tmp_path
):
    out = tmp_path / "packed"
    packed = ("--devices", 1, "--compress", "zstd", "--out", out, "--home", home)
    assert grokctl("reshard", "words", *packed).exit_code == 0

    refused = grokctl("run", out, "-p", PROMPT, "-n", 1, "--home", home, *SOME, *EXACT)

    assert refused.exit_code == 40
    assert refused.hint.startswith("grokctl reshard --devices 1")


def test_a_file_that_is_cut_in_the_middle_of_a_run_is_damage(process, cut, home, tmp_path):
    root = shutil.copytree(cut("words", 1).root, tmp_path / "ready")
    code = """
import os
from pathlib import Path

def cut(old):
    def load(*args, **options):
        loaded = old(*args, **options)
        (file,) = Path(ROOT).glob("*.safetensors")
        os.truncate(file, 4096)
        return loaded
    return load

patch("session.job:EngineJob._check_unchanged", lambda old: lambda self: None)
patch("infer:load_streamed", cut)
""".replace("ROOT", repr(str(root)))

    ended = process.run(
        *("run", root, "-p", PROMPT, "-n", 4, "--home", home, *SOME, *EXACT), code=code
    )

    assert ended.exit_code == 20
    assert "ends before byte" in ended.error


def test_a_disk_that_stalls_ends_the_run_and_ctrl_c_does_not_wait_for_it(process, cut, home):
    root = cut("words", 1).root
    arguments = ("run", root, "-p", PROMPT, "-n", 4, "--home", home, *SOME, *EXACT)
    stalls = """
import threading, time

def stalling(old):
    def load(*args, **options):
        loaded = old(*args, **options)
        print("loaded", file=__import__("sys").stderr, flush=True)
        loaded.stream.file.reader._file._preadv = lambda *args: time.sleep(3600)
        loaded.stream.file.reader._file._stall_s = STALL
        return loaded
    return load

patch("infer:load_streamed", stalling)
"""

    ended = process.run(*arguments, code=stalls.replace("STALL", "1.0"))
    with process.start(*arguments, code=stalls.replace("STALL", "600.0")) as running:
        for line in running.stderr:
            if "loaded" in line:
                break
        running.send_signal(signal.SIGINT)
        try:
            _, rest = running.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            running.kill()
            raise

    assert ended.exit_code == 40
    assert "the disk has sent nothing for" in ended.error
    assert running.returncode == 130
    assert "interrupted" in rest
