"""Every exit code in a real command, with one sentence on stderr."""

import re
import shutil
import subprocess
import time

import pytest
from places import PROJECT

from grokctl.errors import ExitCode
from grokctl.text import format_bytes

DOCUMENT = PROJECT / "docs" / "exit-codes.md"


@pytest.fixture
def release(home):
    return home / "releases" / "two-layers"


def assert_failed(outcome, code, *words, hint=None):
    """Expect a code, one sentence with these words, this hint, and an empty stdout."""
    assert outcome.exit_code == code, outcome
    assert outcome.stdout == ""
    for word in words:
        assert word in outcome.error
    assert not outcome.error.endswith(".")
    if hint is not None:
        assert outcome.hint is not None
        assert hint in outcome.hint


# --- 2: invalid requests


@pytest.mark.parametrize("verb", ["verify", "inspect", "reshard", "run", "score"])
def test_an_unknown_checkpoint_is_named(grokctl, home, verb):
    more = {"run": ["--token-ids", "1"], "score": ["--token-ids", "1"]}.get(verb, [])

    outcome = grokctl(verb, "nowhere", *more, "--home", home)

    assert_failed(outcome, 2, "nowhere", hint=str(home))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("", id="empty"),
        pytest.param(".", id="here"),
        pytest.param("/", id="root"),
        pytest.param("/dev/null", id="device"),
        pytest.param("x" * 300, id="longer than a name"),
        pytest.param("x/" * 3000, id="longer than a path"),
        pytest.param("[bold]x[/bold]", id="markup"),
        pytest.param("ключ к 🗝", id="unicode"),
    ],
)
def test_strange_names_are_no_checkpoints(grokctl, home, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)

    outcome = grokctl("inspect", "--home", home, "--", name)

    assert_failed(outcome, 2, name[:50])


def test_nothing_at_home_says_how_to_begin(grokctl, tmp_path):
    release = grokctl("verify", "--home", tmp_path)
    reshard = grokctl("reshard", "--devices", 8, "--home", tmp_path / "nothing")

    assert_failed(release, 2, str(tmp_path), hint="grokctl fetch")
    assert_failed(reshard, 2, str(tmp_path), hint="grokctl fetch")


def test_the_only_candidate_is_taken(grokctl, tmp_path, release):
    shutil.copytree(release, tmp_path / "releases" / "the only one")

    outcome = grokctl("inspect", "--home", tmp_path, "--json")

    assert outcome.result["checkpoint"].endswith("the only one")


def test_home_comes_from_the_environment_too(grokctl, tmp_path, release, monkeypatch):
    shutil.copytree(release, tmp_path / "releases" / "the only one")
    monkeypatch.setenv("GROKCTL_HOME", str(tmp_path))

    outcome = grokctl("inspect", "--json")

    assert outcome.result["checkpoint"].endswith("the only one")


