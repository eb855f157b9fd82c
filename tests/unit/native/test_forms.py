"""Every form of the kernel without JAX, also of another architecture in an emulator."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from grokctl.native.compiler import find_compiler
from grokctl.native.sources import FLAGS, FOLDER, flags_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

DRIVER = Path(__file__).with_name("equality.cc")
CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")


def forms_of(compiler, architecture, folder, *flags, run=()):
    """The forms that ran, after all of their products were right."""
    sources = {path: own for path, own in flags_of(architecture).items() if path.stem != "handlers"}
    sources[DRIVER] = (*FLAGS, f"-I{FOLDER}")
    objects = [str(folder / f"{path.stem}.o") for path in sources]
    for (path, own), made in zip(sources.items(), objects, strict=True):
        subprocess.run([*compiler, *own, *flags, "-c", path, "-o", made], check=True)
    program = folder / "equality"
    subprocess.run([*compiler, "-pthread", *flags, *objects, "-o", program], check=True)
    done = subprocess.run([*run, program], check=True, capture_output=True, text=True)
    return [line.partition(":")[0] for line in done.stdout.splitlines()]


def test_every_form_that_runs_here_is_right(tmp_path):
    compiler = find_compiler(os.environ)
    if compiler is None or platform.machine() not in {"x86_64", "aarch64"}:
        pytest.skip("no compiler or no forms")

    assert "portable" in forms_of(compiler.command, platform.machine(), tmp_path)


@pytest.mark.skipif(not (CROSS and EMULATOR), reason="no compiler for aarch64, or no emulator")
def test_every_form_for_aarch64_is_right_in_an_emulator(tmp_path):
    emulator = (EMULATOR, "-cpu", "max")

    found = forms_of([CROSS], "aarch64", tmp_path, "-static", run=emulator)

    assert found == ["neon_i8mm", "neon_dotprod", "portable"]
