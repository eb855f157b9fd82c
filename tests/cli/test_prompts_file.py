"""`grokctl run --prompts-file`: JSON lines in, and a JSON line out when a prompt ends."""

import json
import signal

import pytest

EXACT = ("--compute", "float32", "--ignore-eos")
LONG, SHORT = "The import statement", "ключ 🗝"


@pytest.fixture(scope="module")
def say(grokctl, home, cut):
    """Run with the release with the tokenizer, on one device."""

    def run(*arguments, **options):
        root = cut("words", 1).root
        return grokctl("run", root, "--home", home, *EXACT, *arguments, **options)

    return run


@pytest.fixture(scope="module")
def greedy(say):
    """The greedy result of a prompt alone."""
    return say("-p", LONG, "-n", 12, "--temperature", 0, "--json").result


@pytest.fixture(scope="module")
def prompts(greedy):
    """Lines of all kinds; the first one is the longest."""
    text = greedy["text"]
    return [
        {"prompt": SHORT, "max_tokens": 30, "temperature": 1, "id": "long"},
        {"prompt": LONG, "max_tokens": 12, "temperature": 0, "id": 7},
        {"token_ids": [5, 6], "max_tokens": 2, "temperature": 1, "seed": 3},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": LONG, "max_tokens": 12, "temperature": 0, "stop": text[len(text) // 2 :][:2]},
        {"prompt": LONG, "max_tokens": 12, "temperature": 0, "stop": ["never said"]},
    ]


