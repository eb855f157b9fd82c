"""The choice that `run`, `score` and `bench` make among real checkpoints, and its note."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.model.config import GrokConfig

PROMPT = ("-p", "import", "-n", 1, "--temperature", 0, "--ignore-eos")
WORDS = replace(MINIATURE, sequence_len=4096, num_layers=2, vocab_size=512, emb_size=64, key_size=8)
MORE = {
    "1": (),
    "4": (),
    "8": (),
    "int4-4": ("--precision", "int4"),
    "bf16-4": ("--precision", "bf16"),
}
"""Suffixes of `words-`, and the options of their reshards."""


def write_release(home: Path, name: str, config: GrokConfig = WORDS) -> Path:
    write_miniature(home / "releases" / name, config)
    return home / "releases" / name


@pytest.fixture(scope="module")
def several(grokctl, tmp_path_factory):
    """A home with one model, resharded in several ways; read-only."""
    home = tmp_path_factory.mktemp("several")
    write_release(home, "words")
    for name, options in MORE.items():
        devices = name.rpartition("-")[2]
        cut = ("reshard", "words", "--devices", devices, *options, "--home", home, "-q")
        assert grokctl(*cut).exit_code == 0
    return home


@pytest.fixture
def own(several, tmp_path):
    """The same, to damage."""
    return shutil.copytree(several, tmp_path / "own")


def line_of(outcome) -> str:
    """The note about the choice."""
    found = [line for line in outcome.stderr.splitlines() if " on the CPU" in line]
    assert len(found) == 1, outcome.stderr
    return found[0]


def names(outcome) -> str:
    return line_of(outcome).split()[0]


# --- which


def test_without_a_name_the_fastest_is_run_and_one_line_says_so(grokctl, several):
    outcome = grokctl("run", *PROMPT, "--home", several)

    assert outcome.exit_code == 0
    assert line_of(outcome).startswith("words-int8-1 on the CPU, ")
    assert "context 4,096: " in line_of(outcome)
    assert line_of(outcome).partition("; ")[0].endswith("the fastest of 5 checkpoints, int4 aside")


def test_what_is_chosen_says_the_same_as_when_it_is_named(grokctl, several):
    options = ("--home", several, "--json", "--compute", "float32")

    chosen = grokctl("run", *PROMPT, *options)
    named = grokctl("run", "words-int8-1", *PROMPT, *options, "--devices", 1)
    other = grokctl("run", "words-int8-4", *PROMPT, *options)

    assert chosen.exit_code == named.exit_code == other.exit_code == 0
    assert chosen.result["tokens"] == named.result["tokens"] == other.result["tokens"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        pytest.param(["--devices", 4], "words-int8-4", id="devices"),
        pytest.param(["--devices", 8], "words-int8-8", id="more devices"),
        pytest.param(["--mesh", "model=1"], "words-int8-1", id="mesh"),
    ],
)
def test_of_several_the_one_that_was_cut_for_the_mesh_is_run(grokctl, several, options, name):
    outcome = grokctl("score", "--token-ids", "1,2", *options, "--home", several)

    assert outcome.exit_code == 0
    assert names(outcome) == name
    assert "slower to load" not in outcome.stderr


def test_a_mesh_that_none_was_cut_for_is_cut_again_and_said_to(grokctl, several):
    outcome = grokctl("score", "--token-ids", "1,2", "--devices", 2, "--home", several)

    assert outcome.exit_code == 0
    assert names(outcome).startswith("words-int8-")
    assert "runs on model=2: slower to load" in outcome.stderr


def test_bench_chooses_as_run_does(grokctl, several):
    sizes = ("--prompt-tokens", 4, "-n", 2, "--batch", 2)

    outcome = grokctl("bench", *sizes, "--devices", 4, "--home", several, "--json")

    notes = [event["message"] for event in outcome.events if event["event"] == "noted"]
    assert outcome.exit_code == 0
    assert outcome.result["devices"] == 4
    assert sum(note.startswith("words-int8-4 on the CPU as 4 devices") for note in notes) == 1
    assert any("2 sequences" in note for note in notes)


def test_a_release_is_chosen_for_only_where_nothing_was_resharded(grokctl, own):
    shutil.rmtree(own / "ready")

    outcome = grokctl("run", *PROMPT, "--home", own)

    assert outcome.exit_code == 0
    assert names(outcome) == "words"
    assert "reshards the release in memory" in outcome.stderr


@pytest.mark.parametrize("verb", ["run", "score", "bench"])
def test_checkpoints_of_several_models_are_listed(grokctl, own, verb):
    write_release(own, "others", replace(WORDS, num_layers=1))
    cut = ("reshard", "others", "--devices", 1, "--home", own, "-q")
    assert grokctl(*cut).exit_code == 0
    more = [] if verb == "bench" else ["--token-ids", "1"]

    outcome = grokctl(verb, *more, "--home", own)

    assert outcome.exit_code == 2
    assert "several checkpoints" in outcome.error
    assert "others-int8-1" in outcome.error
    assert "words-int8-1" in outcome.error


# --- what is said


def test_a_named_checkpoint_on_a_mesh_that_was_asked_for_needs_no_line(grokctl, several):
    outcome = grokctl("run", "words-int8-1", "--devices", 1, *PROMPT, "--home", several)

    assert outcome.exit_code == 0
    assert " on the CPU" not in outcome.stderr


def test_a_named_checkpoint_is_said_with_the_mesh_that_was_chosen(grokctl, several):
    outcome = grokctl("run", "words-int8-4", *PROMPT, "--home", several)

    assert outcome.exit_code == 0
    assert line_of(outcome).startswith("words-int8-4 on the CPU as 4 devices (model=4), ")
    assert "checkpoints" not in line_of(outcome)


def test_programs_are_told_as_an_event_and_the_quiet_nothing(grokctl, several):
    told = grokctl("run", *PROMPT, "--home", several, "--json")
    quiet = grokctl("run", *PROMPT, "--home", several, "-q")

    notes = [event["message"] for event in told.events if event["event"] == "noted"]
    assert told.result["finish_reason"] == "length"
    assert sum(note.startswith("words-int8-1 on the CPU") for note in notes) == 1
    assert quiet.exit_code == 0
    assert quiet.stderr == ""


def test_compute_is_what_was_asked_for_and_else_what_suits_the_hardware(grokctl, several):
    chosen = grokctl("run", *PROMPT, "--home", several)
    asked = grokctl("run", *PROMPT, "--home", several, "--compute", "float32")
    wrong = grokctl("run", *PROMPT, "--home", several, "--compute", "float16")

    has_matrix_unit = "amx_bf16" in Path("/proc/cpuinfo").read_text()
    assert (", bfloat16, " in line_of(chosen)) == has_matrix_unit
    assert ", float32, " in line_of(asked)
    assert wrong.exit_code == 2
    assert "float16" in wrong.error


# --- what is damaged


def test_a_damaged_checkpoint_does_not_stop_another_one(grokctl, own):
    (own / "ready" / "words-int8-8" / "grokctl.json").write_text('{"format": 1}')

    outcome = grokctl("run", *PROMPT, "--home", own)

    assert outcome.exit_code == 0
    assert names(outcome) == "words-int8-1"
    assert "words-int8-8: skipped, because it is damaged" in outcome.stderr
    assert line_of(outcome).partition("; ")[0].endswith("of 4 checkpoints, int4 aside")


def test_a_chosen_checkpoint_that_lacks_a_file_is_left_for_the_next_best(grokctl, own):
    next((own / "ready" / "words-int8-1").glob("*.safetensors")).unlink()

    outcome = grokctl("run", *PROMPT, "--home", own)

    assert outcome.exit_code == 0
    assert names(outcome) == "words-int8-4"
    assert "words-int8-1: skipped, because it is damaged" in outcome.stderr


def test_a_manifest_that_contradicts_itself_is_found_when_it_is_chosen(grokctl, own):
    path = own / "ready" / "words-int8-1" / "grokctl.json"
    values = json.loads(path.read_text())
    key = next(name for name in values["tensors"] if name.endswith("moe.down.weight"))
    values["tensors"][key]["slices"][0][0] = [0, 1]
    path.write_text(json.dumps(values))

    outcome = grokctl("run", *PROMPT, "--home", own)

    assert outcome.exit_code == 0
    assert names(outcome) != "words-int8-1"
    assert "words-int8-1: skipped, because it is damaged" in outcome.stderr


def test_where_all_are_damaged_the_damage_is_said(grokctl, own):
    for path in (own / "ready").iterdir():
        next(path.glob("*.safetensors")).unlink()

    outcome = grokctl("run", *PROMPT, "--home", own)

    assert outcome.exit_code == 20
    assert "safetensors" in outcome.error
    assert outcome.hint.startswith("grokctl reshard")


def test_a_part_for_one_host_is_left_out(grokctl, own):
    shutil.rmtree(own / "ready")
    for options in (("--devices", 1), ("--devices", 4, "--only-devices", "0-1")):
        cut = ("reshard", "words", *options, "--home", own, "-q")
        assert grokctl(*cut).exit_code == 0

    outcome = grokctl("run", *PROMPT, "--devices", 4, "--home", own)

    assert outcome.exit_code == 0
    assert names(outcome) == "words-int8-1"
    assert "skipped, because it holds the files of one host only" in outcome.stderr


# --- JAX


def test_a_checkpoint_for_many_devices_runs_without_being_told_how_many(process, several):
    environment = process.environment()
    del environment["JAX_NUM_CPU_DEVICES"]

    outcome = process.run(*("run", "words-int8-8", *PROMPT, "--home", several), env=environment)

    assert outcome.exit_code == 0
    assert names(outcome) == "words-int8-8"
    assert "8 virtual CPU devices" in outcome.stderr


@pytest.mark.parametrize("platform", ["cuda", "rocket"])
def test_where_jax_does_not_start_that_is_said(process, several, platform):
    environment = process.environment(JAX_PLATFORMS=platform)

    outcome = process.run(*("run", *PROMPT, "--home", several), env=environment)

    assert outcome.exit_code == 40
    assert "JAX does not start: " in outcome.error
    assert platform in outcome.error
    assert outcome.hint == "unset JAX_PLATFORMS"


# --- what does not fit


@pytest.fixture(scope="module")
def endless(grokctl, tmp_path_factory):
    """A model with a context that exceeds any memory: 8 kB of cache for each token."""
    home = tmp_path_factory.mktemp("endless")
    root = write_release(home, "endless", replace(WORDS, sequence_len=2**24 - 1, key_size=128))
    assert grokctl("reshard", root, "--devices", 1, "--home", home, "-q").exit_code == 0
    return home


def test_a_context_that_memory_cannot_hold_is_refused_with_the_numbers(process, endless):
    given = ("run", *PROMPT, "--home", endless)

    outcome = process.run(*given, "--context", 2**24 - 1, "--json")

    free = psutil.virtual_memory().total
    assert outcome.exit_code == 40
    assert outcome.result["ok"] is False
    assert "endless-int8-1 on the CPU, for 16,777,215 tokens of context, takes " in outcome.error
    assert "137.4 GB of cache" in outcome.error
    assert outcome.error.endswith(" are free for it")
    assert " --context " in outcome.hint
    longest = int(outcome.hint.rpartition(" --context ")[2].split()[0])
    assert longest & (longest - 1) == 0
    assert 512 <= longest * 8192 < free


def little_memory(monkeypatch, nbytes: int) -> None:
    """Simulate a machine with little free memory."""
    memory = SimpleNamespace(total=2**35, available=nbytes)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def test_a_context_that_fits_is_chosen_where_all_of_it_does_not(grokctl, endless, monkeypatch):
    little_memory(monkeypatch, 300 * 2**20)

    outcome = grokctl("run", *PROMPT, "--home", endless)

    words = line_of(outcome).partition("context ")[2].split()
    context = int(words[0].replace(",", ""))
    assert outcome.exit_code == 0, outcome.stderr
    assert words[1:3] == ["of", "16,777,215:"]
    assert context & (context - 1) == 0
    assert 512 <= context <= 300 * 2**20 / 8192


def test_a_context_that_was_chosen_limits_the_prompt(grokctl, endless, monkeypatch):
    little_memory(monkeypatch, 300 * 2**20)

    outcome = grokctl("run", "--token-ids", ",".join("1" * 40_000), "--home", endless)

    assert outcome.exit_code == 2
    assert "the prompt is 40000 tokens" in outcome.error


@pytest.mark.parametrize("verb", ["run", "score", "bench"])
def test_less_memory_than_the_shortest_context_takes_is_refused(
    grokctl, several, monkeypatch, verb
):
    little_memory(monkeypatch, 2**16)
    more = [] if verb == "bench" else ["--token-ids", "1"]

    outcome = grokctl(verb, *more, "--home", several)

    assert outcome.exit_code == 40
    assert "65.5 kB of memory are free" in outcome.error
    assert "512 tokens of context" in outcome.error
    assert outcome.hint
