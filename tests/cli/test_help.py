"""`--help` fits a screen, ends with an example, and is fast."""

import resource
import subprocess
import sys

import pytest

from grokctl import __version__

VERBS = (
    "doctor",
    "up",
    "fetch",
    "verify",
    "inspect",
    "reshard",
    "export",
    "run",
    "serve",
    "score",
    "bench",
    "list",
    "remove",
    "demo",
)
HEAVY = ("jax", "libtorrent", "rich", "numpy", "starlette", "uvicorn")


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_fits_a_screen_and_shows_an_example(grokctl, verb):
    outcome = grokctl(verb, "--help")

    lines = outcome.stdout.splitlines()
    assert outcome.exit_code == 0
    assert outcome.stderr == ""
    assert len(lines) <= 62  # with the titles of groups
    assert max(map(len, lines)) <= 100
    assert any(line.strip().startswith(f"Example: grokctl {verb}") for line in lines)


def test_the_help_names_every_verb_and_where_to_start(grokctl):
    outcome = grokctl("--help")

    assert outcome.exit_code == 0
    assert all(f"\n  {verb} " in outcome.stdout for verb in VERBS)
    assert "grokctl demo" in outcome.stdout.splitlines()[-1]


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_short_and_long_help_are_the_same(grokctl, verb):
    before = [] if verb is None else [verb]

    assert grokctl(*before, "-h") == grokctl(*before, "--help")


def test_the_version_is_the_packages(grokctl):
    outcome = grokctl("--version")

    assert (outcome.exit_code, outcome.stdout) == (0, f"grokctl {__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]], ids=" ".join)
def test_help_loads_nothing_heavy(process, arguments):
    code = (
        "import sys; from grokctl.cli.app import app\n"
        f"try: app({arguments!r})\n"
        f"finally: print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        env=process.environment(),
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stderr == "[]\n"


def test_help_takes_less_than_a_third_of_a_second(process):
    def cost() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process.run("--help").exit_code == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cost() for _ in range(3)) < 0.3


def test_no_arguments_show_the_help(process):
    outcome = process.run()

    assert outcome.exit_code == 2
    assert "Start with: grokctl demo" in outcome.stdout + outcome.stderr
