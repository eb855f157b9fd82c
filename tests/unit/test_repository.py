"""The repository holds source and small test data, and no results of trials."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_BYTES = {"file": 2**20, "all": 2**24, "shipped": 16_000_000}
SHIPPED = "grokctl/data/miniature"
"""The trained miniature and its torrent: committed once, and again only with another recipe."""
TOP = {".ci", "benchmarks", "docs", "grokctl", "tests"}


def test_what_is_committed_is_small_and_in_its_place():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a clone, or no git")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]
    sizes = {name: (ROOT / name).stat().st_size for name in names}

    assert {name.split("/")[0] for name in names if "/" in name} == TOP
    shipped = [sizes.pop(name) for name in names if name.startswith(SHIPPED)]
    assert 0 < sum(shipped) < MOST_BYTES["shipped"]
    assert [name for name, size in sizes.items() if size > MOST_BYTES["file"]] == []
    assert sum(sizes.values()) < MOST_BYTES["all"]
