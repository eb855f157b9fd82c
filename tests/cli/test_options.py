"""Errors about values name the option as it was typed, and never a field of the library."""

import ast
from pathlib import Path

import pytest
import typer

import grokctl
from grokctl.cli.app import app
from grokctl.cli.context import option_of
from grokctl.errors import FetchError
from grokctl.session.settings import SETTINGS

PACKAGE = Path(grokctl.__file__).parent
TOKENS = ("run", "{release}", "--token-ids", "1")


@pytest.fixture
def release(home):
    return home / "releases" / "two-layers"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param(
            ["fetch", "--stall-timeout", "0"],
            "--stall-timeout 0: expected more than 0",
            id="a name with a unit",
        ),
        pytest.param(["fetch", "--port", "70000"], "--port 70000: expected 0 to 65535", id="port"),
        pytest.param(
            ["fetch", "--seed-ratio", "-0.5"], "--seed-ratio -0.5: expected more than 0", id="ratio"
        ),
        pytest.param(
            ["fetch", "--peer", "me"], "--peer 'me': expected HOST:PORT", id="one of many"
        ),
        pytest.param(
            ["fetch", "--web-seed", "ftp://x"],
            "--web-seed 'ftp://x': expected http or https://host",
            id="two words",
        ),
        pytest.param(
            [*TOKENS, "--top-p", "1.5"],
            "--top-p 1.5: expected more than 0 and at most 1",
            id="sampling",
        ),
        pytest.param([*TOKENS, "--seed", "-1"], "--seed -1: expected 0 to 2^64 - 1", id="seed"),
        pytest.param(
            [*TOKENS, *["--stop", "x"] * 65],
            "--stop: expected at most 64 texts, found 65",
            id="stop",
        ),
        pytest.param(
            [*TOKENS, "--context", "65"], "--context 65: expected 1 to 64", id="the model's context"
        ),
        pytest.param(
            ["run", "{release}", "--token-ids", "1,x"],
            "--token-ids '1,x': expected token ids, such as 1,2,3",
            id="ids",
        ),
        pytest.param(
            ["bench", "{release}", "--batch", "257"],
            "--batch 257: expected 1 to 256",
            id="another name",
        ),
        pytest.param(
            ["doctor", "--accelerator", "h100-80gb", "--context", "8193"],
            "--context 8193: expected 1 to 8192",
            id="question",
        ),
        pytest.param(
            ["doctor", "--memory", "much"],
            "--memory 'much': expected a size such as 500kB or 20MB",
            id="size",
        ),
        pytest.param(
            [*TOKENS, "--mesh", "model=8", "--devices", "4"],
            "--mesh 'model=8': expected 4 devices, found 8",
            id="mesh",
        ),
        pytest.param(
            ["reshard", "{release}", "--devices", "2", "--group-size", "32"],
            "--group-size 32: expected precision int4, found int8",
            id="group",
        ),
        pytest.param(
            ["reshard", "{release}", "--devices", "2", "--compress", "gzip"],
            "--compress 'gzip': expected zstd or zstd:1 to zstd:19",
            id="compression",
        ),
        pytest.param(
            ["run", "--coordinator", "x", "--num-processes", "2", "--process-id", "0"],
            "--coordinator 'x': expected HOST:PORT",
            id="launch",
        ),
        pytest.param(
            ["run", "-n", "-1"],
            "--max-tokens: expected at least 0",
            id="typer's",
        ),
        pytest.param(
            ["run", "--kv", "int3"],
            "--kv: expected one of 'compute', 'int8', found 'int3'",
            id="a choice",
        ),
    ],
)
def test_the_option_is_named_as_it_was_typed(grokctl, home, loopback, release, arguments, error):
    verb, *given = [text.format(release=release) for text in arguments]

    outcome = grokctl(verb, *(loopback if verb == "fetch" else ()), *given, "--home", home)

    assert outcome.exit_code == 2
    assert outcome.error == error


def test_in_a_file_of_prompts_it_is_the_key(grokctl, home):
    outcome = grokctl(
        *("run", "words", "--prompts-file", "-", "--home", home),
        stdin='{"prompt": "a", "top_p": 7}',
    )

    assert outcome.error == "stdin, line 1: top_p 7: expected more than 0 and at most 1"


def names_of_invalid_values() -> set[str]:
    """The fields that the library raises errors about, wherever it does."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Name(id="invalid"), args=[ast.Constant(value=str() as name), *_]
                ):
                    names.add(name)
    return names


def test_every_field_that_an_error_names_has_an_option():
    group = typer.main.get_command(app)
    options = {
        option
        for command in group.commands.values()
        for parameter in command.params
        for option in parameter.opts
    }

    of_the_library = {"logprobs", "cache_prompt"}  # the latter's option only turns it off
    names = (names_of_invalid_values() | {"stall_timeout_s", *SETTINGS}) - of_the_library

    assert len(names) > 20
    assert options >= {
        option_of(name) for name in names if not name.startswith("--") and not name.isupper()
    }


def test_options_and_variables_keep_their_names():
    assert option_of("--layers") == "--layers"
    assert option_of("JAX_COORDINATOR_PORT") == "JAX_COORDINATOR_PORT"


@pytest.mark.parametrize(
    ("typed", "seconds"),
    [
        pytest.param(["--dry-run"], 60.0, id="a-plan"),
        pytest.param(["--dry-run", "--stall-timeout", 7], 7.0, id="a-plan-as-asked"),
        pytest.param([], 300.0, id="a-download"),
        pytest.param(["--stall-timeout", 7, "--no-trackers"], 7.0, id="as-asked"),
    ],
)
def test_a_plan_waits_a_minute(grokctl, monkeypatch, tmp_path, typed, seconds):
    seen = []

    def stop(_source, _root, options, **_):
        seen.append(options)
        raise FetchError("seen")

    monkeypatch.setattr("grokctl.fetch.fetch", stop)
    monkeypatch.setattr("grokctl.fetch.plan_fetch", stop)

    grokctl("fetch", "--to", tmp_path / "x", *typed)

    (options,) = seen
    assert options.stall_timeout_s == seconds
    assert options.source_trackers is ("--no-trackers" not in typed)