@pytest.mark.parametrize("verb", ["verify", "inspect", "run", "reshard"])
def test_several_candidates_are_listed(grokctl, tmp_path, release, verb):
    more = {"run": ["--token-ids", "1"], "reshard": ["--devices", "1"]}.get(verb, [])
    for name in ("this one", "that one"):
        shutil.copytree(release, tmp_path / "releases" / name)

    outcome = grokctl(verb, *more, "--home", tmp_path)

    assert_failed(outcome, 2, "this one", "that one", hint="that one")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param([], ["prompt"], id="no prompt"),
        pytest.param(["-p", "a", "--token-ids", "1"], ["only one"], id="two prompts"),
        pytest.param(["-p", "a", "--prompt-file", "x"], ["only one"], id="text and file"),
        pytest.param(["-p", "hello"], ["tokenizer.model"], id="no tokenizer"),
        pytest.param(["--token-ids", "1", "--stop", "x"], ["stop"], id="stop without text"),
        pytest.param(["--token-ids", "1,x"], ["1,x"], id="no numbers"),
        pytest.param(["--token-ids", "1,,2"], ["1,,2"], id="a number missing"),
        pytest.param(["--token-ids=-1"], ["-1"], id="negative"),
        pytest.param(["--token-ids", "\u0661"], ["\u0661"], id="digits of another script"),
        pytest.param(["--token-ids", "9" * 30], ["9" * 30], id="huge id"),
        pytest.param(["--token-ids", "256"], ["256", "vocabulary"], id="outside the vocabulary"),
        pytest.param(["--token-ids", ""], ["empty"], id="empty"),
        pytest.param(["--token-ids", ",".join("1" * 65)], ["65", "64"], id="too long"),
        pytest.param(["--token-ids", "1,2,3", "--context", "2"], ["3", "2"], id="short context"),
        pytest.param(["--token-ids", "1", "--context", "65"], ["65", "64"], id="long context"),
        pytest.param(["--token-ids", "1", "--context", "0"], ["0", "64"], id="no context"),
        pytest.param(["--token-ids", "1", "--temperature", "-1"], ["-1"], id="cold"),
        pytest.param(["--token-ids", "1", "--temperature", "nan"], ["nan"], id="no temperature"),
        pytest.param(["--token-ids", "1", "--top-p", "0"], ["top-p"], id="no nucleus"),
        pytest.param(["--token-ids", "1", "--top-p", "1.1"], ["top-p"], id="large nucleus"),
        pytest.param(["--token-ids", "1", "--top-k", "-1"], ["top-k"], id="top-k"),
        pytest.param(["--token-ids", "1", "--min-p", "2"], ["min-p"], id="min-p"),
        pytest.param(
            ["--token-ids", "1", "--presence-penalty", "3"], ["--presence-penalty 3"], id="penalty"
        ),
        pytest.param(["--token-ids", "1", "--logit-bias", "5"], ["'5'", "ID=BIAS"], id="no bias"),
        pytest.param(
            ["--token-ids", "1", "--logit-bias", "999=1"], ["999", "255"], id="bias of no token"
        ),
        pytest.param(
            ["--token-ids", "1", "--stop-token-ids", "256"], ["256", "255"], id="no stop token"
        ),
        pytest.param(["--token-ids", "1", "--seed", "-1"], ["seed"], id="negative seed"),
        pytest.param(["--token-ids", "1", "--seed", str(2**64)], ["seed"], id="huge seed"),
        pytest.param(["--token-ids", "1", "--compute", "int4"], ["int4"], id="compute"),
        pytest.param(["--token-ids", "1", "--mesh", "model"], ["'model'"], id="mesh"),
        pytest.param(["--token-ids", "1", "--mesh", "model=8,model=8"], ["mesh"], id="mesh twice"),
        pytest.param(["--token-ids", "1", "--mesh", f"model={'9' * 5000}"], ["mesh"], id="9999"),
        pytest.param(
            ["--token-ids", "1", "--mesh", "model=8", "--devices", "4"], ["8", "4"], id="devices"
        ),
        pytest.param(["--prompt-file", "/nowhere/at all"], ["/nowhere/at all"], id="no file"),
        pytest.param(["--prompt-file", "/"], ["directory"], id="folder as file"),
    ],
)
def test_what_a_run_cannot_mean_is_said_before_weights_are_loaded(
    grokctl, home, release, arguments, words
):
    outcome = grokctl("run", release, *arguments, "--home", home)

    assert_failed(outcome, 2, *words)
    assert "load:" not in outcome.stderr


@pytest.mark.parametrize("verb", ["run", "score"])
def test_text_that_is_no_utf8_is_refused_from_a_file_and_from_stdin(grokctl, home, tmp_path, verb):
    file = tmp_path / "latin.txt"
    file.write_bytes("é".encode("latin-1"))
    option = {"run": "--prompt-file", "score": "--text"}[verb]
    stdin = {"run": "-p", "score": "--text"}[verb]

    from_file = grokctl(verb, "words", option, file, "--home", home)
    from_stdin = grokctl(verb, "words", stdin, "-", "--home", home, stdin=file.read_bytes())

    assert_failed(from_file, 2, "latin.txt", "UTF-8")
    assert_failed(from_stdin, 2, "stdin", "UTF-8")


def test_an_empty_prompt_is_nothing_to_continue(grokctl, home, tmp_path):
    (tmp_path / "empty").touch()

    typed = grokctl("run", "words", "-p", "", "--home", home)
    read = grokctl("run", "words", "--prompt-file", tmp_path / "empty", "--home", home)
    piped = grokctl("run", "words", "-p", "-", "--home", home, stdin="")

    assert_failed(typed, 2, "empty")
    assert_failed(read, 2, "empty")
    assert_failed(piped, 2, "empty")


