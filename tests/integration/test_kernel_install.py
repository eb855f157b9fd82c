"""What pip installs has the kernel: as sources, or compiled, for a machine without a compiler."""

import json
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from places import PROJECT

from grokctl.native.build import build_here, install, installed
from grokctl.native.compiler import BuildError, find_compiler

pytestmark = pytest.mark.slow
COMPILER = find_compiler(os.environ)


def supported() -> bool:
    try:
        build_here()
    except BuildError:
        return False
    return COMPILER is not None


with_compiler = pytest.mark.skipif(not supported(), reason="no compiler, or no kernel for this")


def wheel_of(tmp_path: Path, **variables: str) -> Path:
    """The wheel of this project, as pip makes it; of a copy, so that no build is found in it."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path / "wheels"), str(PROJECT)]
    subprocess.run(command, env={**os.environ, **variables}, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").iterdir()
    return wheel


def report_of(wheel: Path, tmp_path: Path, *, path: str) -> dict[str, object]:
    """What the installed package says of its kernel, with a home of its own."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    caches = tmp_path / "home/cache/native"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "grokctl.native.report", str(caches), "0", "1"],
        env={**os.environ, "PYTHONPATH": str(site), "PATH": path},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


@with_compiler
def test_a_plain_wheel_is_for_every_machine_and_compiles_at_the_first_run(tmp_path):
    wheel = wheel_of(tmp_path)

    said = report_of(wheel, tmp_path, path=os.environ["PATH"])

    assert wheel.name.endswith("-py3-none-any.whl")
    assert "instruction_set" in said
    assert len(list((tmp_path / "home/cache/native").glob("*/*.so"))) == 1


def test_without_a_compiler_a_plain_wheel_says_what_to_install(tmp_path):
    (tmp_path / "none").mkdir()

    said = report_of(wheel_of(tmp_path), tmp_path, path=str(tmp_path / "none"))

    assert "no C++ compiler" in said["error"] or "there is none for" in said["error"]
    assert not (tmp_path / "home").exists()


@with_compiler
def test_a_wheel_with_the_kernel_needs_no_compiler(tmp_path):
    (tmp_path / "none").mkdir()
    folder, tag = tmp_path / "library", f"linux_{platform.machine()}"
    install(COMPILER, platform.machine(), folder)

    wheel = wheel_of(tmp_path, GROKCTL_WHEEL=f"{folder}:{tag}")
    said = report_of(wheel, tmp_path, path=str(tmp_path / "none"))

    assert wheel.name.endswith(f"-py3-none-{tag}.whl")
    assert "instruction_set" in said
    assert not (tmp_path / "home").exists()
    assert installed(tmp_path / "site/grokctl/native/built") is not None
