"""An export is killed at any moment, interrupted in a terminal, or its disk fills up meanwhile."""

import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cuts import contents
from exports import WIDE, exported
from mounts import tmpfs

from grokctl.checkpoint.miniature import write_miniature
from grokctl.checkpoint.release import Release, open_release
from grokctl.errors import DiskFullError
from grokctl.events import Advanced

KILLS = 20
IN_THE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
FORMS = {"gguf": "q8_0", "hf": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """An export as a process of its own."""

    release: Release
    out: Path
    form: str

    @property
    def command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "grokctl", "export", str(self.release.root)),
            *("--format", self.form, "--out", str(self.out), "--split", "6MB"),
            *("--home", str(self.out.parent / "home"), "--jobs", "1", "--max-memory", "1MB"),
        ]

    @property
    def written(self) -> int:
        """Bytes of the files that grow."""
        found = 0
        for path in self.out.parent.glob(".out.*.partial/*"):
            with suppress(FileNotFoundError):  # it was published right now
                found += path.stat().st_size
        return found

    def await_written(self, process: "subprocess.Popen[bytes]", nbytes: float) -> None:
        while process.poll() is None and self.written < nbytes:
            time.sleep(0.002)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Release:
    root = tmp_path_factory.mktemp("release") / "wide"
    write_miniature(root, replace(WIDE, attn_output_multiplier=WIDE.key_size**-0.5))
    return open_release(root)


@pytest.fixture
def place(tmp_path) -> Iterator[Path]:
    """A folder with nothing but an export in it."""
    folder = tmp_path / "place"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", FORMS)
def test_kills_at_random_moments_change_no_byte(release, place, form):
    job = Job(release=release, out=place / "out", form=form)
    subprocess.run(job.command, check=True, capture_output=True)
    whole = contents(job.out)
    nbytes = sum(path.stat().st_size for path in job.out.iterdir() if path.is_file())
    shutil.rmtree(job.out)
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    history, kills = [f"seed {seed}"], 0

    while kills < KILLS:
        mark, earliest = rng.uniform(0, nbytes), time.monotonic() + rng.uniform(0, 1)
        with subprocess.Popen(job.command, stdout=-3, stderr=-3) as process:
            job.await_written(process, mark)
            while process.poll() is None and time.monotonic() < earliest:
                time.sleep(0.002)
            process.kill()
        history.append(f"{process.returncode}: {job.written} of {nbytes}")
        assert process.returncode in {-signal.SIGKILL, 0}, history
        kills += process.returncode == -signal.SIGKILL
        if job.out.exists():
            assert contents(job.out) == whole, history
            shutil.rmtree(job.out)

    subprocess.run(job.command, check=True, capture_output=True)
    assert contents(job.out) == whole, history
    assert {path.name for path in place.iterdir()} <= {"out", "home"}
    sys.stdout.write("\n".join(history))


def test_ctrl_c_in_a_terminal_leaves_what_the_same_command_continues(release, place):
    job = Job(release=release, out=place / "out", form="gguf")
    terminal, inside = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", IN_THE_TERMINAL, *job.command],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    ) as process:
        os.close(inside)
        job.await_written(process, 3 * 10**6)
        os.write(terminal, b"\x03")
        said = b""
        with suppress(OSError):  # the other side has closed it
            while part := os.read(terminal, 2**16):
                said += part
    os.close(terminal)
    rest = subprocess.run(job.command, capture_output=True, text=True, check=False)

    assert process.returncode == 130
    assert b"resumes where it stopped" in said
    assert b"Traceback" not in said
    assert rest.returncode == 0
    assert "continuing after" in rest.stderr
    again = subprocess.run(job.command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_a_disk_that_fills_up_meanwhile_stops_the_export_and_with_room_it_goes_on(tmp_path):
    one = replace(WIDE, num_layers=4)
    write_miniature(tmp_path / "wide", one)
    source = open_release(tmp_path / "wide")
    whole = contents(exported(source, tmp_path / "whole").root)

    with tmpfs(tmp_path / "disk", "size=16M") as disk:
        out, filler = disk / "out", disk / "filler"

        def fill_up(event):
            if isinstance(event, Advanced) and event.done > 10**6 and not filler.exists():
                data = bytes(shutil.disk_usage(disk).free - 2**20)
                filler.write_bytes(data)

        with pytest.raises(DiskFullError):
            exported(source, out, observe=fill_up, max_memory=10**6, jobs=1)
        assert not out.exists()
        filler.unlink()

        assert contents(exported(source, out).root) == whole
