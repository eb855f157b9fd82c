"""What `kill -9` costs at any moment of a reshard, and what one takes: memory, and disk."""

import json
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from cuts import contents, journal_of

from grokctl.checkpoint.frames import Compression
from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.release import open_release
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.resharding.plan import ReshardOptions, plan_reshard

MB = 1_000_000
LARGE = replace(MINIATURE, emb_size=480, key_size=32)
"""31 MB a layer; 16 devices can hold it, also in int4."""
SLOWLY = ("--jobs", "1", "--max-memory", "1MB")
JOBS = 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """A reshard as a process of its own, and what an uninterrupted one writes."""

    release: Path
    folder: Path
    options: tuple[str, ...]

    @property
    def out(self) -> Path:
        return self.folder / "home" / "ready" / "out"

    @property
    def command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "grokctl", "reshard", str(self.release)),
            *("--devices", "8", "--home", str(self.folder / "home"), "--out", str(self.out)),
            *self.options,
        ]

    @contextmanager
    def started(self) -> Iterator["subprocess.Popen[str]"]:
        with (
            (self.folder / "log").open("w") as log,
            subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            ) as process,
        ):
            yield process

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def run(self) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.command, capture_output=True, text=True, check=False, timeout=120
        )

    @property
    def written(self) -> int:
        """Bytes of the device files that grow."""
        found = 0
        for path in self.out.parent.glob(".out.*.partial/device-*"):
            try:
                found += path.stat().st_size
            except FileNotFoundError:
                continue  # it was published right now
        return found


@dataclass(kw_only=True)
class Whole:
    """What came of a run that nobody killed."""

    files: dict[str, str]
    nbytes: dict[str, int] = field(default_factory=dict)

    @property
    def written(self) -> int:
        return sum(size for name, size in self.nbytes.items() if name.startswith("device-"))


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("killed") / "release"
    write_miniature(root, replace(LARGE, num_layers=4), tokenizer=False)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def room(tmp_path) -> Iterator[Path]:
    """A folder that does not outlive the test: it holds much."""
    folder = tmp_path / "room"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


FORMS = {
    "int8": ((), {}),
    "zstd": (("--compress", "zstd:1"), {"compression": Compression(1)}),
    "int4": (("--precision", "int4"), {"precision": Precision.INT4}),
}


def job_for(release: Path, folder: Path, form: str) -> Job:
    folder.mkdir()
    return Job(release=release, folder=folder, options=(*FORMS[form][0], *SLOWLY))


def uninterrupted(release: Path, folder: Path, form: str) -> Whole:
    job = job_for(release, folder, form)
    found = job.run()
    assert found.returncode == 0, found.stderr
    nbytes = {path.name: path.stat().st_size for path in job.out.iterdir() if path.is_file()}
    whole = Whole(files=contents(job.out), nbytes=nbytes)
    shutil.rmtree(folder)
    return whole


def await_end(process: "subprocess.Popen[str]") -> None:
    """Let a process run on for a moment."""
    try:
        process.wait(timeout=0.002)
    except subprocess.TimeoutExpired:
        return


def is_whole_if_there(job: Job, whole: Whole) -> bool:
    """Whether the published name is not there, or everything below it."""
    try:
        found = {path.name: path.stat().st_size for path in job.out.iterdir()}
    except FileNotFoundError:
        return not job.out.exists() or job.out.is_dir()
    found.pop("journal", None)  # of no more use, and on its way out
    found.pop(".made-by-grokctl", None)
    found.pop(".grokctl", None)  # the receipt comes when everything is in its place
    return found == whole.nbytes


def not_journalled(job: Job, form: str) -> int:
    """How many tensors are whole in every plain file, and not in the journal."""
    planned = plan_reshard(
        open_release(job.release),
        ReshardOptions(mesh=MeshShape(1, 8), out=job.out, jobs=JOBS, **FORMS[form][1]),
    )
    (partial,) = job.out.parent.glob(".out.*.partial")
    sizes = [(partial / layout.name).stat().st_size for layout in planned.layouts]
    done = min(
        sum(held.end <= size for held in layout.tensors)
        for layout, size in zip(planned.layouts, sizes, strict=True)
    )
    return done - len(journal_of(job.out))


def kept_according_to(text: str) -> int:
    found = re.search(r"continuing after (\d+) of \d+ tensors", text)
    return int(found[1]) if found else 0