def test_a_prompt_longer_than_the_context_says_both_numbers(grokctl, home):
    outcome = grokctl("run", "words", "-p", "import " * 100, "--home", home)

    assert_failed(outcome, 2, "64")
    assert re.search(r"\b\d{3} tokens", outcome.error)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param([], ["--text", "--token-ids"], id="nothing"),
        pytest.param(["--text", "a", "--token-ids", "1"], ["--text"], id="both"),
        pytest.param(["--text", "/nowhere/at all"], ["/nowhere/at all"], id="no file"),
        pytest.param(["--token-ids", "300"], ["300"], id="outside the vocabulary"),
        pytest.param(["--token-ids", ""], ["empty"], id="empty"),
        pytest.param(["--token-ids", "1", "--logits", "/nowhere/x.npy"], ["/nowhere"], id="out"),
        pytest.param(["--token-ids", "1", "--logits", "/"], ["/"], id="folder"),
    ],
)
def test_what_a_score_cannot_mean_is_said_before_weights_are_loaded(
    grokctl, home, release, arguments, words
):
    outcome = grokctl("score", release, *arguments, "--home", home)

    assert_failed(outcome, 2, *words)
    assert "load:" not in outcome.stderr


@pytest.mark.parametrize("size", ["0", "-1", "lots", "1e400", "12 parsecs", "nan", "", "9" * 40])
def test_sizes_that_are_none_are_refused(grokctl, release, loopback, size):
    memory = grokctl("reshard", release, "--devices", 1, f"--max-memory={size}", "--dry-run")
    rate = grokctl("fetch", *loopback, f"--max-download={size}")

    assert_failed(memory, 2, repr(size)[:20])
    assert_failed(rate, 2, repr(size)[:20])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["nowhere.torrent"], ["nowhere.torrent"], id="source"),
        pytest.param(["--peer", "nobody"], ["nobody"], id="peer"),
        pytest.param(["--peer", "127.0.0.1:99999"], ["99999"], id="peer's port"),
        pytest.param(["--port", "70000"], ["70000"], id="port"),
        pytest.param(["--bind", "eth0"], ["eth0"], id="bind"),
        pytest.param(["--proxy", "nonsense"], ["nonsense"], id="proxy"),
        pytest.param(["--tracker", "file:///x"], ["file:///x"], id="tracker"),
        pytest.param(["--web-seed", "ftp://x"], ["ftp://x"], id="web seed"),
        pytest.param(["--stall-timeout", "0"], ["0"], id="stall"),
        pytest.param(["--stall-timeout", "nan"], ["nan"], id="never"),
        pytest.param(["--connections", "0"], ["0"], id="connections"),
        pytest.param(["--seed-ratio", "-1"], ["-1"], id="ratio"),
        pytest.param(["--only", ""], ["empty"], id="only"),
    ],
)
def test_what_a_fetch_cannot_mean_is_said_before_anybody_is_asked(
    grokctl, tmp_path, loopback, arguments, words
):
    outcome = grokctl("fetch", *loopback, *arguments, "--home", tmp_path)

    assert_failed(outcome, 2, *words)
    assert list(tmp_path.iterdir()) == []


def test_reshard_asks_for_devices(grokctl, release):
    assert_failed(grokctl("reshard", release), 2, "devices", hint="--devices 8")


def test_a_finished_reshard_is_never_overwritten(grokctl, home, cut):
    made = cut("two-layers", 4)
    before = {path: path.stat().st_mtime_ns for path in made.root.iterdir()}

    outcome = grokctl("reshard", "two-layers", "--devices", 4, "--home", home)

    assert_failed(outcome, 2, str(made.root), hint="--force")
    assert {path: path.stat().st_mtime_ns for path in made.root.iterdir()} == before


def test_reshard_refuses_the_files_of_one_host_as_its_source(grokctl, release, tmp_path):
    some = tmp_path / "some"
    written = grokctl("reshard", release, "--devices", 4, "--only-devices", "0,2-3", "--out", some)

    outcome = grokctl("reshard", some, "--devices", 8, "--out", tmp_path / "out")

    assert written.exit_code == 0
    assert "3 of 4" in written.stdout
    assert_failed(outcome, 2, "0, 2, 3 of 4", hint="grokctl reshard two-layers")


