"""How fast full-width layers of Grok-1 run whose experts come from the disk, beside the disk.

Each run is a process of its own in a memory cgroup of its own, so it needs root. The reader that
streams also reads experts alone, before and after each run, so that both meet the same disk in the
same minute; the same layers in mapped files, as they were before, are run in the same cgroup.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from grokctl import infer as stage
from grokctl.checkpoint.miniature import write_miniature
from grokctl.checkpoint.ready import open_ready
from grokctl.checkpoint.release import open_release
from grokctl.inference.engine import Engine
from grokctl.inference.expert_stream import ExpertStream
from grokctl.inference.generation import BatchStats, Request
from grokctl.inference.plan import EngineOptions
from grokctl.inference.stream import Batch
from grokctl.machine.memory import peak_rss
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.sampling import Sampling
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard
from grokctl.system import cgroup_folders

ONE = MeshShape(1, 1)
VOCABULARY = 1024
LENGTHS = (64, 512)
"""Tokens of the prompts: both choose every expert, and two cores compute the first faster than
disks read."""
GOALS = "decode 0.85, prompt 0.9 of the disk alone; hits within 3 points of those planned"


def alone(stream: ExpertStream) -> float:
    """Bytes a second that the reader gives by itself, two experts at a time."""
    file, config = stream.file, stream.residence.config
    keys = [(layer, n) for layer in range(config.num_layers) for n in range(config.num_experts)]
    buffers = stream._free[:2]  # noqa: SLF001 (there is no memory for others)
    before, began, under_way = file.reader.nbytes, time.perf_counter(), []
    for turn, key in enumerate(keys[:8]):
        if len(under_way) == len(buffers):
            file.wait(under_way.pop(0))
        under_way.append(file.ask(buffers[turn % 2], file.parts(*key)))
    for reading in under_way:
        file.wait(reading)
    return (file.reader.nbytes - before) / (time.perf_counter() - began)


def ran(engine: Engine, prompt: list[int], tokens: int) -> BatchStats:
    """The statistics of one sequence."""
    request = Request(
        prompt=tuple(prompt),
        sampling=Sampling(temperature=1, seed=1),
        max_tokens=tokens,
        ignore_eos=True,
        cache_prompt=False,
    )
    batch = Batch(engine.scheduler, [request])
    list(batch)
    return batch.stats


def decoded(engine: Engine, tokens: list[int]) -> float:
    """Seconds to decode given tokens: a model of random weights would repeat its own for ever."""
    began = time.perf_counter()
    for position, token in enumerate(tokens):
        engine.runner.decode([0], [token], [position]).on_host()
    return time.perf_counter() - began


def from_disk() -> int:
    """Bytes that this process has had read from disks."""
    fields = Path("/proc/self/io").read_text().split()
    return int(fields[fields.index("read_bytes:") + 1])


def measured(
    folder: Path, tokens: int, rounds: int, longest: int, cache: Path | None, *, is_mapped: bool
) -> dict[str, Any]:
    """Rates in the memory that this process has."""
    if is_mapped:
        stage.residence_of = lambda *_: None  # type: ignore[assignment]
    options = EngineOptions(mesh=ONE, context=1024, compilation_cache=cache)
    engine = stage.infer(open_ready(folder), options)
    stream = engine.runner.stream
    generator = np.random.default_rng(0)
    lengths = [length for length in LENGTHS if length <= longest]
    prompts = [generator.integers(VOCABULARY, size=length).tolist() for length in lengths]
    for prompt in prompts:
        ran(engine, prompt, 2)  # compiles
    found: dict[str, Any] = {"peak": peak_rss()}
    rows: dict[str, list[float]] = {}

    def note(**values: float) -> None:
        for name, value in values.items():
            rows.setdefault(name, []).append(value)

    for _ in range(rounds):
        disk = alone(stream) if stream else 0.0
        read, misses = from_disk(), stream.counts if stream else None
        seconds = decoded(engine, generator.integers(VOCABULARY, size=tokens).tolist())
        note(token_s=seconds / tokens, token_read=(from_disk() - read) / tokens)
        if stream and misses:
            counted = stream.counts - misses
            note(overread=(from_disk() - read) / counted.disk_bytes, hit=counted.hit_rate or 0.0)
            disk = (disk + alone(stream)) / 2
            note(disk=disk, decode=counted.disk_bytes / seconds / disk)
        for prompt in prompts:
            began, misses = time.perf_counter(), stream.counts if stream else None
            ran(engine, prompt, 1)
            seconds, name = time.perf_counter() - began, f"prompt{len(prompt)}"
            note(**{f"{name}_s": seconds})
            if stream and misses:
                counted = stream.counts - misses
                assert counted.disk_bytes == stream.residence.swept
                after = alone(stream)
                note(**{name: counted.disk_bytes / seconds / ((disk + after) / 2)})
                note(**{f"{name}_waits": counted.waited_s / seconds})
                disk = after
    found |= {name: median(values) for name, values in rows.items()}
    if stream:
        residence = stream.residence
        found |= {"planned": residence.total, "pinned": residence.pinned}
        found |= {"experts": residence.experts, "expected": residence.hit_rate}
    return found


@contextmanager
def made(given: Path | None, layers: int) -> Iterator[Path]:
    """The layers as a ready checkpoint, deleted afterwards; or the given one."""
    if given is not None:
        yield given
        return
    config = replace(GROK_1, num_layers=layers, vocab_size=VOCABULARY)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        write_miniature(folder / "release", config, tokenizer=False)
        release = open_release(folder / "release")
        reshard(plan_reshard(release, ReshardOptions(mesh=ONE, out=folder / "ready")))
        yield folder / "ready"


@contextmanager
def limited_to(nbytes: int) -> Iterator[Path]:
    """A memory cgroup with a limit, below our own; removed afterwards."""
    root = Path("/sys/fs/cgroup")
    for controller, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        mount = root / "memory" if controller else root
        for own in cgroup_folders(Path("/"), controller, mount):
            folder = own / f"grokctl-{os.getpid()}"
            try:
                folder.mkdir()
                (folder / limit).write_text(str(nbytes))
            except OSError:
                if folder.is_dir():
                    folder.rmdir()
                continue
            try:
                yield folder
            finally:
                folder.rmdir()
            return
    raise SystemExit("no memory cgroup can be made here: run it as root")


def run_in(folder: Path, size: str, options: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Measure in a process and a cgroup of their own, of which no page is cached at its start."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:  # pages that others have read would count for them
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with limited_to(int(float(size) * 1e9)) as group:
        join = 'echo $$ >"$0"/cgroup.procs && exec "$@"'
        command = ["sh", "-c", join, str(group), sys.executable, __file__, "--one", mode]
        command += ["--ready", str(folder)]
        command += ["--tokens", str(options.tokens), "--rounds", str(options.rounds)]
        command += ["--longest", str(options.longest)]
        command += ["--cache", str(options.cache)] if options.cache else []
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def main() -> None:
    """Print a row for each size of memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ready", type=Path, help="the layers at int8 for one device, if there")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="6,10,16", help="GB of memory")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="tokens of a prompt")
    parser.add_argument("--cache", type=Path, help="for compiled programs")
    parser.add_argument("--modes", default="streamed,mapped")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        given = (options.ready, options.tokens, options.rounds, options.longest, options.cache)
        print(json.dumps(measured(*given, is_mapped=options.one == "mapped")))
        return
    with made(options.ready, options.layers) as folder:
        for size in options.sizes.split(","):
            for mode in options.modes.split(","):
                found = run_in(folder, size, options, mode)
                values = (f"{name} {value:.4g}" for name, value in found.items())
                print(f"{size} GB, {mode}: {', '.join(values)}", flush=True)
    print(f"goals: {GOALS}")


if __name__ == "__main__":
    main()
