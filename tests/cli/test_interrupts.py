"""Ctrl-C and SIGTERM end every command within seconds, with exit code 130, and lose no data."""

import shutil
import signal
import time

import pytest

from grokctl.checkpoint.torrent import build_metainfo


@pytest.fixture
def interrupt(process):
    """Start a command, wait for a point in its output, interrupt it, and return its end."""

    def stop(*arguments, until, by, **options):
        with process.start(*arguments, **options) as running:
            stderr = until(running)
            began = time.monotonic()
            running.send_signal(by)
            stdout, rest = running.communicate(timeout=30)
        return running.returncode, stdout, stderr + rest, time.monotonic() - began

    return stop


def event(*words):
    """Wait for a line on stderr with these words."""

    def wait(running):
        seen = ""
        for line in running.stderr:
            seen += line
            if all(word in line for word in words):
                return seen
        raise AssertionError(seen)

    return wait


def assert_interrupted(ended, *, resumes=False):
    code, stdout, stderr, seconds = ended
    assert code == 130, (code, stderr)
    assert seconds < 15
    assert "Traceback" not in stderr
    assert "Exception ignored" not in stderr
    assert "interrupted" in stderr
    assert ("resumes where it stopped" in stderr) is resumes
    assert stdout == ""


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("device-*"))


# --- fetch


def test_a_fetch_that_waits_for_a_swarm_can_be_stopped(
    interrupt, stop_signal, seeded, tmp_path, loopback
):
    ended = interrupt(
        *("fetch", seeded.magnet, "--to", tmp_path / "words", *loopback, "--json"),
        until=event("advanced", "metadata"),
        by=stop_signal,
    )

    assert_interrupted(ended, resumes=True)
    assert not (tmp_path / "words" / "ckpt-0").exists()


def test_a_stopped_fetch_goes_on(interrupt, grokctl, seeded, tmp_path, loopback):
    root = tmp_path / "words"
    arguments = ("fetch", seeded.magnet, "--to", root, "--peer", seeded.peer, *loopback, "--json")

    def some_of_it(running):
        seen = ""
        for line in running.stderr:
            seen += line
            if '"fetch"' in line and '"advanced"' in line and '"done": 0,' not in line:
                return seen
        raise AssertionError(seen)

    ended = interrupt(*arguments, "--max-download", "400kB", until=some_of_it, by=signal.SIGINT)
    rest = grokctl(*arguments)

    assert_interrupted(ended, resumes=True)
    assert rest.exit_code == 0
    assert 0 < rest.result["downloaded_bytes"] < seeded.nbytes
    assert grokctl("verify", root, "--rehash").exit_code == 0


# --- verify


@pytest.fixture
def endless(verified):
    """A release that takes a while to hash: a sparse file and its torrent."""
    with (verified / "holes").open("wb") as file:
        file.truncate(60 * 2**20)
    files = ["holes", "ckpt-0/tensor00001_000"]
    data = build_metainfo(verified, files, name="holes", piece_length=16384)
    shutil.rmtree(verified / ".grokctl")
    (verified / "release.torrent").write_bytes(data)
    return verified


def test_a_verify_can_be_stopped(interrupt, stop_signal, process, endless):
    slow = "patch('integrity.pieces:_PieceReader.check', delayed(0.01))"

    ended = interrupt(
        *("verify", endless, "--json"),
        code=slow,
        until=event("advanced", "verify"),
        by=stop_signal,
    )

    assert_interrupted(ended)
    assert process.run("verify", endless, "--quick").exit_code == 0


def test_a_verify_of_a_ready_checkpoint_can_be_stopped_inside_a_file(interrupt, stop_signal, cut):
    slow = (
        "patch('integrity.file_hashing:AHEAD', lambda _: 4096)\n"
        "patch('integrity.file_hashing:Feeder.feed', delayed(0.2))"
    )

    ended = interrupt(
        *("verify", cut("two-layers", 1).root, "--rehash", "--json"),
        code=slow,
        until=event("advanced", "verify"),
        by=stop_signal,
    )

    assert_interrupted(ended)


# --- reshard


