"""Lines of progress in a pipe: fewer and fewer, and no rate that means something else."""

import pytest

from grokctl.events import Advanced, Finished, Noted, Stage, Started
from grokctl.screen.progress import Lines


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
            observe(Advanced(stage=stage, done=int(now) * 1000, detail="up 2 kB/s, down 0 B/s"))
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


def test_a_note_is_said_at_once(lines):
    observe, said = lines(Stage.FETCH, 2, total=7000)

    observe(Noted(message="a peer sent bad data"))

    assert said == [(2, "a peer sent bad data")]


def test_rates_of_seeding_have_names(lines):
    _, said = lines(Stage.SEED, 5)

    assert said == [(5, "seed: 5.0 kB · up 2 kB/s, down 0 B/s")]
