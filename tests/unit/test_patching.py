"""Tests that change grokctl in another process notice when a name has moved."""

import subprocess
import sys

import pytest
from patching import patched


def run(code):
    command = [sys.executable, "-c", patched(code), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_name_is_replaced_by_what_comes_from_the_old_one():
    done = run("patch('cli.app:main', lambda old: lambda: (print('before'), old()))")

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "before"


@pytest.mark.parametrize("place", ["cli.app:maine", "clip.app:main", "events:Started.tolal"])
def test_a_name_that_is_gone_ends_the_process(place):
    done = run(f"patch({place!r}, lambda old: old)")

    assert done.returncode == 1
    assert place.split(":")[0].split(".")[0] in done.stderr or "no attribute" in done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import grokctl; grokctl.__version__ = '9'",
        "import grokctl.reshard as r\nr._GONE = 1",
        "from grokctl import inspect\ndef f(): pass\ninspect.inspect = f",
        "from grokctl.checkpoint.value_stats import Part\nPart.stats = None",
        "import grokctl.cli.app\ngrokctl.cli.app.main += 1",
    ],
)
def test_code_that_sets_a_name_without_patch_is_refused(code):
    with pytest.raises(ValueError, match=r"is set without patch\(\)"):
        patched(code)


def test_code_may_set_names_of_others():
    patched("import os, sys\nos.statvfs = None\nsys.stdout = None")