def test_a_stopped_reshard_goes_on(interrupt, stop_signal, process, large, tmp_path):
    out = tmp_path / "ready"
    often = "patch('resharding.writers:_FLUSH_EVERY', lambda _: 2**20)"
    arguments = ("reshard", large, "--devices", 8, "--out", out, "--jobs", 1)

    def half_of_it(_):
        process.await_that(lambda: size_of(tmp_path) > 60e6)
        return ""

    ended = interrupt(*arguments, code=often, until=half_of_it, by=stop_signal)
    published = out.exists()
    rest = process.run(*arguments, code=often)
    checked = process.run("verify", out)

    assert_interrupted(ended, resumes=True)
    assert not published
    assert rest.exit_code == 0
    assert "continuing after" in rest.stderr
    assert checked.exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ready"]


# --- run


@pytest.mark.parametrize("moment", ["compile", "decode"])
def test_a_run_can_be_stopped_while_it_compiles_and_while_it_writes(
    interrupt, stop_signal, home, cut, moment
):
    root = cut("words", 4).root
    arguments = ("run", root, "-p", "import", "--ignore-eos", "--home", home)
    if moment == "compile":
        ended = interrupt(*arguments, "--json", until=event("compile"), by=stop_signal)
        assert_interrupted(ended)
        return

    written = []
    slow = "patch('inference.model_runner:ModelRunner._run', delayed(0.1))"
    ended = interrupt(
        *arguments,
        code=slow,
        until=lambda running: written.append(running.stdout.read(1)) or "",
        by=stop_signal,
    )

    code, _, stderr, seconds = ended
    assert code == 130, stderr
    assert seconds < 15
    assert stderr.rstrip().endswith("interrupted")
    assert written != [""]


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "text"])
def test_ctrl_c_ends_a_text_and_says_what_there_is(process, home, cut, as_json):
    code = """
import os, signal
def pressed(decode):
    return lambda *arguments: (os.kill(os.getpid(), signal.SIGINT), decode(*arguments))[1]
patch("inference.model_runner:ModelRunner.decode", pressed)
"""

    outcome = process.run(
        *("run", cut("words", 1).root, "-p", "import", "--ignore-eos", "--home", home),
        *(["--json"] if as_json else []),
        code=code,
    )

    assert outcome.exit_code == 130
    assert "Traceback" not in outcome.stderr
    if as_json:
        assert outcome.result["finish_reason"] == "interrupted"
        assert len(outcome.result["tokens"]) == 2  # the step under way is done, and none after it
        assert outcome.result["stats"]["decode_tokens_per_s"] > 0
    else:
        assert outcome.stdout.endswith("\n")
        *_, line, last = outcome.stderr.splitlines()
        assert line.startswith("stopped · ")
        assert "decode" in line
        assert "seed" in line
        assert last == "interrupted"


def test_a_score_can_be_stopped(interrupt, home):
    ended = interrupt(
        *("score", home / "releases" / "two-layers", "--token-ids", "1,2", "--json"),
        *("--home", home / "nothing cached"),
        until=event("compile"),
        by=signal.SIGINT,
    )

    assert_interrupted(ended)


# --- everywhere


@pytest.mark.parametrize("module", ["rich.console", "grokctl.screen.run", "numpy", "jax"])
def test_an_interrupt_while_modules_are_loaded_is_one_too(process, home, stop_signal, module):
    code = (
        "import os, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            sys.meta_path.remove(self)\n"
        f"            os.kill(os.getpid(), {stop_signal:d})\n"
        "sys.meta_path.insert(0, Stop())"
    )

    outcome = process.run("run", home / "releases" / "words", "-p", "import", code=code)

    assert (outcome.exit_code, outcome.stdout) == (130, "")
    assert outcome.stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in outcome.stderr


def test_the_earliest_interrupt_is_one_too(process, stop_signal):
    code = f"""
import os
def interrupted(install):
    return lambda: (install(), os.kill(os.getpid(), {stop_signal:d}))
patch("interrupts:install", interrupted)
"""

    outcome = process.run("verify", code=code)

    assert outcome == type(outcome)(130, "", "interrupted\n")


