"""The Makefile's environments, installed from a folder of wheels in the place of an index."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import PROJECT, TESTS
from wheels import write_wheel

PYPROJECT = """
[project]
name = "grokctl"
version = "0"
dependencies = ["sprout"]
[build-system]
requires = []
build-backend = "wheels"
backend-path = ["."]
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The Makefile over a lock of two pins, one of which now has a newer release."""
    index, project = tmp_path / "index", tmp_path / "project"
    index.mkdir()
    project.mkdir()
    write_wheel(index, "soil", "2.0", extra="rich")
    sprout = write_wheel(index, "sprout", "1.0", "soil[rich]>=1")
    soil = write_wheel(index, "soil", "1.0", extra="rich")
    stone = write_wheel(index, "stone", "1.0", "soil")
    shutil.copy(PROJECT / "Makefile", project)
    shutil.copy(TESTS / "support/wheels.py", project)
    (project / "pyproject.toml").write_text(PYPROJECT)
    kernel = project / "grokctl/native"
    kernel.mkdir(parents=True)
    (kernel / "sources.py").touch()
    (kernel / "__main__.py").write_text("open('compiled', 'a').write('.')\n")
    (project / "requirements.lock").write_text(pin(sprout) + pin(soil))
    (project / "requirements-fuzz.lock").write_text(pin(stone))
    return project


def pin(wheel: Path) -> str:
    name, version, _ = wheel.name.split("-", 2)
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"


def make(project: Path, *targets: str) -> subprocess.CompletedProcess[str]:
    ours = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PIP"))
    }
    offline = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_FIND_LINKS": str(project.parent / "index"),
        "PIP_NO_INDEX": "1",
    }
    return subprocess.run(
        ["make", f"PYTHON={sys.executable}", *targets],
        cwd=project,
        env=ours | offline,
        capture_output=True,
        check=False,
        text=True,
    )


def installed(project: Path) -> set[str]:
    found = {path.stem for path in project.glob(".venv/lib/*/site-packages/*.dist-info")}
    return {name for name in found if not name.startswith(("pip-", "setuptools-"))}


def test_the_lock_is_installed_whatever_is_newer_and_nothing_else_stays(project):
    made = make(project, "install", ".venv/.fuzz")

    assert made.returncode == 0, made.stderr
    assert installed(project) == {"grokctl-0", "soil-1.0", "sprout-1.0", "stone-1.0"}

    lock = project / "requirements.lock"
    lock.write_text(re.sub(r"soil==.*\n", "", lock.read_text()))
    made = make(project, "install")

    assert made.returncode != 0
    assert "sprout 1.0 requires soil, which is not installed." in made.stdout
    assert installed(project) == {"grokctl-0", "sprout-1.0"}
    assert not (project / ".venv/.ready").exists()


def test_no_target_lets_pip_choose():
    targets = re.findall(r"^([\w-]+):.*##", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    listed = subprocess.run(
        ["make", "--dry-run", "--always-make", *targets],
        cwd=PROJECT,
        capture_output=True,
        check=True,
        text=True,
    )
    installs = [line for line in listed.stdout.splitlines() if "pip install" in line]

    assert installs
    for line in installs:
        assert "--no-deps" in line
        assert "--require-hashes" in line or line.endswith("--no-build-isolation --editable .")


def test_the_kernel_is_compiled_once_and_again_after_a_change(project):
    for _ in range(2):
        assert make(project, "install").returncode == 0
    assert (project / "compiled").read_text() == "."
    later = time.time() + 2
    os.utime(project / "grokctl/native/sources.py", (later, later))

    make(project, "install")

    assert (project / "compiled").read_text() == ".."