def test_a_dry_reshard_says_that_its_name_is_taken(grokctl, release, tmp_path):
    (tmp_path / "thesis").touch()

    for place in (tmp_path, tmp_path / "thesis", release):
        outcome = grokctl("reshard", release, "--devices", 2, "--out", place, "--dry-run", "--json")

        assert outcome.exit_code == 2
        assert "not a ready checkpoint" in outcome.error
        assert outcome.result["bytes"] > 0


@pytest.mark.parametrize(
    "mesh",
    [["--devices", 0], ["--devices=-1"], ["--mesh", "model=0"], ["--mesh", "expert=0,model=8"]],
)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_mesh_without_devices_is_refused(grokctl, release, tmp_path, mesh, precision):
    outcome = grokctl(
        *("reshard", release, *mesh, "--precision", precision, "--out", tmp_path / "out")
    )

    assert_failed(outcome, 30, "possible are 1, 2, 4, 8, 16", hint="--devices 1")


@pytest.mark.parametrize("devices", ["0-8", "8", "", "x", "3-1", "-1"])
def test_only_devices_that_the_mesh_has_can_be_meant(grokctl, release, tmp_path, devices):
    outcome = grokctl(
        *("reshard", release, "--devices", 8, f"--only-devices={devices}"),
        *("--out", tmp_path / "out"),
    )

    assert_failed(outcome, 2, "devices", hint="--only-devices 0-7")


def test_integers_do_not_come_back_from_what_was_rounded(grokctl, release, tmp_path):
    rounded = tmp_path / "bf16"
    options = ("--devices", 4, "--precision", "bf16")
    assert grokctl("reshard", release, *options, "--out", rounded).exit_code == 0

    outcome = grokctl("reshard", rounded, "--precision", "int8", "--out", tmp_path / "out")

    assert_failed(outcome, 30, "int8", "bf16", hint="grokctl reshard")


@pytest.mark.parametrize(
    ("options", "code", "hint"),
    [
        pytest.param(["--compress", "gzip"], 2, "--compress zstd", id="compression"),
        pytest.param(["--compress", "zstd:99"], 2, "--compress zstd", id="level"),
        pytest.param(["--group-size", 32], 2, "--precision int4", id="group of int8"),
        pytest.param(
            ["--precision", "int4", "--group-size", 24], 30, "--group-size", id="group size"
        ),
    ],
)
def test_impossible_ways_to_store_weights_are_refused(
    grokctl, release, tmp_path, options, code, hint
):
    outcome = grokctl("reshard", release, "--devices", 2, *options, "--out", tmp_path / "out")

    assert_failed(outcome, code, hint=hint)
    assert list(tmp_path.iterdir()) == []


def test_a_mesh_that_leaves_int4_an_odd_number_of_inputs_is_refused(grokctl, release, tmp_path):
    outcome = grokctl(
        *("reshard", release, "--devices", 8, "--precision", "int4", "--out", tmp_path / "out")
    )

    assert_failed(outcome, 30, "moe.down", "43", hint="--precision int8")


def test_a_mesh_that_would_cut_int4_groups_names_the_one_that_does_not(grokctl, release, tmp_path):
    ready = tmp_path / "ready"
    options = ("--devices", 4, "--precision", "int4", "--out", ready)
    assert grokctl("reshard", release, *options).exit_code == 0

    outcome = grokctl("score", ready, "--devices", 8, "--token-ids", "1,2")

    assert_failed(outcome, 30, "moe.down", hint="--mesh model=4")


def test_nothing_is_cut_into_itself(grokctl, release, tmp_path):
    out = tmp_path / "ready"
    assert grokctl("reshard", release, "--devices", 2, "--out", out).exit_code == 0

    outcome = grokctl("reshard", out, "--devices", 4, "--out", out, "--force")

    assert_failed(outcome, 2, "source of this reshard", hint="--out")
    assert grokctl("verify", out).exit_code == 0


def test_verify_without_a_torrent_proves_nothing_and_says_what_would(grokctl, release):
    outcome = grokctl("verify", release)

    assert_failed(outcome, 2, "release.torrent", "structure is sound", hint="--quick")


def test_repair_of_a_ready_checkpoint_or_without_a_torrent_is_refused(grokctl, two_layers, ready):
    (two_layers / "ckpt-0" / "tensor00003_000").unlink()
    file = ready / "device-02-of-04.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")

    release = grokctl("verify", two_layers, "--repair")
    cut = grokctl("verify", ready, "--repair")

    assert_failed(release, 2, "release.torrent")
    assert cut.exit_code == 2
    assert "fetch" not in (cut.hint or "")


