"""Progress: fewer and fewer lines in a pipe, and bars that leave room for an echo of Ctrl-C."""

import io

import pytest
from rich.console import Console

from grokctl.events import Advanced, Finished, Noted, Stage, Started
from grokctl.screen.progress import Bars, Lines


@pytest.fixture
def lines(monkeypatch):
    """Seconds of a stage, one event in each, become lines with their times."""

    def show(stage, seconds, **started):
        now = 0.0
        monkeypatch.setattr("grokctl.screen.progress.time.monotonic", lambda: now)
        said = []
        observe = Lines(lambda line: said.append((now, line))).observe
        observe(Started(stage=stage, **started))
        for _ in range(seconds):
            now += 1
            observe(Advanced(stage=stage, done=int(now) * 1000, detail="up 2 kB/s"))
        return observe, said

    return show


@pytest.mark.parametrize(
    ("seconds", "most"), [(4, 0), (60, 5), (300, 9), (3600, 18), (86_400, 160)]
)
def test_the_longer_the_fewer(lines, seconds, most):
    _, said = lines(Stage.METADATA, seconds)

    assert len(said) <= most
    if most:
        assert said[0][0] == 5
        assert seconds - said[-1][0] <= 601


def test_the_last_state_is_not_said_twice(lines):
    observe, said = lines(Stage.FETCH, 7, total=7000)

    observe(Finished(stage=Stage.FETCH))

    assert [line.split(":")[0] for _, line in said] == ["fetch", "fetch"]
    assert said[-1][1] == "fetch: 7.0 kB · 1.0 kB/s in 7 s"


@pytest.mark.parametrize("stage", [Stage.LOAD, Stage.COMPILE, Stage.PREFILL])
def test_short_stages_of_a_run_take_no_line(lines, stage):
    observe, said = lines(stage, 4, total=7000)

    observe(Finished(stage=stage))

    assert said == []


def test_a_long_load_is_said_to_its_end(lines):
    observe, said = lines(Stage.LOAD, 6, total=6000)

    observe(Finished(stage=Stage.LOAD))

    assert [line.split(":")[0] for _, line in said] == ["load", "load"]


def test_every_layer_of_the_first_token_has_a_line_if_it_reads_experts():
    said = []
    observe = Lines(said.append).observe

    for _ in range(2):  # two tokens
        observe(Started(stage=Stage.STREAM, total=100))
        observe(Advanced(stage=Stage.STREAM, done=10))
        observe(Advanced(stage=Stage.STREAM, done=20, detail="layer 1 of 2, 50% in memory"))
        observe(Advanced(stage=Stage.STREAM, done=30, detail="layer 1 of 2, 50% in memory"))
        observe(Advanced(stage=Stage.STREAM, done=40, detail="layer 2 of 2, 25% in memory"))
        observe(Finished(stage=Stage.STREAM))

    assert [line.split(" · ")[0] for line in said] == [
        "read experts: 20 B of 100 B",
        "read experts: 40 B of 100 B",
    ]
    assert said[0].endswith(" left · layer 1 of 2, 50% in memory")


def test_a_note_is_said_at_once(lines):
    observe, said = lines(Stage.FETCH, 2, total=7000)

    observe(Noted(message="a peer sent bad data"))

    assert said == [(2, "a peer sent bad data")]


def test_rates_of_seeding_have_names(lines):
    _, said = lines(Stage.SEED, 5)

    assert said == [(5, "seed: 5.0 kB · up 2 kB/s")]


@pytest.mark.parametrize("facts", [(), (("swarm", "x" * 200),)], ids=["a-line", "a-block"])
@pytest.mark.parametrize("columns", [80, 100, 140])
def test_bars_are_wide_and_leave_room_for_the_echo_of_ctrl_c(columns, facts):
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=columns, color_system=None)
    bars = Bars(console, print)

    bars.observe(Started(stage=Stage.FETCH, total=7_300_000))
    bars.observe(Advanced(stage=Stage.FETCH, done=7_299_999, detail="y" * 200, facts=facts))
    bars.stop()

    last = output.getvalue().split("fetch ")[-1]
    first, *rest = f"  fetch {last}".splitlines()
    assert first.count("\u2501") + first.count("\u2578") + first.count("\u257a") >= 14
    assert all(len(line.rstrip()) <= columns - 3 for line in (first, *rest[:-1]))


@pytest.mark.parametrize(
    ("stage", "begun", "seconds", "line"),
    [
        pytest.param(Stage.FETCH, 7000, 0, "fetch: nothing in 0 s, 7.0 kB before", id="all-here"),
        pytest.param(Stage.FETCH, 3000, 4, "fetch: 4.0 kB in 4 s, 3.0 kB before", id="a-part"),
        pytest.param(Stage.SEED, 2000, 4, "seed: 2.0 kB in 4 s, 2.0 kB before", id="seeded-before"),
        pytest.param(Stage.SEED, 0, 3, "seed: 3.0 kB in 3 s", id="seed"),
    ],
)
def test_the_last_line_counts_what_was_done_now(lines, stage, begun, seconds, line):
    observe, said = lines(stage, seconds, total=7000, done=begun)

    observe(Finished(stage=stage))

    assert said[-1][1] == line