def test_an_interrupt_that_hits_a_callback_is_not_lost(process, home, stop_signal):
    code = (
        "import gc, os, time\n"
        "def collected(phase, info):\n"
        "    gc.callbacks.clear()\n"
        f"    os.kill(os.getpid(), {stop_signal:d})\n"
        "def slow(*arguments, **options):\n"
        "    gc.callbacks[:] = [collected]\n"
        "    gc.collect()\n"
        "    time.sleep(30)\n"
        "patch('inspect:inspect', lambda _: slow)"
    )
    began = time.monotonic()

    outcome = process.run("inspect", home / "releases" / "two-layers", code=code)

    assert outcome == type(outcome)(130, "", "interrupted\n")
    assert time.monotonic() - began < 15


def test_an_interrupt_ends_a_call_that_is_deaf_to_it(process, home):
    code = (
        "import os, signal, threading, time\n"
        "def deaf(*arguments, **options):\n"
        "    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\n"
        "    time.sleep(30)\n"
        "patch('inspect:inspect', lambda _: deaf)"
    )
    began = time.monotonic()

    outcome = process.run("inspect", home / "releases" / "two-layers", code=code)

    assert outcome.exit_code == 130
    assert outcome.stderr.splitlines()[-1] == "interrupted"
    assert time.monotonic() - began < 20


def _deferring(*, block):
    """Code of a command that defers Ctrl-C in a block, and then continues for a while."""
    return (
        "import os, signal, threading, time\n"
        "from grokctl import interrupts\n"
        "patch('interrupts:_PATIENCE_S', lambda _: 0.3)\n"
        "def press(number=signal.SIGINT):\n"
        "    os.kill(os.getpid(), number)\n"
        "def inspected(*arguments, **options):\n"
        "    with interrupts.deferred() as stop:\n"
        f"        {block}\n"
        "    time.sleep(1)\n"
        "    print(f'went on after {stop.is_made}', flush=True)\n"
        "    press()\n"
        "    time.sleep(30)\n"
        "patch('inspect:inspect', lambda _: inspected)"
    )


@pytest.mark.parametrize(
    ("block", "asked"),
    [
        pytest.param("pass", False, id="not at all"),
        pytest.param("press(); time.sleep(1)", True, id="once, and not looked at for long"),
        pytest.param(
            "threading.Timer(0.02, lambda: (press(), press())).start(); "
            "signal.pthread_sigmask(signal.SIG_BLOCK, {2}); time.sleep(0.1); "
            "signal.pthread_sigmask(signal.SIG_UNBLOCK, {2})",
            True,
            id="twice at a time",
        ),
    ],
)
def test_a_deferred_ctrl_c_is_forgotten_and_the_next_one_is_not(process, home, block, asked):
    outcome = process.run("inspect", home / "releases" / "two-layers", code=_deferring(block=block))

    assert outcome == type(outcome)(130, f"went on after {asked}\n", "interrupted\n")


@pytest.mark.parametrize(
    "block",
    [
        pytest.param("press(); press()", id="a second one"),
        pytest.param("press(signal.SIGTERM)", id="SIGTERM"),
        pytest.param("press(); press(signal.SIGTERM)", id="SIGTERM after one"),
        pytest.param(
            "signal.pthread_sigmask(signal.SIG_BLOCK, {2}); press(); time.sleep(0.1); press(); "
            "time.sleep(30)",
            id="two that it is deaf to",
        ),
    ],
)
def test_what_is_meant_ends_a_deferring_block(process, home, block):
    outcome = process.run("inspect", home / "releases" / "two-layers", code=_deferring(block=block))

    assert outcome == type(outcome)(130, "", "interrupted\n")


def test_a_stopped_demo_leaves_nothing_behind(interrupt, process, tmp_path):
    ended = interrupt(
        *("demo", "--json"),
        env=process.environment(TMPDIR=str(tmp_path)),
        until=event("reshard"),
        by=signal.SIGTERM,
    )

    assert ended[0] == 130
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_seeding_well(process, seeded, tmp_path, loopback):
    with process.start(
        *("fetch", seeded.magnet, "--to", tmp_path / "words", "--peer", seeded.peer),
        *(*loopback, "--seed", "--json"),
    ) as running:
        event('"stage": "seed"', "advanced")(running)
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=30)

    assert running.returncode == 0, stderr
    assert '"downloaded_bytes"' in stdout
