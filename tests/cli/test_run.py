"""`grokctl run` and `grokctl score` match the reference on every mesh."""

import os
import shutil

import numpy as np
import pytest

PROMPT = "The import statement"
EXACT = ("--compute", "float32")


@pytest.fixture(scope="module")
def say(grokctl, home, cut):
    """Run the release with the tokenizer on one device."""

    def run(*arguments, prompt=PROMPT, **options):
        given = [] if prompt is None else ["-p", prompt]
        root = cut("words", 1).root
        return grokctl("run", root, *given, "--home", home, *EXACT, *arguments, **options)

    return run


@pytest.fixture(scope="module")
def greedy(say):
    """A whole greedy continuation, as JSON."""
    outcome = say("-n", 16, "--temperature", 0, "--ignore-eos", "--json")
    assert outcome.exit_code == 0
    return outcome.result


# --- the reference


@pytest.mark.parametrize(
    ("source", "options"),
    [
        pytest.param("ready 1", [], id="ready"),
        pytest.param("ready 4", [], id="ready for four"),
        pytest.param("ready 4", ["--devices", "2"], id="ready for four, run on two"),
        pytest.param("release", [], id="release"),
        pytest.param("release", ["--mesh", "expert=2,model=8"], id="release on sixteen"),
    ],
)
def test_greedy_tokens_are_the_references_wherever_it_runs(
    grokctl, home, cut, golden, ids, source, options
):
    kind, _, devices = source.partition(" ")
    root = cut("two-layers", int(devices)).root if devices else home / "releases" / "two-layers"
    expected = golden["greedy_float32"].tolist()

    outcome = grokctl(
        *("run", root, "--token-ids", ids, "--temperature", 0, "-n", len(expected)),
        *("--ignore-eos", "--no-stream", *EXACT, *options, "--home", home),
    )

    assert outcome.exit_code == 0
    assert outcome.stdout == " ".join(map(str, expected)) + "\n"
    assert ("reshard" in outcome.stderr) == (kind == "release" or bool(options))