def test_demo_refuses_a_folder_that_exists(grokctl, tmp_path):
    assert_failed(grokctl("demo", "--keep", tmp_path), 2, str(tmp_path))


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["frobnicate"], id="verb"),
        pytest.param(["verify", "--colour"], id="option"),
        pytest.param(["reshard", "x", "--devices", "8", "--jobs", "0"], id="range"),
        pytest.param(["reshard", "x", "--devices", "8", "--precision", "int3"], id="choice"),
        pytest.param(["run", "x", "-n", "-1"], id="negative"),
        pytest.param(["run", "x", "-n", "many"], id="number"),
    ],
)
def test_words_that_cannot_be_parsed_are_usage_errors_in_one_voice(grokctl, arguments):
    outcome = grokctl(*arguments)

    assert outcome.exit_code == 2
    assert "Traceback" not in outcome.stderr
    assert "Value error" not in outcome.stderr
    assert outcome.error


@pytest.mark.parametrize(
    "out",
    [
        pytest.param("{file}", id="a file"),
        pytest.param("{file}/below", id="below a file"),
        pytest.param("/proc/here", id="no place for folders"),
        pytest.param("{folder}/" + "x" * 255, id="long name"),
        pytest.param("{folder}", id="a folder of something else"),
    ],
)
@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_a_place_that_cannot_be_written_is_a_usage_error(grokctl, release, tmp_path, out, force):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("precious")
    folder.mkdir()
    (folder / "precious").touch()
    place = out.format(file=file, folder=folder)

    outcome = grokctl("reshard", release, "--devices", 1, "--out", place, *force)

    assert_failed(outcome, 2, place.split("/")[1])
    assert file.read_text() == "precious"
    assert [path.name for path in folder.iterdir()] == ["precious"]


def test_a_read_only_disk_is_a_usage_error(grokctl, release, read_only_disk, loopback, seeded):
    resharded = grokctl("reshard", release, "--devices", 1, "--out", read_only_disk / "ready")
    fetched = grokctl("fetch", seeded.torrent, "--to", read_only_disk / "words", *loopback)

    assert_failed(resharded, 2, "Read-only")
    assert_failed(fetched, 10, "Read-only")


def test_a_release_on_a_read_only_disk_can_be_used(grokctl, download, tmp_path, read_only_disk):
    subprocess.run(["mount", "-o", "remount,rw,size=20m", str(read_only_disk)], check=True)
    root = shutil.copytree(download.root, read_only_disk / "words")
    subprocess.run(["mount", "-o", "remount,ro", str(read_only_disk)], check=True)

    verified = grokctl("verify", root, "--json")
    resharded = grokctl("reshard", root, "--devices", 1, "--out", tmp_path / "ready", "--json")

    assert verified.exit_code == 0
    assert verified.result["ok"] is True
    assert resharded.exit_code == 0


# --- 10 and 11: the swarm


def test_a_folder_of_something_else_is_not_filled(grokctl, tmp_path, seeded, loopback):
    (tmp_path / "precious").touch()

    outcome = grokctl("fetch", seeded.torrent, "--to", tmp_path, *loopback)

    assert_failed(outcome, 10, str(tmp_path), hint="--to")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("magnet:?xt=urn:btih:tooshort", id="no infohash"),
        pytest.param("magnet:", id="empty magnet"),
        pytest.param("{junk}", id="no torrent"),
    ],
)
def test_a_malformed_source_fails_the_fetch(grokctl, tmp_path, loopback, source):
    junk = tmp_path / "junk.torrent"
    junk.write_bytes(b"d4:infoi1ee")

    outcome = grokctl("fetch", source.format(junk=junk), "--to", tmp_path / "x", *loopback)

    assert_failed(outcome, 10)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("source", ["magnet", "torrent"])
def test_a_swarm_of_nobody_stalls(grokctl, tmp_path, loopback, seeded, source):
    began = time.monotonic()

    outcome = grokctl(
        *("fetch", getattr(seeded, source), "--to", tmp_path / "words"),
        *(*loopback, "--stall-timeout", 1),
    )

    assert_failed(outcome, 11, "words", "1 s", hint="grokctl fetch")
    assert time.monotonic() - began < 20


# --- 12: the disk


