"""Small limits of a container or a login node: each is a sentence, and none a crash."""

import os
import resource
import shutil
import subprocess
import sys

import pytest
from machines import laptop

from grokctl.diagnosis.software import locked_memory, threads
from grokctl.machine.limits import require_threads, startable_threads, thread_limits

LIMITED = """
import resource, sys
kind, limit = getattr(resource, sys.argv[1]), int(sys.argv[2])
resource.setrlimit(kind, (limit, limit))
sys.argv = ["grokctl", *sys.argv[3:]]
from grokctl.cli.app import main
main()
"""


_CAPABILITY = "+dac_override"
_OTHER_USER = ["setpriv", "--reuid", "64321", "--clear-groups"]
_OTHER_USER += ["--inh-caps", _CAPABILITY, "--ambient-caps", _CAPABILITY]
"""Limits on threads do not hold for root; this user reads all that root can."""


def limited(tmp_path, kind, limit, *command):
    """A command in a process of a user of its own, with a limit."""
    environment = os.environ | {"GROKCTL_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)}
    return subprocess.run(
        [*_OTHER_USER, sys.executable, "-c", LIMITED, kind, str(limit), *map(str, command)],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def test_threads_are_counted_by_starting_them_and_all_end():
    assert startable_threads(20) == 20
    require_threads(20)


def test_limits_are_named_where_they_are_set(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    (tmp_path / "sys/fs/cgroup/a/b").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/a/pids.max").write_text("25\n")
    (tmp_path / "sys/fs/cgroup/a/pids.current").write_text("24\n")
    (tmp_path / "sys/fs/cgroup/a/b/pids.max").write_text("max\n")

    assert "pids.max 25 of the cgroup, 24 in use" in list(thread_limits(tmp_path))


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs a user of its own"
)
@pytest.mark.parametrize(
    "command",
    [["run", "--token-ids", "1"], ["score", "--token-ids", "1"], ["bench"], ["fetch"]],
    ids=lambda command: command[0],
)
def test_a_command_that_needs_more_threads_says_so_before_it_begins(tmp_path, command):
    outcome = limited(tmp_path, "RLIMIT_NPROC", 10, *command)

    assert outcome.returncode == 40, outcome.stderr
    assert "error: threads: expected " in outcome.stderr
    assert "ulimit -u 10" in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("can't start new thread"), "threads: the system starts no more of them"),
        (MemoryError(), "memory: the system has no more of it"),
    ],
)
def test_a_limit_that_python_meets_is_a_sentence(monkeypatch, error, words):
    from typer.testing import CliRunner  # noqa: PLC0415

    from grokctl.cli.app import app  # noqa: PLC0415

    def refuse(*_args, **_options):
        raise error

    monkeypatch.setattr("grokctl.checkpoint.finding.find_checkpoint", refuse)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)

    outcome = CliRunner().invoke(app, ["verify", "x"])

    assert outcome.exit_code == 40
    assert words in outcome.stderr


def test_doctor_checks_threads_and_locked_memory():
    few = laptop(threads=9, thread_limits=("ulimit -u 10",), locked_memory=65536)
    enough = laptop(threads=64, locked_memory=65536)

    (bad,) = threads(few)
    (good,) = threads(enough)
    (locked,) = locked_memory(few)

    assert (bad.status, good.status, locked.status) == ("fail", "ok", "ok")
    assert "9 can be started" in bad.detail
    assert "ulimit -u 10" in bad.detail
    assert bad.fix == "ulimit -u unlimited"


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs a user of its own"
)
def test_an_address_space_in_which_jax_would_abort_is_named(tmp_path):
    outcome = limited(tmp_path, "RLIMIT_AS", 1_500_000_000, "score", "--token-ids", "1")

    assert outcome.returncode == 40, outcome.stderr
    assert "error: address space: 1.5 GB" in outcome.stderr
    assert "hint: ulimit -v unlimited" in outcome.stderr
