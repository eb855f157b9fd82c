"""The closing line of a run fits its terminal, with as many facts as possible."""

import re
from dataclasses import replace

import pytest

from grokctl.inference.generation import BatchStats, FinishReason, Generation, Stats
from grokctl.screen import run as screen
from grokctl.screen.console import Console

MANY = Stats(
    load_s=200.0,
    compile_s=41.0,
    first_token_s=12.3,
    prefill_tokens_per_s=1234.5,
    decode_tokens_per_s=12.34,
    bytes_per_token=84_600_000_000,
)
FEW = Stats(
    load_s=0.0123,
    compile_s=0.0,
    first_token_s=0.00123,
    prefill_tokens_per_s=0.123,
    decode_tokens_per_s=0.0123,
    bytes_per_token=463_488,
)


@pytest.fixture
def terminal(monkeypatch, capsys):
    """The output on a terminal of some width."""

    def show(columns, say):
        monkeypatch.setattr("grokctl.screen.console.is_terminal", lambda _: True)
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("COLUMNS", str(columns))
        say(Console())
        return capsys.readouterr().err

    return show


def generation(stats, reason=FinishReason.LENGTH):
    return Generation(
        prompt_tokens=3,
        seed=999_999,
        stats=stats,
        ids=(1, 2, 3),
        text="",
        finish_reason=reason,
    )


@pytest.mark.parametrize("is_drawn", [True, False])
@pytest.mark.parametrize("stats", [MANY, FEW], ids=["many", "few"])
@pytest.mark.parametrize("reason", [*FinishReason])
@pytest.mark.parametrize("columns", [80, 100, 120, 200])
def test_the_closing_line_is_one_line(terminal, columns, stats, reason, is_drawn):
    said = terminal(
        columns,
        lambda console: screen.closing(
            console, generation(stats, reason), has_loaded=True, is_drawn=is_drawn
        ),
    )

    (line,) = said.splitlines()
    assert len(line) <= columns
    assert "first" in line
    assert "/token" in line or (reason is FinishReason.CONTEXT and columns == 80 and is_drawn)
    assert ("seed 999999" in line) is is_drawn
    assert line.startswith("stopped · ") is (reason is FinishReason.INTERRUPTED)
    assert line.startswith("end of the context · ") is (reason is FinishReason.CONTEXT)


def test_a_wide_terminal_is_told_everything(terminal):
    said = terminal(
        130,
        lambda console: screen.closing(console, generation(MANY), has_loaded=True, is_drawn=True),
    )

    assert said == (
        "load 3:20 · compile 41 s · first token 12 s · prefill 1,234 tokens/s · "
        "decode 12.3 tokens/s · 84.6 GB/token · seed 999999\n"
    )


def test_a_text_without_tokens_has_no_speeds(terminal):
    empty = replace(generation(Stats(load_s=1.0)), ids=())

    said = terminal(
        80, lambda console: screen.closing(console, empty, has_loaded=True, is_drawn=False)
    )

    assert said == "load 1 s\n"


@pytest.mark.parametrize(
    ("ended_by", "shown"),
    [(None, "stop"), ("\n\n", "stop ('\\n\\n')"), (42, "stop (token 42)")],
)
def test_all_measurements_name_the_kept_prefix_and_the_stop(terminal, ended_by, shown):
    stopped = replace(
        generation(replace(MANY, cached_tokens=2), FinishReason.STOP), ended_by=ended_by
    )

    said = terminal(100, lambda console: screen.stats(console, stopped))

    plain = re.sub(r"\x1b\[[0-9;]*m", "", said)
    lines = [" ".join(line.split()) for line in plain.splitlines()]
    assert "kept prefix 2 tokens" in lines
    assert any(line.startswith("prefill 1 token at") for line in lines)
    assert f"ended by {shown}" in lines


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_the_closing_line_of_many_is_one_line(terminal, columns):
    stats = BatchStats(
        load_s=200.0,
        compile_s=41.0,
        seconds=5000.0,
        prompt_tokens=2_000_000,
        tokens=1_000_000,
        prefill_s=1000.0,
        prefilled=2_000_000,
        decode_s=4000.0,
        steps=9000,
        decoded=999_000,
        bytes_read=9000 * 200_000_000_000,
    )

    said = terminal(columns, lambda console: screen.closing_many(console, stats, 99_999))

    (line,) = said.splitlines()
    assert len(line) <= columns
    assert "1,000,000 tokens in 1:23:20" in line
    assert "out 250/s" in line or "decode 250 tokens/s" in line
    assert ("200.0 GB/step" in line) is (columns > 80)
