"""The rehearsal on two narrow layers: the script that `make rehearsal` runs in true size."""

import os
import re
import subprocess
import sys

import pytest
from places import PROJECT

BEGIN, END = "<!-- made by the command above; do not edit -->", "<!-- end -->"


def rehearse(folder, *arguments):
    return subprocess.run(
        [
            *(sys.executable, str(PROJECT / "benchmarks" / "rehearsal.py")),
            *("--small", "--folder", str(folder), *arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "GROKCTL_HOME"},
    )


def test_every_command_copes_and_the_table_goes_where_it_belongs(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    folder = tmp_path / "scratch"
    folder.mkdir()

    outcome = rehearse(folder, "--write", str(page), "--export")

    assert (outcome.returncode, outcome.stderr) == (0, "")
    rows = [line for line in outcome.stdout.splitlines() if line.startswith("| `grokctl ")]
    verbs = [
        re.match(r"\| `grokctl ([a-z]+) grok-1(?: (--[a-z-]+))?", row).groups() for row in rows
    ]
    assert verbs == [
        *(("verify", "--quick"), ("inspect", None), ("inspect", "--tensor"), ("verify", None)),
        *(("verify", None), ("verify", "--rehash"), ("reshard", "--devices")),
        *(("reshard", "--devices"), ("verify", None)),  # the second is of the ready checkpoint
        *(("export", "--dry-run"), ("export", None)),
    ]
    assert all(re.search(r"\| [0-9.]+ s \| [0-9]+ MB \|$", row) for row in rows)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert all(row in text for row in rows)
    assert list(folder.iterdir()) == []


def test_the_page_of_the_rehearsal_has_the_place_for_its_table():
    page = (PROJECT / "docs" / "rehearsal.md").read_text()

    assert page.count(BEGIN) == page.count(END) == 1
    assert "make rehearsal" in page.partition(BEGIN)[0]


def test_a_disk_without_room_is_refused_in_one_sentence(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk here")
    try:
        outcome = rehearse(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)

    assert outcome.returncode == 1
    assert (
        outcome.stderr == f"{folder}: 1,048,576 bytes are free, the rehearsal needs 2,000,000,000\n"
    )
