"""How fast a full-width layer of Grok-1 is exported, beside `cp` of as many bytes."""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from reshard import CORES, SLACK, copy, judge, made, size, sync, warm


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to export the same layer."""

    name: str
    """As a row of the table begins."""
    options: tuple[str, ...] = ()
    max_memory: int | None = None
    growth: float = 1.0
    """Bytes of the export by those of the release."""
    goal: float = 0.0
    """Part of the throughput of cp."""


CASES = (
    Case(name="gguf q8_0", goal=0.4),
    Case(name="gguf q8_0, 256 MiB", max_memory=2**28),
    Case(name="hf bf16", options=("--format", "hf"), growth=2.0, goal=0.4),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One export, and the copy of as many bytes beside it."""

    seconds: float
    copy_seconds: float
    nbytes: int
    rss: int
    allowed: int

    @property
    def share(self) -> float:
        """Of the throughput of cp."""
        return self.copy_seconds / self.seconds


def export(source: Path, out: Path, case: Case) -> tuple[float, int]:
    """Export as a user does, and have the disk hold it: seconds, and bytes of memory at most."""
    command = [sys.executable, "-m", "grokctl", "export", str(source), "--out", str(out)]
    command += ["--home", str(out.parent / "home"), "--json", "--quiet", *case.options]
    if case.max_memory is not None:
        command += ["--max-memory", str(case.max_memory)]
    began = time.perf_counter()
    process = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    sync(out)
    seconds = time.perf_counter() - began
    return seconds, int(json.loads(process.stdout.splitlines()[-1])["peak_rss_bytes"])


def sample(source: Path, folder: Path, case: Case) -> Sample:
    """One run, and then a copy of as many bytes."""
    out = folder / "out"
    nbytes = round(case.growth * sum(size(path) for path in source.rglob("*") if path.is_file()))
    warm(source, nbytes)
    allowed = case.max_memory or psutil.virtual_memory().available // 4
    seconds, rss = export(source, out, case)
    written = sum(size(path) for path in out.iterdir() if path.is_file())
    shutil.rmtree(out)
    warm(source, nbytes)
    copy_seconds = copy(source, out, written)
    shutil.rmtree(out)
    return Sample(
        seconds=seconds, copy_seconds=copy_seconds, nbytes=written, rss=rss, allowed=allowed
    )


def report(found: dict[Case, list[Sample]]) -> None:
    print(
        "| what | bytes | s | GB/s | cp and sync | of cp | peak RSS |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for case, samples in found.items():
        seconds = statistics.median(one.seconds for one in samples)
        shares = [one.share for one in samples]
        print(
            f"| {case.name} | {samples[0].nbytes / 1e9:.1f} GB | {seconds:.1f} "
            f"| {samples[0].nbytes / seconds / 1e9:.2f} "
            f"| {statistics.median(one.copy_seconds for one in samples):.1f} s "
            f"| {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f}) "
            f"| {max(one.rss for one in samples) / 1e6:.0f} MB |"
        )
    print()
    for case, samples in found.items():
        if case.goal:
            share = statistics.median(one.share for one in samples)
            judge(f"{case.name}: {case.goal} of cp", ok=share >= case.goal, found=f"{share:.2f}")
    over = max(one.rss - one.allowed for samples in found.values() for one in samples)
    judge("peak RSS less what is allowed", ok=over <= SLACK, found=f"{over / 1e6:.0f} MB")


@contextmanager
def place(source: Path | None, above: Path | None) -> Iterator[tuple[Path, Path]]:
    """What is exported, a new release by default, and a folder for exports of it."""
    if source is None:
        with made(above, 1, copies=4) as folder:
            yield folder / "release", folder
        return
    with tempfile.TemporaryDirectory(prefix="grokctl-bench-", dir=above) as name:
        yield source, Path(name)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: TMPDIR")
    parser.add_argument("--source", type=Path, help="a release, or a ready checkpoint of int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    options = parser.parse_args(arguments)
    print(f"{CORES} cores, {psutil.virtual_memory().total / 1e9:.0f} GB of memory, ", end="")
    print(f"medians of {options.rounds} interleaved rounds, one layer\n")
    found: dict[Case, list[Sample]] = {case: [] for case in CASES[: options.cases]}
    with place(options.source, options.folder) as (source, folder):
        for _ in range(options.rounds):
            for case, samples in found.items():
                samples.append(sample(source, folder, case))
    report(found)


if __name__ == "__main__":
    main()
