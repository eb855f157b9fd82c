"""How fast a full-width layer of Grok-1 runs whose experts come from the disk, beside the disk.

Each size of memory is a process of its own. In it, the same reader reads all experts alone before
and after, so that both meet the same disk in the same minute.
"""

import argparse
import json
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

from grokctl.checkpoint.miniature import write_miniature
from grokctl.checkpoint.ready import open_ready
from grokctl.checkpoint.release import open_release
from grokctl.infer import infer
from grokctl.inference.engine import Engine
from grokctl.inference.expert_buffers import Buffer
from grokctl.inference.generation import Request
from grokctl.inference.plan import EngineOptions
from grokctl.inference.stream import Batch
from grokctl.machine.memory import peak_rss
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.sampling import Sampling
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard

ONE = MeshShape(1, 1)
CONFIG = replace(GROK_1, num_layers=1, vocab_size=1024)
DISK = 10.7e9
"""Bytes that are needed at a time."""
SIZES = {"2.3GB": 2_300_000_000, "3.5GB": 3_500_000_000, "4.8GB": 4_800_000_000}
"""Memory for none, two and four of the eight experts."""
LENGTH = 64
"""Tokens of a prompt: all experts are chosen, and two cores compute faster than disks read."""
DECODE, PROMPT = 0.85, 0.9
"""Shares of the disk's own rate to reach."""


def alone(engine: Engine) -> float:
    """Bytes a second that the reader gives by itself, two experts at a time."""
    stream = engine.runner.stream
    assert stream is not None
    file, layers = stream.file, range(CONFIG.num_experts)
    buffers = [Buffer(file.parts(0, 0)) for _ in range(2)]
    before, began, under_way = file.reader.nbytes, time.perf_counter(), []
    for number in layers:
        if len(under_way) == len(buffers):
            file.wait(under_way.pop(0))
        under_way.append(file.ask(buffers[number % 2], file.parts(0, number)))
    for reading in under_way:
        file.wait(reading)
    return (file.reader.nbytes - before) / (time.perf_counter() - began)


def ran(engine: Engine, prompt: list[int], tokens: int) -> Any:
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


def measure(folder: Path, memory: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Rates at one size of memory."""
    engine = infer(open_ready(folder), EngineOptions(mesh=ONE, context=1024, max_memory=memory))
    stream = engine.runner.stream
    assert stream is not None
    prompt = np.random.default_rng(0).integers(CONFIG.vocab_size, size=LENGTH).tolist()
    ran(engine, prompt, 1)  # compiles
    ran(engine, prompt[:2], 2)
    peak = peak_rss()  # before there are more buffers
    decodes, prompts, disks, hits = [], [], [], []
    for _ in range(rounds):
        before = alone(engine)
        decoded = ran(engine, prompt[:1], tokens)
        swept, began = stream.counts, time.perf_counter()
        ran(engine, prompt, 1)
        seconds = time.perf_counter() - began
        swept = stream.counts - swept
        disk = (before + alone(engine)) / 2
        disks.append(disk)
        decodes.append(decoded.disk_bytes / decoded.decode_s / disk)
        prompts.append(swept.disk_bytes / seconds / disk)
        hits.append(decoded.hit_rate)
        assert swept.experts_missed == CONFIG.num_experts - stream.residence.pinned
    return {
        "pinned": stream.residence.pinned,
        "disk": median(disks),
        "decode": median(decodes),
        "prompt": median(prompts),
        "hit": sum(hits) / rounds,
        "planned": stream.residence.total,
        "peak": peak,
        "waits": swept.waited_s / seconds,
        "direct": stream.is_direct,
    }


@contextmanager
def made(given: Path | None) -> Iterator[Path]:
    """The layer as a ready checkpoint, deleted afterwards; or the given one."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        write_miniature(folder / "release", CONFIG, tokenizer=False)
        release = open_release(folder / "release")
        reshard(plan_reshard(release, ReshardOptions(mesh=ONE, out=folder / "ready")))
        yield folder / "ready"


def main() -> None:
    """Print a row for each size of memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ready", type=Path, help="the layer at int8 for one device, if there")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        size = SIZES[options.one]
        print(json.dumps(measure(options.ready, size, options.tokens, options.rounds)))
        return
    columns = "memory | experts kept | disk alone | decode | prompt of 64 | hit | peak, planned"
    print(f"| {columns} |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with made(options.ready) as folder:
        for size in options.sizes.split(","):
            command = [sys.executable, __file__, "--one", size, "--ready", str(folder)]
            command += ["--tokens", str(options.tokens), "--rounds", str(options.rounds)]
            line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(line.splitlines()[-1])
            print(
                f"| {size} | {found['pinned']} of 8 | {found['disk'] / 1e9:.2f} GB/s | "
                f"{found['decode']:.2f} of it | {found['prompt']:.2f} of it | {found['hit']:.0%} | "
                f"{found['peak'] / 1e9:.2f}, {found['planned'] / 1e9:.2f} GB |"
            )
    print(f"goals: decode {DECODE}, prompt {PROMPT} of the disk alone where at most half is kept")


if __name__ == "__main__":
    main()