@pytest.fixture(scope="module")
def outcome(say, prompts, tmp_path_factory):
    """All of them, two at a time."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    outcome = say("--prompts-file", path, "--batch", 2, "--seed", 90, "--json")
    assert outcome.exit_code == 0
    return outcome


@pytest.fixture(scope="module")
def results(outcome):
    """Their results in the order of their ends."""
    return [json.loads(line) for line in outcome.stdout.splitlines()[:-1]]


@pytest.fixture(scope="module")
def by_index(results):
    """Their results in the order of their lines."""
    return sorted(results, key=lambda result: result["index"])


def without_stats(values):
    return {name: value for name, value in values.items() if name not in {"index", "id", "stats"}}


# --- results


def test_every_prompt_has_one_result(results, prompts):
    assert sorted(result["index"] for result in results) == list(range(len(prompts)))


def test_a_prompt_among_others_says_what_it_says_alone(say, prompts, greedy, by_index):
    drawn = say("-p", SHORT, "-n", 30, "--temperature", 1, "--seed", 90, "--json").result

    assert without_stats(by_index[0]) == without_stats(drawn)
    assert without_stats(by_index[1]) == {**without_stats(greedy), "seed": 91}
    assert by_index[0]["stats"].keys() == drawn["stats"].keys()
    assert prompts[0]["prompt"] == SHORT


def test_short_answers_do_not_wait_for_long_ones(results):
    assert results[-1]["index"] == 0
    assert len(results[-1]["tokens"]) == 30


def test_results_carry_the_names_of_their_prompts(by_index):
    assert [result.get("id", "none") for result in by_index] == ["long", 7, *["none"] * 4]


def test_seeds_count_up_from_the_command_lines_unless_a_line_has_its_own(by_index):
    assert [result["seed"] for result in by_index] == [90, 91, 3, 93, 94, 95]


def test_a_line_may_ask_for_no_tokens(by_index):
    none = by_index[3]

    assert (none["tokens"], none["text"], none["finish_reason"]) == ([], "", "length")


def test_texts_stop_where_their_lines_say(prompts, greedy, by_index):
    whole, stop = greedy["text"], prompts[4]["stop"]

    assert (by_index[4]["text"], by_index[4]["finish_reason"]) == (
        whole[: whole.index(stop)],
        "stop",
    )
    assert (by_index[5]["text"], by_index[5]["finish_reason"]) == (whole, "length")


def test_with_json_a_summary_comes_last(outcome, results):
    summary = json.loads(outcome.stdout.splitlines()[-1])

    assert summary["prompts"] == len(results)
    assert summary["tokens"] == sum(len(result["tokens"]) for result in results)
    assert summary["prompt_tokens"] == sum(result["prompt_tokens"] for result in results)
    assert summary["seconds"] > 0
    assert summary["stats"]["bandwidth_fraction"] > 0
    assert any(event.get("unit") == "prompts" for event in outcome.events)


def test_prompts_of_stdin_are_the_same_and_a_line_says_how_fast_it_was(say, prompts, by_index):
    piped = say("--prompts-file", "-", "--seed", 91, stdin=json.dumps(prompts[1]))

    assert without_stats(piped.result) == without_stats(by_index[1])
    assert piped.stderr.splitlines()[-1].startswith("1 prompt · ")
    assert "tokens/s" in piped.stderr.splitlines()[-1]


def test_all_stats_of_many_name_the_memory(say):
    lines = '{"token_ids": [1], "max_tokens": 3}\n' * 2

    outcome = say("--prompts-file", "-", "--stats", stdin=lines)

    first, second = (json.loads(line)["seed"] for line in outcome.stdout.splitlines())
    assert abs(first - second) == 1
    assert "measured now" in outcome.stderr
    assert "reads per step: " in outcome.stderr


# --- errors


@pytest.mark.parametrize(
    ("line", "why"),
    [
        pytest.param("nonsense", "not JSON", id="no JSON"),
        pytest.param('{"token_ids": [512]}', "outside the vocabulary", id="no such token"),
        pytest.param('{"token_ids": [-1]}', "outside the vocabulary", id="a negative token"),
        pytest.param('{"token_ids": [1' + ",1" * 64 + "]}", "65 tokens, the context 64", id="long"),
        pytest.param('{"prompt": "' + "word " * 99 + '"}', "the context 64", id="long text"),
        pytest.param('{"prompt": ""}', "empty", id="empty text"),
        pytest.param('{"token_ids": []}', "empty", id="no tokens"),
        pytest.param('{"prompt": "a", "temprature": 1}', "'temperature'", id="typo"),
    ],
)
def test_a_bad_line_is_named_before_any_weights_are_loaded(say, line, why):
    outcome = say("--prompts-file", "-", stdin=f'{{"prompt": "good"}}\n\n{line}\n')

    assert outcome.exit_code == 2
    assert outcome.error.startswith("stdin, line 3: ")
    assert why in outcome.error
    assert outcome.stdout == ""
    assert "load" not in outcome.stderr


@pytest.mark.parametrize("line", ['{"prompt": "a"}', '{"token_ids": [1], "stop": "a"}'])
def test_a_checkpoint_without_a_tokenizer_takes_no_text(grokctl, home, line):
    root = home / "releases" / "two-layers"

    outcome = grokctl("run", root, "--prompts-file", "-", stdin=line)

    assert outcome.exit_code == 2
    assert "stdin, line 1: " in outcome.error
    assert "tokenizer" in outcome.error


def test_closed_stdin_is_a_usage_error(process, home):
    outcome = process.run(
        "run", home / "releases" / "words", "--prompts-file", "-", "--json", shell="<&-"
    )

    assert outcome.exit_code == 2
    assert outcome.result["error"] == outcome.error


# --- interrupts


def test_what_has_ended_stays_printed_when_the_rest_is_interrupted(process, home, cut):
    prompts = "".join(
        json.dumps({"prompt": "a", "max_tokens": length}) + "\n" for length in (2, 60)
    )
    slow = "patch('inference.model_runner:ModelRunner._run', delayed(0.05))"
    path = home / "prompts.jsonl"
    path.write_text(prompts)

    with process.start(
        *("run", cut("words", 1).root, "--prompts-file", path, "--home", home, *EXACT), code=slow
    ) as running:
        first = running.stdout.readline()
        running.send_signal(signal.SIGINT)
        rest, stderr = running.communicate(timeout=30)

    assert running.returncode == 130
    assert json.loads(first)["index"] == 0
    assert rest == ""
    assert stderr.rstrip().endswith("interrupted")
