"""Small limits of a container or a login node: each is a sentence, and none a crash."""

import os
import resource
import shutil
import subprocess
import sys

import pytest
from machines import laptop

from grokctl.cli.app import main
from grokctl.cli.environment import one_thread_of_blas
from grokctl.diagnosis.software import locked_memory, threads
from grokctl.errors import HardwareError
from grokctl.machine import limits
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
    ("kind", "limit", "option"),
    [
        ("RLIMIT_AS", 60_000_000, "-v"),
        ("RLIMIT_AS", 200_000_000, "-v"),
        ("RLIMIT_DATA", 60_000_000, "-d"),
    ],
)
def test_too_little_memory_for_the_libraries_is_named_before_they_end_the_process(
    kind, limit, option
):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, kind, str(limit), "verify", "x"],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 40, done.stderr
    assert f"are too few (ulimit {option})\nhint: ulimit {option} unlimited" in done.stderr
    assert "OpenBLAS" not in done.stderr


def test_a_thread_that_lacks_memory_for_its_stack_is_no_lack_of_threads(monkeypatch):
    near = [limits.MemoryLimit("data segment", "-d", 2**29, 2**29 - 2**20)]
    far = [limits.MemoryLimit("data segment", "-d", 2**40, 2**29)]

    monkeypatch.setattr(limits, "memory_limits", lambda: near)
    assert limits.few_threads("none").hint == "ulimit -d unlimited"
    monkeypatch.setattr(limits, "memory_limits", lambda: far)
    assert limits.few_threads("none").hint.startswith("ulimit -u unlimited")


def test_limits_of_memory_have_what_is_used_of_them(monkeypatch, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("VmPeak:\t 9 kB\nVmSize:\t 3 kB\nVmData:\t 2 kB\n")
    monkeypatch.setattr(limits, "limit_of", lambda kind: 2**20 if kind else None)

    found = limits.memory_limits(tmp_path)

    assert [(each.option, each.used) for each in found] == [("-v", 3072), ("-d", 2048)]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("Resource temporarily unavailable", "ulimit -u unlimited"),
        ("can't start new thread", "ulimit -u unlimited"),
        ("Cannot allocate memory", "grokctl doctor"),
        ("x.so: failed to map segment from shared object", "grokctl doctor"),
    ],
)
def test_words_of_a_library_about_a_limit_are_understood(monkeypatch, words, hint):
    monkeypatch.setattr(limits, "memory_limits", list)

    assert limits.limit_in(words).hint.startswith(hint)
    assert limits.limit_in("something else") is None


def test_a_command_that_needs_more_open_files_names_the_limit(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (24, 24))

    with pytest.raises(HardwareError, match=r"expected at least 64, found 24 \(ulimit -n\)"):
        limits.require_files(64)
    limits.require_files(24)


def test_numpy_starts_no_threads_unless_a_number_was_chosen(monkeypatch):
    name = "OPENBLAS_NUM_THREADS"
    for before, after in (("", "1"), ("7", "7")):
        monkeypatch.setenv(name, before)
        one_thread_of_blas()
        assert os.environ[name] == after


def test_not_even_one_thread_is_a_sentence_too(monkeypatch, capsys):
    def refuse():
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("grokctl.interrupts.install", refuse)
    with pytest.raises(SystemExit) as end:
        main()

    assert end.value.code == 40
    assert capsys.readouterr().err.startswith("error: threads: the system starts no more of them")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ImportError("a.so: failed to map segment"), "memory: the system has no more of it"),
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
