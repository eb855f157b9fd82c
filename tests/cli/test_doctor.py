"""The output of `grokctl doctor` about this machine and about other hardware."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest
from mounts import dead

from grokctl.planning.accelerators import PUBLISHED

NUMBER = (int, float)
PLAN = {
    "devices": int,
    "mesh": str,
    "precision": str,
    "compute": str,
    "kv": str,
    "context": int,
    "streams": int,
    "bytes_per_device": int,
    "weights_bytes": int,
    "cache_bytes": int,
    "workspace_bytes": int,
    "memory_bytes": (int, type(None)),
    "fits": bool,
    "missing_bytes": int,
    "is_paged": bool,
    "residence": (dict, type(None)),
    "first_token_s": (*NUMBER, type(None)),
    "load_s": (*NUMBER, type(None)),
    "tokens_per_s": (*NUMBER, type(None)),
    "shared_tokens_per_s": (*NUMBER, type(None)),
    "step": (dict, type(None)),
}
CHECK = {"group": str, "name": str, "status": str, "detail": str, "fix": str}
STATUSES = {"ok", "warn", "fail", "skip"}
EIGHT = ("--accelerator", "h100-80gb", "--devices", 8)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def here(process, tmp_path_factory):
    """Both outputs of `doctor` on this machine, which has no accelerators; read-only."""
    home = tmp_path_factory.mktemp("doctor") / "home"
    return (
        process.run("doctor", "--home", home, "--json"),
        process.run("doctor", "--home", home),
    )


def on_a_terminal(process, *arguments, columns, **changes):
    """The output of a command on a terminal, without colours."""
    leader, follower = os.openpty()
    with process.start(
        *arguments,
        env=process.environment(TERM="xterm-256color", COLUMNS=str(columns), **changes),
        stdout=follower,
    ) as running:
        os.close(follower)
        seen = b""
        while part := _read(leader):
            seen += part
        running.communicate(timeout=60)
    os.close(leader)
    return ESCAPES.sub("", seen.decode()).replace("\r\n", "\n")


def _read(leader):
    try:
        return os.read(leader, 65536)
    except OSError:  # it has ended
        return b""


def test_a_machine_without_accelerators_is_no_failure(here):
    as_json, shown = here

    assert (as_json.exit_code, shown.exit_code) == (0, 0)
    assert as_json.result["ok"] is True
    assert as_json.result["is_here"] is True
    assert as_json.result["hardware"]["platform"] == "cpu"
    assert as_json.result["best"]["fits"] is True
    assert "main memory: " in shown.stdout
    assert "memory required of each accelerator" in shown.stdout


def test_the_object_has_the_promised_keys(here):
    values = here[0].result

    assert {"ok", "checks", "hardware", "is_here", "plans", "abilities", "machine"} <= values.keys()
    assert {check["status"] for check in values["checks"]} <= STATUSES
    for check in values["checks"]:
        assert_promised(check, CHECK)
    for plan in values["plans"]:
        assert_promised(plan, PLAN)
        parts = (plan["weights_bytes"], plan["cache_bytes"], plan["workspace_bytes"])
        assert plan["bytes_per_device"] == sum(parts)
    assert [ability["name"] for ability in values["abilities"]] == ["download", "reshard", "run"]
    assert values["hardware"].keys() == {
        *("platform", "name", "count", "memory_bytes", "bandwidth_bytes_per_s", "is_measured"),
        "kernel_bytes_per_s",
    }
    assert values["machine"]["jax"]["platform"] == "cpu"


def assert_promised(values, promised):
    assert values.keys() == promised.keys()
    for key, kind in promised.items():
        assert isinstance(values[key], kind), (key, values[key])


def test_every_wait_says_what_it_waits_for(here):
    waits = [event for event in here[0].events if event["event"] == "advanced"]

    assert waits
    assert all(event["detail"] for event in waits)


def test_the_screen_says_what_the_object_says(here):
    as_json, shown = here

    for check in as_json.result["checks"]:
        name = re.escape(check["name"][:22])  # longer ones continue on the next line
        assert re.search(rf"[✓!✗-] {check['status']} +{name}  ", shown.stdout)
    for ability in as_json.result["abilities"]:
        assert f"→ {ability['command']}\n" in shown.stdout or not ability["command"]
    assert shown.stdout.rindex("what you can do now") > shown.stdout.rindex("memory required")


def test_a_pipe_gets_neither_colours_nor_blanks_at_ends(here):
    assert "\x1b" not in here[1].stdout
    assert all(line == line.rstrip() for line in here[1].stdout.splitlines())


def test_int8_on_four_of_80_gb_does_not_fit_and_both_numbers_say_so(grokctl):
    asked = ("doctor", "--accelerator", "h100-80gb", "--devices", 4)
    as_json, shown = grokctl(*asked, "--json"), grokctl(*asked)

    (plan,) = (
        plan
        for plan in as_json.result["plans"]
        if (plan["mesh"], plan["precision"]) == ("model=4", "int8") and plan["memory_bytes"]
    )
    needed, there = plan["bytes_per_device"], plan["memory_bytes"]
    assert plan["fits"] is False
    assert plan["missing_bytes"] == needed - there > 0
    assert as_json.exit_code == shown.exit_code == 0  # int4 does
    assert as_json.result["best"]["precision"] == "int4"
    assert f"{needed / 1e9:.1f} GB ✗ lacks {(needed - there) / 1e9:.1f} GB" in shown.stdout
    assert f"with {there / 1e9:.1f} GB for a run on each" in shown.stdout


def test_hardware_that_can_run_nothing_is_shown_in_full_and_ends_with_40(grokctl):
    asked = ("doctor", "--devices", 1, "--memory", "80GB")
    as_json, shown = grokctl(*asked, "--json"), grokctl(*asked)

    assert as_json.exit_code == shown.exit_code == 40
    assert as_json.result["ok"] is False
    assert as_json.result["best"] is None
    least = min(
        (
            plan
            for plan in as_json.result["plans"]
            if plan["mesh"] == "model=1" and plan["missing_bytes"]
        ),
        key=lambda plan: plan["missing_bytes"],
    )
    assert "what you can do now" in shown.stdout
    assert "┃ limit" in shown.stdout
    assert f"{least['bytes_per_device'] / 1e9:.1f} GB" in shown.error
    assert f"{least['memory_bytes'] / 1e9:.1f} GB" in shown.error
    assert shown.hint.startswith("grokctl doctor --accelerator")


def test_for_hardware_that_is_not_here_nothing_is_looked_at(grokctl, tmp_path):
    outcome = grokctl("doctor", *EIGHT, "--home", tmp_path / "home", "--json")

    values = outcome.result
    assert outcome.exit_code == 0
    assert outcome.stderr == ""
    assert (values["is_here"], values["checks"], values["machine"]) == (False, [], None)
    assert values["hardware"]["count"] == 8
    assert values["best"]["mesh"] == "model=8"
    assert list(tmp_path.iterdir()) == []


def test_more_context_more_prompts_and_a_smaller_cache_are_reckoned_with(grokctl):
    def cache(*options):
        outcome = grokctl("doctor", *EIGHT, *options, "--json")
        return outcome.result["best"]["cache_bytes"]

    assert cache("--batch", 4) == 4 * cache()
    assert cache("--context", 4096) == cache() / 2
    assert cache("--kv", "int8") < cache()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(["--accelerator", "abacus"], "abacus", id="unknown accelerator"),
        pytest.param(["--memory", "plenty", "--devices", 8], "plenty", id="no size"),
        pytest.param(["--memory", "-1GB", "--devices", 8], "-1GB", id="negative size"),
        pytest.param([*EIGHT, "--context", 10**6], "1000000", id="too long a context"),
        pytest.param([*EIGHT, "--kv", "float7"], "float7", id="unknown cache"),
        pytest.param([*EIGHT, "--slots", 0], "--slots", id="no prompts"),
        pytest.param(["--devices", 8], "memory", id="nothing but a number"),
        pytest.param(["--timeout", 0], "--timeout", id="no time"),
        pytest.param(["--timeout", "inf"], "--timeout", id="for ever"),
        pytest.param([*EIGHT, "--context", 0], "--context 0", id="no context"),
    ],
)
def test_what_cannot_be_meant_is_refused(grokctl, arguments, expected):
    outcome = grokctl("doctor", *arguments)

    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert expected in outcome.error


def test_an_unknown_accelerator_is_answered_with_those_that_are_known(grokctl):
    outcome = grokctl("doctor", "--accelerator", "abacus")

    assert all(known.slug in outcome.error for known in PUBLISHED)
    assert outcome.hint.startswith("grokctl doctor --accelerator ")


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("about", [(), EIGHT], ids=["this machine", "another"])
def test_no_line_is_wider_than_the_terminal_but_those_to_copy(process, tmp_path, columns, about):
    screen = on_a_terminal(process, "doctor", *about, "--home", tmp_path, columns=columns)

    lines = screen.splitlines()
    assert len(lines) > 15
    assert [line for line in lines if len(line) > columns and "→ " not in line] == []
    assert any(line.strip().startswith("→ grokctl ") for line in lines)


def test_where_there_is_ascii_only_words_and_signs_still_say_it(process):
    screen = on_a_terminal(
        *(process, "doctor", "--accelerator", "h100-80gb", "--devices", 4),
        columns=80,
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
    )

    assert screen.isascii()
    assert "?" not in screen
    assert "x lacks" in screen
    assert "+ fits" in screen
    assert "# weights   = cache   + workspace   . free" in screen


def test_a_report_to_paste_holds_nothing_private(process, tmp_path):
    somebody = tmp_path / "home" / "alice"
    somebody.mkdir(parents=True)
    environment = process.environment(
        HOME=str(somebody),
        HTTPS_PROXY="http://bob:opensesame@10.9.8.7:3128",
        XLA_FLAGS="--xla_dump_to=/home/carol/dump --xla_password=opensesame",
        JAX_COORDINATOR_ADDRESS="10.9.8.7:1234",
        HF_TOKEN="hf_" + "opensesame" * 3,
        LIBTPU_INIT_ARGS="\x1b]0;opened\x07",
    )
    home = somebody / "kept"

    shown = process.run("doctor", "-v", "--home", home, env=environment)
    as_json = process.run("doctor", "-v", "--home", home, "--json", env=environment)

    for outcome in (shown, as_json):
        said = outcome.stdout + outcome.stderr
        for private in ("alice", "bob", "carol", "opensesame", "10.9.8.7", "\x1b", str(somebody)):
            assert private not in said, private
        assert not re.search(rf"(?<![\w.-]){re.escape(socket.gethostname())}(?![\w-])", said)
        assert "$GROKCTL_HOME" in said
    for title in ("processor", "memory", "disks", "network and limits", "what you can do now"):
        assert f"\n{title}\n" in shown.stdout


def test_a_broken_jax_is_said_and_breaks_nothing(process, tmp_path):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise ImportError('jaxlib is too old')\n")

    outcome = process.run(
        *("doctor", "--home", tmp_path / "home", "--json"),
        env=process.environment(PYTHONPATH=str(tmp_path)),
    )

    assert outcome.exit_code == 40
    assert "Traceback" not in outcome.stderr
    (check,) = (check for check in outcome.result["checks"] if check["status"] == "fail")
    assert check["name"] == "JAX"
    assert "jaxlib is too old" in check["detail"]
    assert outcome.stderr.splitlines()[-2].startswith(f"error: JAX: {check['detail']}")
    assert {ability["name"]: ability["status"] for ability in outcome.result["abilities"]}[
        "run"
    ] == "fail"


def test_jax_is_asked_in_a_process_of_its_own(process, tmp_path):
    code = (
        "import sys; from grokctl.cli.app import app\n"
        f"try: app(['doctor', '-q', '--home', {str(tmp_path)!r}])\n"
        "finally: print([name for name in ('jax', 'libtorrent') if name in sys.modules])"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        env=process.environment(),
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_object_is_one_line_of_plain_json(process):
    outcome = process.run("doctor", *EIGHT, "--json")

    assert outcome.stdout.count("\n") == 1
    assert json.loads(outcome.stdout, parse_constant=pytest.fail)["ok"] is True


@pytest.mark.parametrize(
    ("where", "name", "status", "code"),
    [
        ("--home", "home", "fail", 40),
        ("GROKCTL_HOME", "home", "fail", 40),
        ("--to", "destination", "fail", 40),
        ("SSL_CERT_FILE", "certificates", "warn", 0),
    ],
)
def test_a_disk_that_never_answers_is_not_waited_for(process, tmp_path, where, name, status, code):
    patience = 8 if code == 0 else 2  # what else is looked at must answer, on a busy machine, too
    with dead(tmp_path / "gone") as gone:
        given = (where, gone) if where.startswith("--") else ()
        named = {} if given else {where: str(gone / "file")}
        outcome = process.run(
            *("doctor", *given, "--timeout", patience, "--json"),
            env=process.environment(**{"GROKCTL_HOME": str(tmp_path / "home"), **named}),
        )

    (check,) = (check for check in outcome.result["checks"] if check["name"] == name)
    assert check["status"] == status
    assert str(gone) in check["detail"]
    assert outcome.exit_code == code
