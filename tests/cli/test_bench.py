"""`grokctl bench`: speeds of a loaded model, compared with the memory bandwidth."""

import pytest


@pytest.fixture(scope="module")
def bench(grokctl, home, cut):
    """Measure the release with the tokenizer, on one device."""

    def run(*arguments):
        return grokctl("bench", cut("words", 1).root, "--home", home, *arguments)

    return run


@pytest.fixture(scope="module")
def measured(bench):
    """Four workloads."""
    outcome = bench("--prompt-tokens", "3,8", "--batch", "1,4", "-n", 5, "--json")
    assert outcome.exit_code == 0
    return outcome


def test_every_length_meets_every_batch(measured):
    values = measured.result

    shapes = [(row["prompt_tokens"], row["batch"]) for row in values["rows"]]
    assert shapes == [(3, 1), (3, 4), (8, 1), (8, 4)]
    assert values["bandwidth_bytes_per_s"] > 1e8
    is_native = values["kernel"].startswith("native, ")
    assert is_native == (values["kernel_bytes_per_s"] is not None)
    assert values["load_s"] > 0
    assert values["compile_s"] > 0
    for row in values["rows"]:
        per_s = row["bytes_per_step"] / row["step_s"]
        assert row["decode_tokens_per_s"] == pytest.approx(row["batch"] / row["step_s"])
        assert row["bandwidth_fraction"] == pytest.approx(per_s / values["bandwidth_bytes_per_s"])
        assert row["prefill_tokens_per_s"] == pytest.approx(
            row["prompt_tokens"] / row["first_token_s"]
        )


def test_a_step_of_one_reads_what_a_run_says_and_one_of_many_reads_more(
    measured, grokctl, home, cut
):
    run = grokctl(
        *("run", cut("words", 1).root, "--token-ids", "1,2", "-n", 2, "--json", "--home", home)
    )

    one, four, *_ = (row["bytes_per_step"] for row in measured.result["rows"])
    assert one == run.result["stats"]["bytes_per_token"]
    assert one < four < 4 * one


def test_progress_names_the_workload(measured):
    details = [event.get("detail") for event in measured.events if event.get("stage") == "bench"]

    assert "3 tokens x 1" in details
    assert {"event": "finished", "stage": "bench"} in measured.events


def test_people_get_a_table_with_a_bar_and_the_context_may_be_full_to_the_brim(bench):
    outcome = bench("--prompt-tokens", "8", "--batch", "1", "-n", 8, "--context", 16)

    title, heads, _, row = outcome.stdout.rstrip().splitlines()
    assert outcome.exit_code == 0
    assert title.startswith("8 tokens after each prompt; the limit is the memory bandwidth, ")
    assert title.endswith("B/s")
    assert heads.split()[:3] == ["prompt", "batch", "prefill"]
    assert row.split()[:2] == ["8", "1"]
    assert row.endswith("%")
    assert "░" in row
    assert "bench" in outcome.stderr


def test_it_measures_any_mesh_and_any_cache(grokctl, home):
    outcome = grokctl(
        *("bench", home / "releases" / "two-layers", "--mesh", "expert=2,model=1"),
        *("--prompt-tokens", "3", "--batch", "2", "-n", 2, "--kv", "int8"),
        *("--compute", "float32", "--json", "--home", home),
    )

    values = outcome.result
    assert outcome.exit_code == 0
    assert (values["devices"], values["mesh"]) == (2, "expert=2,model=1")
    assert (values["compute"], values["kv"]) == ("float32", "int8")


@pytest.mark.parametrize("option", ["--prompt-tokens", "--batch"])
@pytest.mark.parametrize("value", ["", ",", "0", "-1", "a", "1,,2", "1.5", "1e3", "9" * 99])
def test_a_list_that_is_none_is_a_usage_error(bench, option, value):
    outcome = bench(option, value)

    assert outcome.exit_code == 2
    assert option in outcome.error


def test_what_the_context_does_not_hold_is_refused_with_numbers(bench):
    outcome = bench("--prompt-tokens", "8,60", "-n", 5)
    smaller = bench("--prompt-tokens", "8", "-n", 5, "--context", 12)

    assert (outcome.exit_code, smaller.exit_code) == (2, 2)
    assert all(number in outcome.error for number in ("60", "5", "65", "64"))
    assert smaller.hint.endswith(" --context 13")


def test_one_token_is_no_decoding(bench):
    assert bench("-n", 1).exit_code == 2
