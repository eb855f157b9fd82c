"""`--max-memory`: experts that do not fit come from the disk, and the text is the same."""

import json
import shutil
import signal
import subprocess

import httpx
import pytest
from served import server

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
    (words,) = (note for note in notes if note.endswith("(estimate)"))
    stages = [event.get("stage") for event in events]

    assert words.startswith("2 of 16 experts in memory, the others read from the disk ")
    assert " a token, " in words
    assert " for a prompt, at " in words
    assert any("2 of 16 experts in memory and the others from the disk" in note for note in notes)
    assert {"event": "finished", "stage": "stream"} in events
    assert stages.index("stream") > stages.index("load")
    assert events.index(next(e for e in events if e.get("message") == words)) < stages.index(
        "stream"
    )


def test_the_experts_that_a_text_chose_stay_once_they_were_counted(
    say, grokctl, cut, home, tmp_path
):
    root, own = cut("words", 1).root, tmp_path / "home"
    own.mkdir()
    (own / "cache").symlink_to(home / "cache")  # compiled programs
    before = say("-n", 12, *MORE, "--json", "--home", own)

    counted = grokctl("inspect", root, "--routing", PROMPT * 3, "--home", own, "--json")
    after = say("-n", 12, *MORE, "--json", "--home", own)

    assert counted.exit_code == 0
    assert after.result["text"] == before.result["text"]
    assert "counted" not in before.result["stats"]["pages"]
    assert after.result["stats"]["pages"].startswith(
        "8 of 16 experts in memory (those that counted texts chose most), the others "
    )
    assert after.result["stats"]["hit_rate"] != before.result["stats"]["hit_rate"]


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


def test_a_server_streams_as_well(process, cut, home, resident):
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    options = ("--slots", 1, *SOME)

    with server(process, home, *options, root=cut("words", 1).root, warms_up=True) as started:
        url = started.ready["url"]
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        started.send_signal(signal.SIGTERM)
        code = started.wait(60)

    assert answer["choices"][0]["text"] == resident["text"]
    assert code == 0
    assert any("2 of 16 experts in memory, the others read" in line for line in started.errors)


def test_too_little_memory_is_refused_with_all_numbers(say):
    refused = say("-n", 1, "--max-memory", "1MB")

    assert refused.exit_code == 40
    assert "with all other experts on the disk (" in refused.error
    assert "of 1.0 MB are free for it" in refused.error
    option, size = refused.hint.split()[-2:]
    assert option == "--max-memory"
    assert say("-n", 1, option, size).exit_code == 0
    less = 0.8 * float(size.removesuffix("MB"))
    assert say("-n", 1, option, f"{less:.2f}MB").exit_code == 40


def test_compressed_files_are_refused_with_the_command_that_makes_plain_ones(
    grokctl, home, tmp_path
):
    out = tmp_path / "packed"
    packed = ("--devices", 1, "--compress", "zstd", "--out", out, "--home", home)
    assert grokctl("reshard", "words", *packed).exit_code == 0

    refused = grokctl("run", out, "-p", PROMPT, "-n", 1, "--home", home, *SOME, *EXACT)

    assert refused.exit_code == 40
    assert refused.hint.startswith("grokctl reshard --devices 1")


FAILING = """
import errno, os, sys, threading, time
from pathlib import Path

def failing(old):
    def load(*args, **options):
        loaded = old(*args, **options)
        file = loaded.stream.file.reader._file
        usual, calls = file._preadv, []
        def read(handle, memory, start):
            calls.append(start)
            HOW
            return usual(handle, memory, start)
        file._preadv = read
        print("loaded", file=sys.stderr, flush=True)
        return loaded
    return load

patch("session.job:EngineJob._check_unchanged", lambda old: lambda self: None)
patch("infer:load_streamed", failing)
"""
"""The command with reads of streamed experts that go wrong as HOW says."""
SHRINKS = "len(calls) == 9 and os.truncate(next(Path(ROOT).glob('*.safetensors')), 4096)"
STALLS = "file._stall_s = 1.0; len(calls) > 9 and time.sleep(3600)"
BREAKS = "if len(calls) > 9: raise OSError(errno.EIO, os.strerror(errno.EIO))"
SLOWLY = "time.sleep(0.02)"


def failing(how, root=""):
    return FAILING.replace("HOW", how).replace("ROOT", repr(str(root)))


@pytest.mark.parametrize(
    ("how", "code", "sentence", "hint"),
    [
        pytest.param(SHRINKS, 20, "ends before byte", "grokctl verify ", id="a file shrinks"),
        pytest.param(STALLS, 40, "the disk has sent nothing for 1 s", "dmesg", id="a disk stalls"),
        pytest.param(BREAKS, 40, "Input/output error", "dmesg", id="a read fails"),
    ],
)
def test_what_goes_wrong_in_the_middle_of_a_run_ends_it_with_a_sentence(
    process, cut, home, tmp_path, how, code, sentence, hint
):
    root = shutil.copytree(cut("words", 1).root, tmp_path / "ready")
    arguments = ("run", root, "-p", PROMPT, "-n", 30, "--home", home, *SOME, *EXACT)

    ended = process.run(*arguments, code=failing(how, root))

    assert ended.exit_code == code
    assert sentence in ended.error
    assert str(root) in ended.error or code == 20
    assert ended.hint.startswith(hint)


@pytest.mark.parametrize("how", ["time.sleep(3600)", SLOWLY], ids=["stalls", "slow"])
def test_ctrl_c_does_not_wait_for_the_disk(process, cut, home, how):
    arguments = ("run", cut("words", 1).root, "-p", PROMPT, "-n", 60, "--home", home)
    is_dead = how != SLOWLY

    with process.start(*arguments, *SOME, *EXACT, code=failing(how)) as running:
        if is_dead:
            await_line(running.stderr, "loaded")
        else:
            assert running.stdout.read(1)  # in the middle of the text
        running.send_signal(signal.SIGINT)
        try:
            text, rest = running.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            running.kill()
            raise

    assert running.returncode == 130
    assert "Traceback" not in rest
    assert ("interrupted" if is_dead else "stopped") in rest
    assert is_dead or text.endswith("\n")


def test_a_killed_run_leaves_nothing_behind_and_the_next_one_runs(
    process, say, cut, home, resident
):
    root = cut("words", 1).root
    arguments = ("run", root, "-p", PROMPT, "-n", 60, "--home", home, *SOME, *EXACT)
    before = files_in(root, home)

    with process.start(*arguments, code=failing(SLOWLY)) as running:
        assert running.stdout.read(1)
        running.kill()
        running.communicate(timeout=60)

    assert running.returncode == -signal.SIGKILL
    assert files_in(root, home) == before
    assert say("-n", 12, *SOME, "--json").result["text"] == resident["text"]


def await_line(stream, word):
    for line in stream:
        if word in line:
            return
    raise AssertionError(f"no line with {word!r}")


def files_in(*roots):
    """All files but those of the compiler's cache."""
    found = (path for root in roots for path in root.rglob("*") if path.is_file())
    return {path: path.stat().st_mtime_ns for path in found if "cache" not in path.parts}