def test_score_writes_the_references_logits(grokctl, home, golden, ids, tmp_path):
    logits = tmp_path / "logits.npy"

    outcome = grokctl(
        *("score", home / "releases" / "two-layers", "--token-ids", ids, "--logits", logits),
        *(*EXACT, "--home", home, "--json"),
    )

    found, expected = np.load(logits), golden["logits_float32"]
    tokens = golden["tokens"]
    wide = expected[:-1].astype(np.float64)
    likelihood = wide[np.arange(len(wide)), tokens[1:]] - np.log(np.exp(wide).sum(axis=1))
    assert outcome.exit_code == 0
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    assert np.abs(found - expected).max() < 2e-5
    assert outcome.result["tokens"] == len(tokens)
    assert outcome.result["nll"] == pytest.approx(-likelihood.sum(), abs=1e-3)
    assert outcome.result["perplexity"] == pytest.approx(np.exp(-likelihood.mean()), rel=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["logits.npy"]
    assert logits.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_score_of_one_token_has_nothing_to_predict(grokctl, home):
    outcome = grokctl(
        *("score", home / "releases" / "two-layers", "--token-ids", "7"),
        *(*EXACT, "--home", home, "--json"),
    )

    assert outcome.exit_code == 0
    assert outcome.result == {"tokens": 1, "nll": 0.0, "perplexity": 1.0}


# --- text


def test_text_goes_to_stdout_and_everything_else_to_stderr(say, greedy):
    outcome = say("-n", 16, "--temperature", 0, "--ignore-eos")

    assert outcome.exit_code == 0
    assert outcome.stdout == greedy["text"] + "\n"
    assert "load" in outcome.stderr
    assert greedy["finish_reason"] == "length"
    assert len(greedy["tokens"]) == 16


def test_text_without_streaming_is_the_same_text(say, greedy):
    outcome = say("-n", 16, "--temperature", 0, "--ignore-eos", "--no-stream", "-q")

    assert outcome.stdout == greedy["text"] + "\n"
    assert outcome.stderr == ""


def test_echo_puts_the_prompt_first(say, greedy):
    outcome = say("-n", 16, "--temperature", 0, "--ignore-eos", "--echo", "-q")

    assert outcome.stdout == PROMPT + greedy["text"] + "\n"


def test_a_stop_string_ends_the_text_before_it(say, greedy):
    text = greedy["text"]
    middle = len(text) // 2
    stop = text[middle : middle + 2]

    outcome = say(
        *("-n", 16, "--temperature", 0, "--ignore-eos", "--json"),
        *("--stop", "never said", "--stop", stop),
    )

    assert outcome.result["text"] == text[: text.index(stop)]
    assert outcome.result["finish_reason"] == "stop"


def test_a_prompt_from_stdin_and_from_a_file_is_the_same_prompt(say, greedy, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    options = ("-n", 16, "--temperature", 0, "--ignore-eos", "-q")

    piped = say(*options, prompt="-", stdin=PROMPT)
    read = say(*options, "--prompt-file", file, prompt=None)

    assert piped.stdout == greedy["text"] + "\n"
    assert read.stdout == greedy["text"] + "\n"


def test_token_ids_of_a_text_continue_it_alike(say, home, greedy):
    import sentencepiece  # noqa: PLC0415

    model = str(home / "releases" / "words" / "tokenizer.model")
    tokens = sentencepiece.SentencePieceProcessor(model_file=model).encode(PROMPT)

    outcome = say(
        *("-n", 16, "--temperature", 0, "--ignore-eos", "--json"),
        *("--token-ids", " , ".join(map(str, tokens))),
        prompt=None,
    )

    assert outcome.result["tokens"] == greedy["tokens"]
    assert outcome.result["prompt_tokens"] == len(tokens)


def test_the_same_seed_says_the_same_and_another_one_something_else(say):
    options = ("-n", 16, "--temperature", 1, "--ignore-eos", "--json")

    first = say(*options, "--seed", 1).result
    again = say(*options, "--seed", 1).result
    other = say(*options, "--seed", 2).result

    assert first["tokens"] == again["tokens"]
    assert first["text"] == again["text"]
    assert first["tokens"] != other["tokens"]


def test_a_seed_that_was_drawn_can_be_used_again(say):
    drawn = say("-n", 8, "--temperature", 1, "--ignore-eos")
    seed = drawn.stderr.splitlines()[-1].rpartition("seed ")[2]

    again = say("-n", 8, "--temperature", 1, "--ignore-eos", "--seed", seed)

    assert again.stdout == drawn.stdout


def test_no_tokens_are_no_text(say):
    outcome = say("-n", 0, "--json")

    assert outcome.exit_code == 0
    assert (outcome.result["tokens"], outcome.result["text"]) == ([], "")
    assert outcome.result["finish_reason"] == "length"


def test_more_tokens_than_the_context_end_with_it(say):
    outcome = say("-n", 10**9, "--temperature", 0, "--ignore-eos", "--context", 16, "--json")

    values = outcome.result
    assert outcome.exit_code == 0
    assert values["finish_reason"] == "context"
    assert values["prompt_tokens"] + len(values["tokens"]) in {16, 17}


def test_a_line_on_stderr_says_how_fast_it_was(say, greedy):
    outcome = say("-n", 16, "--temperature", 0, "--ignore-eos", "-v")

    last = outcome.stderr.splitlines()[-1]
    assert outcome.stdout == greedy["text"] + "\n"
    for word in ("load ", "first token ", "prefill ", "decode ", " tokens/s", "B/token"):
        assert word in last
    assert "seed" not in last


def test_all_stats_are_lines_on_stderr_and_name_the_memory(say, greedy):
    outcome = say("-n", 16, "--temperature", 0, "--ignore-eos", "--stats")

    facts = dict(line.split(": ", 1) for line in outcome.stderr.splitlines()[-9:])
    assert outcome.stdout == greedy["text"] + "\n"
    assert "15 tokens at" in facts["decode"]
    assert f"{greedy['prompt_tokens']} tokens at" in facts["prefill"]
    assert "B/s measured now" in facts["bandwidth"]
    assert facts["ended by"] == "length"


def test_the_cache_may_be_int8(say, greedy):
    outcome = say("-n", 16, "--temperature", 0, "--ignore-eos", "--json", "--kv", "int8")

    assert outcome.exit_code == 0
    assert len(outcome.result["tokens"]) == len(greedy["tokens"])


@pytest.mark.parametrize("verb", ["run", "score", "bench"])
def test_a_cache_of_an_unknown_type_is_a_usage_error(grokctl, cut, verb):
    given = [] if verb == "bench" else ["--token-ids", "1"]

    outcome = grokctl(verb, cut("words", 1).root, *given, "--kv", "int3")

    assert outcome.exit_code == 2
    assert "int3" in outcome.error


@pytest.mark.parametrize(
    ("options", "named"),
    [
        pytest.param(["--token-ids", "1", "--prompt-file", "x"], "--token-ids", id="two"),
        pytest.param(["--prompts-file", "x", "--token-ids", "1"], "--prompts-file", id="many, too"),
        pytest.param(["--prompts-file", "x", "--echo"], "--echo", id="echo"),
        pytest.param(["--prompts-file", "x", "--no-stream"], "--no-stream", id="no stream"),
        pytest.param(["-p", "x", "--batch", "2"], "--batch", id="a batch of one"),
    ],
)
def test_options_that_contradict_each_other_are_named(grokctl, options, named):
    outcome = grokctl("run", *options)

    assert outcome.exit_code == 2
    assert named in outcome.error


def test_a_text_with_everything_in_it_survives_the_way_through(say):
    prompt = "ключ [bold]x[/] 🗝 \t\n $HOME"

    outcome = say("-n", 1, "--temperature", 0, "--echo", "-q", prompt=prompt)

    assert outcome.exit_code == 0
    assert outcome.stdout.startswith(prompt)


def test_a_prompt_that_is_no_text_is_a_usage_error(process, home, cut):
    outcome = process.run(
        *("run", cut("words", 1).root, "-p", os.fsdecode(b"caf\xe9"), "-n", 1, "--home", home)
    )

    assert outcome.exit_code == 2
    assert outcome.error


# --- nobody to ask


def test_programs_are_not_asked(process, home, cut):
    leader, follower = os.openpty()

    outcome = process.run(
        *("run", cut("words", 1).root, "--home", home, "--json"), stdin=follower, timeout=20
    )
    os.close(follower)
    os.close(leader)

    assert outcome.exit_code == 2
    assert "prompt" in outcome.result["error"]


# --- where nobody can write


def test_a_home_that_cannot_be_written_only_costs_time(process, download, read_only_disk):
    home = read_only_disk / "home"

    outcome = process.run(
        *("run", download.root, "-p", PROMPT, "-n", 1, "--temperature", 0, "--home", home)
    )

    assert outcome.exit_code == 0
    assert "Traceback" not in outcome.stderr
    assert "Warning" not in outcome.stderr


def test_the_reader_of_a_stream_may_go_away(process, home, cut):
    with process.start(
        *("run", cut("words", 1).root, "-p", PROMPT, "--ignore-eos", "--home", home, *EXACT)
    ) as running:
        running.stdout.read(1)
        running.stdout.close()
        stderr = running.stderr.read()

    assert running.returncode == 0
    assert "Traceback" not in stderr
    assert "error" not in stderr


def test_a_checkpoint_found_through_a_link_runs(grokctl, cut, tmp_path):
    (tmp_path / "ready").mkdir()
    (tmp_path / "ready" / "linked").symlink_to(cut("words", 1).root)

    outcome = grokctl(
        *("run", "-p", PROMPT, "-n", 1, "--temperature", 0, "--home", tmp_path, "--json", *EXACT)
    )

    assert outcome.exit_code == 0
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def test_a_quiet_score_is_still_a_score(grokctl, home):
    root = home / "releases" / "two-layers"

    outcome = grokctl("score", root, "--token-ids", "7", "-q", "--home", home)

    assert outcome.exit_code == 0, outcome.stderr
    assert "perplexity" in outcome.stdout
    assert not outcome.stderr


def test_kept_programs_that_were_cut_short_are_made_again(process, cut, tmp_path):
    root = cut("words", 1).root
    run = ("run", root, "-p", "import", "-n", 2, "--temperature", 0, "--home", tmp_path)
    assert process.run(*run).exit_code == 0
    kept = list(tmp_path.rglob("jit_*-cache"))
    for program in kept:
        program.write_bytes(program.read_bytes()[:10])

    first, second = process.run(*run), process.run(*run)

    assert kept
    assert list(tmp_path.rglob("jit_*-cache"))
    assert "holds damaged programs" in first.stderr
    assert "Warning" not in first.stderr
    assert first.exit_code == second.exit_code == 0
    assert "damaged" not in second.stderr