@pytest.mark.parametrize(("form", "kills"), [("int8", 10), ("zstd", 3), ("int4", 3)])
def test_kills_at_any_moment_cost_what_was_in_flight_and_change_no_byte(release, room, form, kills):
    whole, job = uninterrupted(release, room / "whole", form), job_for(release, room / "job", form)
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    history = [f"seed {seed}"]
    journalled = 0

    for mark in sorted(rng.uniform(0, 0.9 * whole.written) for _ in range(kills)):
        # so young that it is still starting, or hashes what lies there, or older
        earliest = time.monotonic() + rng.uniform(0, 0.8)
        with job.started() as process:
            while process.poll() is None and job.written < 0.95 * whole.written:
                if job.written >= mark and time.monotonic() >= earliest:
                    break
                assert is_whole_if_there(job, whole), history
                await_end(process)
            process.kill()
        assert process.returncode == -signal.SIGKILL, (history, job.log)
        assert not job.out.exists(), history
        history.append(f"{mark / MB:.0f} MB: killed at {job.written / MB:.0f} MB: {job.log}")
        if "continuing after" in job.log:
            assert kept_according_to(job.log) == journalled, history
        if any(job.out.parent.glob(".out.*.partial")):
            before, journalled = journalled, len(journal_of(job.out))
            assert journalled >= before, history
            if form != "zstd" and journalled:
                # an array for each worker and two that wait, each perhaps with its scales
                assert not_journalled(job, form) <= 2 * (JOBS + 3), history
    with job.started() as process:
        while process.poll() is None:
            assert is_whole_if_there(job, whole), history
            await_end(process)

    assert process.returncode == 0, (history, job.log)
    assert kept_according_to(job.log) == journalled, (history, job.log)
    assert contents(job.out) == whole.files, history
    assert [path.name for path in job.out.parent.iterdir()] == ["out"]
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=job.out, check=True)


def test_of_two_processes_at_once_one_writes_and_the_other_says_so(release, room):
    one = job_for(release, room / "job", "int8")
    errors = room / "errors"

    with (
        errors.open("w") as log,
        one.started() as first,
        subprocess.Popen(one.command, stdout=log, stderr=log) as second,
    ):
        codes = [first.wait(timeout=60), second.wait(timeout=60)]

    assert sorted(codes) == [0, 2]
    said = one.log if codes[0] else errors.read_text()
    assert re.search(r"another grokctl is writing to it|out: exists", said)
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=one.out, check=True)
    assert [path.name for path in one.out.parent.iterdir()] == ["out"]


def test_a_file_that_may_not_grow_stops_the_run_and_with_more_room_it_goes_on(release, room):
    job = job_for(release, room / "job", "int8")
    shell = ["sh", "-c", 'ulimit -f 8000; exec "$@"', "sh", *job.command]

    refused = subprocess.run(shell, capture_output=True, text=True, check=False)
    begun = list(job.out.parent.iterdir())
    with job.started() as limited:
        while limited.poll() is None and not journal_of(job.out):
            await_end(limited)
        resource.prlimit(limited.pid, resource.RLIMIT_FSIZE, (4_096_000, 4_096_000))
    kept = len(journal_of(job.out))
    rest = job.run()

    assert (refused.returncode, begun) == (12, [])
    assert "found a limit of 4.1 MB (ulimit -f)" in refused.stderr
    assert limited.returncode == 12
    assert "File too large" in job.log
    assert kept > 0
    assert rest.returncode == 0
    assert kept_according_to(rest.stderr) == kept


# --- memory


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Iterator[Path]:
    """Half a gigabyte."""
    root = tmp_path_factory.mktemp("large") / "release"
    write_miniature(root, replace(LARGE, num_layers=16), tokenizer=False)
    yield root
    shutil.rmtree(root)


def most_memory_of(process: "subprocess.Popen[str]") -> int:
    """Most bytes that a process ever held, read until it ends."""
    most = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            break
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        most = max(most, int(found[1]) * 1024 if found else 0)
        await_end(process)
    process.wait()
    return most


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--devices", "8"), id="int8"),
        pytest.param(("--devices", "16", "--precision", "int4", "--compress", "zstd:1"), id="int4"),
    ],
)
def test_memory_stays_at_what_was_allowed_and_a_little(large, room, options):
    nbytes = sum(path.stat().st_size for path in large.rglob("tensor*"))
    assert nbytes > 450 * MB
    command = [
        *(sys.executable, "-m", "grokctl", "reshard", str(large), "--out", str(room / "out")),
        *(*options, "--max-memory", "64MB", "--jobs", "4", "--json", "--quiet"),
    ]

    with (room / "result").open("w") as out, subprocess.Popen(command, stdout=out) as run:
        seen = most_memory_of(run)

    assert run.returncode == 0
    result = json.loads((room / "result").read_text())
    assert 10 * MB < seen <= (64 + 300) * MB
    assert 0.8 * seen < result["peak_rss_bytes"] <= (64 + 300) * MB
