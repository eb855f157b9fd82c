"""Results go to stdout, everything else to stderr; no terminal codes without a terminal."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ESCAPE = "\x1b"


@pytest.fixture
def release(home):
    return home / "releases" / "two-layers"


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["verify", "{release}", "--quick"], id="verify"),
        pytest.param(["inspect", "{release}"], id="inspect"),
        pytest.param(["reshard", "{release}", "--devices", "4", "--dry-run"], id="reshard"),
    ],
)
def test_results_go_to_stdout_and_carry_no_codes(grokctl, release, arguments):
    outcome = grokctl(*(text.format(release=release) for text in arguments))

    assert outcome.exit_code == 0
    assert outcome.stdout
    assert ESCAPE not in outcome.stdout + outcome.stderr
    assert "\r" not in outcome.stdout + outcome.stderr


def test_errors_and_hints_go_to_stderr_alone(grokctl, release):
    outcome = grokctl("verify", release)

    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert outcome.stderr == f"error: {outcome.error}\nhint: {outcome.hint}\n"


def test_progress_without_a_terminal_is_plain_lines_on_stderr(grokctl, release, tmp_path):
    outcome = grokctl("reshard", release, "--devices", 1, "--out", tmp_path / "out")

    assert outcome.exit_code == 0
    assert "reshard: 1." in outcome.stderr
    assert "reshard: 1." not in outcome.stdout
    assert ESCAPE not in outcome.stdout + outcome.stderr


@pytest.mark.parametrize("quiet", ["-q", "--quiet"])
def test_quiet_leaves_only_errors_and_what_a_run_writes(grokctl, release, tmp_path, quiet):
    resharded = grokctl("reshard", release, "--devices", 1, "--out", tmp_path / "out", quiet)
    verified = grokctl("verify", release, "--quick", quiet)
    failed = grokctl("verify", release, quiet)

    assert (resharded.exit_code, resharded.stderr) == (0, "")
    assert resharded.stdout == f"resharded {release.name}: {tmp_path / 'out'}\n"
    assert (verified.exit_code, verified.stderr) == (0, "")
    assert verified.stdout == f"{release.name}: the structure is sound; no content is proven\n"
    assert failed.exit_code == 2
    assert failed.error


def test_a_quiet_verify_of_damage_is_its_error(grokctl, release, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(release, damaged)
    (damaged / "ckpt-0" / "tensor00003_000").write_bytes(b"")

    outcome = grokctl("verify", damaged, "--quick", "-q")

    assert (outcome.exit_code, outcome.stdout) == (20, "")
    assert "1 of " in outcome.error


@pytest.mark.parametrize("options", [[], ["--devices", "2"]])
def test_a_run_in_a_pipe_has_at_most_two_lines_before_the_text(grokctl, release, options):
    outcome = grokctl("run", release, "--token-ids", "7,8", "-n", 1, *options)

    *before, closing = outcome.stderr.splitlines()
    assert outcome.exit_code == 0
    assert closing.startswith("load ")
    assert len(before) <= 2


def test_quiet_json_is_the_object_and_nothing_else(grokctl, release):
    outcome = grokctl("inspect", release, "--json", "-q")

    assert outcome.result["kind"] == "release"
    assert outcome.stderr == ""


def test_verbose_says_more_on_stderr_only(grokctl, release):
    plain = grokctl("inspect", release, "--json")
    verbose = grokctl("inspect", release, "--json", "-v")

    assert verbose.exit_code == 0
    assert verbose.result == plain.result


def _on_a_terminal(process, *arguments, **changes):
    """The output of a command on a terminal of 80 columns."""
    leader, follower = os.openpty()
    environment = process.environment(**{"TERM": "xterm", "COLUMNS": "80", **changes})
    running = process.start(
        *arguments, env=environment, stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    said = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:
            break
        if not part:
            break
        said += part
    running.wait(timeout=60)
    os.close(leader)
    return running.returncode, said.decode()


def test_a_terminal_gets_colour_and_no_color_takes_it_away(process, release):
    colours = ("\x1b[31m", "\x1b[1;31m", "\x1b[32m", "\x1b[90m")

    coloured = _on_a_terminal(process, "verify", release)
    plain = _on_a_terminal(process, "verify", release, NO_COLOR="1")

    assert (coloured[0], plain[0]) == (2, 2)
    assert any(code in coloured[1] for code in colours)
    assert not any(code in plain[1] for code in colours)
    assert "cannot be proven without release.torrent" in plain[1].replace("\r\n", " ")


def test_a_dumb_terminal_gets_no_codes(process, release):
    code, said = _on_a_terminal(process, "verify", release, "--quick", TERM="dumb")

    assert code == 0
    assert ESCAPE not in said


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_any_width_shows_what_is_wrong(process, two_layers, columns):
    (two_layers / "ckpt-0" / "tensor00003_000").unlink()

    code, said = _on_a_terminal(
        *(process, "verify", two_layers, "--quick"), NO_COLOR="1", COLUMNS=str(columns)
    )

    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.replace("\r\n", "\n"))
    table, _, error = plain.partition("error: ")
    assert code == 20
    assert max(map(len, table.rpartition("\r")[2].splitlines())) <= columns
    assert "missing" in table.replace("\n", "")
    assert "ckpt-0/tensor00003_000" in error.replace("\n", "")


def test_a_table_through_a_pipe_keeps_a_tensor_on_a_line(grokctl, release):
    outcome = grokctl("inspect", release, "--tensor", "*")

    lines = outcome.stdout.splitlines()
    assert sum("tensor00005_000" in line and "layers.0." in line for line in lines) == 1


@pytest.mark.parametrize(
    "arguments",
    [["inspect", "{release}"], ["inspect", "{release}", "--json"]],
    ids=["text", "json"],
)
def test_a_reader_that_goes_away_is_no_error(process, release, arguments):
    reading, writing = os.pipe()
    os.close(reading)

    outcome = process.run(*(text.format(release=release) for text in arguments), stdout=writing)
    os.close(writing)

    assert outcome.exit_code == 0
    assert "Traceback" not in outcome.stderr
    assert "error" not in outcome.stderr


def test_nobody_reading_stderr_changes_no_exit_code(process, release):
    reading, writing = os.pipe()
    os.close(reading)

    good = process.run("verify", release, "--quick", "--json", stderr=writing)
    bad = process.run("verify", release, stderr=writing)
    os.close(writing)

    assert good.exit_code == 0
    assert good.result["ok"] is True
    assert bad.exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["run", "{release}"], id="run"),
        pytest.param(["run", "{release}", "-p", "-"], id="run from stdin"),
        pytest.param(["score", "{release}", "--text", "-"], id="score"),
    ],
)
def test_closed_stdin_is_a_usage_error(process, release, arguments):
    outcome = process.run(*(text.format(release=release) for text in arguments), shell="<&-")

    assert outcome.exit_code == 2
    assert outcome.error


def test_closed_stdout_is_no_bug(process, release):
    outcome = process.run("inspect", release, "--json", shell=">&-")

    assert "Traceback" not in outcome.stderr
    assert outcome.exit_code != 1


def test_a_full_disk_behind_stdout_is_one_sentence(process, release):
    with Path("/dev/full").open("w") as full:
        outcome = process.run("inspect", release, "--json", stdout=full)

    assert outcome.exit_code == 12
    assert outcome.error


def test_a_name_cannot_write_to_the_terminal(grokctl, home):
    outcome = grokctl("verify", "we\x1b[2Jird\nerror: a line of its own", "--home", home)

    assert outcome.exit_code == 2
    assert ESCAPE not in outcome.stderr
    assert "ird" in outcome.error


def test_a_name_that_is_no_text_can_be_said(process, home):
    outcome = process.run("verify", os.fsdecode(b"\xff\xfe"), "--home", home, "--json")

    assert outcome.exit_code == 2
    assert outcome.result["exit_code"] == 2
    assert outcome.error


def test_ascii_output_loses_letters_and_not_the_result(process, two_layers):
    root = two_layers.rename(two_layers.with_name("zwei schöne Schichten"))

    outcome = process.run("inspect", root, env=process.environment(PYTHONIOENCODING="ascii"))

    assert outcome.exit_code == 0
    assert "embedding" in outcome.stdout


def test_no_home_and_a_strange_working_folder_are_fine(process, release, tmp_path):
    bare = {
        name: value for name, value in process.environment().items() if name not in {"HOME", "USER"}
    }

    outcome = process.run("inspect", release, "--json", env=bare, cwd=tmp_path)

    assert outcome.exit_code == 0
    assert len(outcome.result["tensors"]) == 26


def test_json_is_ascii_whatever_the_names_are(grokctl, two_layers):
    root = two_layers.rename(two_layers.with_name("zwei schöne Schichten"))

    outcome = grokctl("verify", root, "--quick", "--json")

    assert outcome.stdout.isascii()
    assert json.loads(outcome.stdout)["checkpoint"] == str(root)


def test_the_installed_command_is_the_module(process):
    module = process.run("--version")
    script = subprocess.run(
        ["grokctl", "--version"],
        env=process.environment(PATH=os.pathsep.join([_scripts(), os.environ.get("PATH", "")])),
        capture_output=True,
        text=True,
        check=False,
    )

    assert (script.returncode, script.stdout) == (module.exit_code, module.stdout)


def _scripts():
    import sysconfig  # noqa: PLC0415

    return sysconfig.get_path("scripts")