def test_a_reshard_that_does_not_fit_stops_before_a_byte_moves(grokctl, release, small_disk):
    outcome = grokctl("reshard", release, "--devices", 1, "--out", small_disk / "ready")

    assert_failed(outcome, 12, str(small_disk), hint="--out")
    assert not (small_disk / "ready").exists()
    assert [path.name for path in small_disk.rglob("*") if path.is_file()] == []


def test_a_dry_reshard_that_would_not_fit_says_so_with_its_plan(grokctl, release, small_disk):
    outcome = grokctl(
        *("reshard", release, "--devices", 1, "--out", small_disk / "ready"),
        *("--dry-run", "--json"),
    )

    assert outcome.exit_code == 12
    assert str(small_disk) in outcome.error
    assert outcome.result["fits"] is False
    assert outcome.result["bytes"] > outcome.result["free_bytes"]
    assert outcome.result["disk_bytes_per_s"] > 0
    assert list(small_disk.iterdir()) == []


def test_a_fetch_that_does_not_fit_stops_before_a_byte_moves(grokctl, seeded, small_disk, loopback):
    outcome = grokctl(
        *("fetch", seeded.magnet, "--to", small_disk / "words", "--peer", seeded.peer, *loopback)
    )
    plan = grokctl("fetch", seeded.torrent, "--to", small_disk / "words", "--dry-run", "--json")

    assert_failed(outcome, 12, format_bytes(seeded.nbytes))
    assert not (small_disk / "words" / "ckpt-0").exists()
    assert plan.result["fits"] is False


def test_logits_that_do_not_fit_are_one_sentence_and_leave_nothing(
    process, home, release, small_disk
):
    (small_disk / "ballast").write_bytes(bytes(480_000))

    outcome = process.run(
        *("score", release, "--token-ids", ",".join(["1"] * 64)),
        *("--logits", small_disk / "logits.npy", "--home", home),
    )

    assert_failed(outcome, 12)
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


# --- 30: the mesh


@pytest.mark.parametrize("verb", ["reshard", "run", "score"])
def test_a_mesh_that_cannot_be_names_the_one_that_can(grokctl, home, release, verb):
    more = [] if verb == "reshard" else ["--token-ids", "1"]

    sixteen = grokctl(verb, release, "--mesh", "model=16", *more, "--home", home)
    three = grokctl(verb, release, "--devices", 3, *more, "--home", home)

    assert_failed(sixteen, 30, "model=16", hint="expert=2,model=8")
    assert_failed(three, 30, "3", hint="--devices 4")


@pytest.mark.parametrize("devices", [0, -4, 32, 10**30])
def test_impossible_numbers_of_devices_are_no_mesh(grokctl, home, release, devices):
    outcome = grokctl("run", release, "--token-ids", 1, f"--devices={devices}", "--home", home)

    assert outcome.exit_code in {2, 30}
    assert str(devices) in outcome.error
    assert "makes it fast" not in outcome.stderr


# --- 40: the machine


def test_fewer_devices_than_the_mesh_is_the_hardwares_fault(process, release):
    environment = process.environment(JAX_NUM_CPU_DEVICES="2")
    arguments = ("run", release, "--token-ids", 1, "--devices", 4, "-n", 1)

    outcome = process.run(*arguments, code="import jax; jax.devices()", env=environment)

    assert_failed(outcome, 40, "2", "4", hint="unset JAX_NUM_CPU_DEVICES")


def test_a_model_that_memory_cannot_hold_is_the_hardwares_fault(grokctl, two_layers, monkeypatch):
    from types import SimpleNamespace  # noqa: PLC0415

    import psutil  # noqa: PLC0415

    little = SimpleNamespace(total=2**34, available=2**19)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)

    outcome = grokctl("run", two_layers, "--token-ids", 1, "--home", two_layers.parent)

    assert_failed(outcome, 40, "memory")


# --- the table


@pytest.mark.skipif(not DOCUMENT.exists(), reason="docs/exit-codes.md is not written yet")
def test_the_documented_exit_codes_are_the_enums():
    rows = re.findall(
        r"^\| *`?(\d+)`? *\| *([^|]+?) *\|", DOCUMENT.read_text("utf-8"), re.MULTILINE
    )

    assert {int(code) for code, _ in rows} == set(map(int, ExitCode))
    assert len(rows) == len(ExitCode)
