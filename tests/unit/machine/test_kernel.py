"""Whether the kernel is there is asked of a process of its own, which may say or do anything."""

import json
import sys

import pytest

from grokctl.machine.facts import Found
from grokctl.machine.host import probe_bytes
from grokctl.machine.kernel import _parsed, probe_kernel
from grokctl.native.binary import SWITCH, NoKernelError
from grokctl.native.library import load


def test_the_kernel_says_its_instruction_set_and_how_fast_it_reads(tmp_path):
    try:
        library = load()
    except NoKernelError as error:
        pytest.skip(str(error))

    found = probe_kernel(tmp_path, nbytes=2**26)

    assert found.found is Found.OK
    assert found.instruction_set == library.instruction_set
    assert 1e8 < found.rate < 1e13
    assert list(tmp_path.iterdir()) == []


def test_the_reason_of_its_absence_and_the_fix_come_back(tmp_path, monkeypatch):
    monkeypatch.setenv(SWITCH, "off")

    found = probe_kernel(tmp_path, nbytes=0)

    assert (found.found, found.reason, found.fix) == (
        Found.ABSENT,
        f"{SWITCH}=off",
        f"unset {SWITCH}",
    )


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo nonsense; echo 'Illegal instruction' >&2; exit 1", "Illegal instruction"),
        ("kill -ILL $$", "it ended with status -4"),
        ("echo '[]'", "it ended with status 0"),
        ("echo '{\"rate\": 1.0}'", "it ended with status 0"),
    ],
)
def test_a_process_that_answers_nothing_is_a_fact(tmp_path, monkeypatch, script, reason):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))

    found = probe_kernel(tmp_path, nbytes=0)

    assert (found.found, found.reason) == (Found.FAILED, reason)


def test_without_python_there_is_a_reason_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    found = probe_kernel(tmp_path, nbytes=0)

    assert found.reason == "Python does not start: No such file or directory"


@pytest.mark.parametrize("rate", [None, 0.0, -1.0, float("inf"), float("nan"), 1e15, 1, "fast"])
def test_a_rate_that_no_memory_has_is_none(rate):
    values = json.loads(json.dumps({"instruction_set": "avx2", "rate": rate}))

    assert _parsed(values).rate is None


def test_little_memory_is_not_measured_with():
    assert probe_bytes(None) == 0
    assert probe_bytes(2**27) == 0
    assert probe_bytes(2**29) == 2**27
    assert probe_bytes(2**50) >= 2**28
