"""How fast full-width layers of Grok-1 are cut for devices, beside `cp` of as many bytes."""

import argparse
import json
import mmap
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

LAYER = 5.3e9
"""Bytes of a layer, and of what else a model needs."""
VOCABULARY = 16384
LARGE = 2**22
"""Bytes of a file that is worth copying."""
SLACK = 300 * 10**6
"""Bytes that the interpreter and its libraries may take beside what was allowed."""
CORES = os.cpu_count() or 1
PEERS = {"orbax": "orbax-checkpoint", "safetensors": "safetensors"}
"""Modules, and the packages that hold them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to cut the same layers."""

    precision: str = "int8"
    devices: int = 8
    level: int = 0
    """Of zstd; 0 without."""
    max_memory: int | None = None
    is_cut_again: bool = False
    """Whether the source is a ready checkpoint of 8 devices, and not the release."""
    goal: float = 0.0
    """Part of the throughput of cp."""

    @property
    def name(self) -> str:
        """As a row of the table begins."""
        more = f", zstd:{self.level}" if self.level else ""
        more += f", {self.max_memory >> 20} MiB" if self.max_memory else ""
        count = f"{self.devices} device{'s' * (self.devices > 1)}"
        return f"{self.precision}, {'8 to ' * self.is_cut_again}{count}{more}"


CASES = (
    Case(goal=0.7),
    Case(max_memory=2**26),
    Case(devices=1),
    Case(is_cut_again=True, devices=4),
    Case(precision="bf16", goal=0.5),
    Case(precision="float32"),
    Case(precision="int4", goal=0.5),
    Case(level=3),
    Case(precision="int4", level=3),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run, and the copy beside it."""

    seconds: float
    cpu: float
    rss: int
    nbytes: int = 0
    """What comes in or goes out, whichever is more."""
    ratio: float = 1.0
    """Size of the files, by that of the same without compression."""
    error: float = 0.0
    """Largest relative root mean square error of a weight."""
    allowed: int = 0
    """Bytes of memory."""
    copy_seconds: float = 0.0
    """Of so many bytes, by cp."""

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds

    @property
    def share(self) -> float:
        """Of the throughput of cp."""
        return self.copy_seconds / self.seconds


# --- roles that this file plays as a process of its own


def make(root: Path, layers: int) -> None:
    """Write a release whose weights are normal, and quantised as the released ones are.

    The largest magnitude of the inputs of each output is 127: compression and int4 depend on it.
    """
    from grokctl.checkpoint import pickle_writer, pickles  # noqa: PLC0415
    from grokctl.checkpoint.release_files import released_payloads  # noqa: PLC0415
    from grokctl.model.config import GROK_1  # noqa: PLC0415
    from grokctl.model.tensors import tensor_specs  # noqa: PLC0415

    config = replace(GROK_1, num_layers=layers, vocab_size=VOCABULARY)
    rng = np.random.default_rng(0)
    width = config.emb_size
    normal = rng.standard_normal((width, width), dtype=np.float32)
    block = np.rint(normal * (127 / np.abs(normal).max(axis=0))).astype(np.int8)
    (root / "ckpt-0").mkdir(parents=True)
    for spec in tensor_specs(config):
        weight, scales = released_payloads(spec)
        with (root / "ckpt-0" / spec.file).open("xb") as file:
            if scales is None:
                some = rng.standard_normal(2**20, dtype=np.float32)
                pickle_writer.write(file, np.resize(some, weight.shape))
                continue
            *_, inputs, outputs = weight.shape
            # other neighbours in every copy, so that nothing repeats where zstd looks
            copies = [block[:, rng.permutation(width)] for _ in range(-(-outputs // width))]
            wide = np.concatenate(copies, axis=1)[:, :outputs]
            matrix = wide[np.arange(inputs) % width]
            found = rng.uniform(1e-4, 3e-4, scales.shape).astype(pickles.BFLOAT16)
            pickle_writer.write(
                file, np.ascontiguousarray(np.broadcast_to(matrix, weight.shape)), found
            )
    (root / "config.json").write_text(json.dumps(config.to_dict()))


def cut(source: Path, out: Path, case: Case) -> dict[str, Any]:
    from grokctl.checkpoint.frames import Compression  # noqa: PLC0415
    from grokctl.checkpoint.ready import open_ready  # noqa: PLC0415
    from grokctl.checkpoint.release import open_release  # noqa: PLC0415
    from grokctl.model.placement import MeshShape  # noqa: PLC0415
    from grokctl.model.precision import Precision  # noqa: PLC0415
    from grokctl.reshard import reshard  # noqa: PLC0415
    from grokctl.resharding.plan import ReshardOptions, plan_reshard  # noqa: PLC0415

    is_ready = (source / "grokctl.json").exists()
    planned = plan_reshard(
        open_ready(source, is_streamed=True) if is_ready else open_release(source),
        ReshardOptions(
            mesh=MeshShape(1, case.devices),
            out=out,
            precision=Precision(case.precision),
            compression=Compression(case.level) if case.level else None,
            max_memory=case.max_memory,
        ),
    )
    ready = reshard(planned)
    return {
        "nbytes": max(planned.bytes_in, planned.bytes_out),
        "ratio": ready.nbytes / planned.bytes_out,
        "error": max(ready.manifest.errors.values(), default=0.0),
        "allowed": case.max_memory or psutil.virtual_memory().available // 4,
    }


class Quantized:
    """What the released files call QuantizedWeight8bit."""


class Unpickler(pickle.Unpickler):
    """Builds what the released files name; for our own files only."""

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up, wherever today's numpy keeps it."""
        if name == Quantized.__name__ + "Weight8bit":
            return Quantized
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def unpickled(source: Path) -> dict[str, Any]:
    """Every array of a release, in memory."""
    arrays: dict[str, Any] = {}
    for path in sorted((source / "ckpt-0").iterdir()):
        with path.open("rb") as file:
            found = Unpickler(file).load()
        values = vars(found) if isinstance(found, Quantized) else {"weight": found}
        arrays |= {f"{path.name}.{name}": array for name, array in values.items()}
    return arrays


def save_with_safetensors(source: Path, out: Path) -> None:
    import safetensors.numpy  # noqa: PLC0415

    out.mkdir()
    safetensors.numpy.save_file(unpickled(source), out / "all.safetensors")


def save_with_orbax(source: Path, out: Path) -> None:
    import orbax.checkpoint  # noqa: PLC0415

    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(out, unpickled(source))
        checkpointer.wait_until_finished()


def play(role: str, *arguments: str) -> None:
    paths = [Path(path) for path in arguments[:2]]
    found: dict[str, Any] = {}
    match role:
        case "make":
            make(paths[0], int(arguments[1]))
        case "cut":
            found = cut(*paths, Case(**json.loads(arguments[2])))
        case "unpickle":
            assert unpickled(paths[0])
        case "safetensors":
            save_with_safetensors(*paths)
        case "orbax":
            save_with_orbax(*paths)
        case _:
            raise AssertionError(role)
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps(found | {"cpu": time.process_time(), "rss": peak}))


# --- runs


def run(role: str, *arguments: object, out: Path | None = None) -> dict[str, Any]:
    """Play a role from start to end, and have the disk hold what it wrote."""
    command = [sys.executable, __file__, "--role", role, *map(str, arguments)]
    began = time.perf_counter()
    process = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    if out is not None:
        sync(out)
    seconds = time.perf_counter() - began
    values: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return values | {"seconds": seconds}


def sync(path: Path) -> None:
    subprocess.run(["sync", "-f", path], check=True)  # noqa: S607


def copy(source: Path, out: Path, nbytes: int) -> float:
    """Copy large files of the source until there are so many bytes; seconds for exactly so many."""
    files = [path for path in source.rglob("*") if path.is_file() and size(path) >= LARGE]
    files.sort(key=size, reverse=True)
    out.mkdir()
    script, rest, turn = [], nbytes, 0
    while chosen := [path for path in files if size(path) <= rest]:
        for path in chosen:
            if size(path) <= rest:
                script.append(f"cp --reflink=never '{path}' '{out}/{turn}'")
                rest, turn = rest - size(path), turn + 1
    script.append(f"sync -f '{out}'")
    began = time.perf_counter()
    subprocess.run(["sh", "-ec", "\n".join(script)], check=True)  # noqa: S607
    return (time.perf_counter() - began) * nbytes / (nbytes - rest)


def size(path: Path) -> int:
    return path.stat().st_size


def warm(source: Path, nbytes: float) -> None:
    """Have the source in memory if it fits, and as much free memory that is ours.

    A virtual machine gets memory back from its host only slowly, once it has let it go.
    """
    os.sync()  # forgets what was removed
    buffer = bytearray(2**22)
    for path in source.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    room = min(nbytes + 2**30, psutil.virtual_memory().free - 2**30)
    mmap.mmap(-1, max(2**20, int(room)), flags=flags).close()


def sample(source: Path, folder: Path, case: Case) -> Sample:
    """One run, and then a copy of as many bytes."""
    out = folder / "out"
    growth = {"bf16": 2, "float32": 4}.get(case.precision, 1)
    nbytes = growth * sum(size(path) for path in source.rglob("*") if path.is_file())
    warm(source, nbytes)
    found = run("cut", source, out, json.dumps(asdict(case)))
    shutil.rmtree(out)
    warm(source, nbytes)
    seconds = copy(source, out, found["nbytes"])
    shutil.rmtree(out)
    return Sample(**found, copy_seconds=seconds)


def peer(role: str, source: Path, folder: Path) -> Sample:
    out = folder / "out"
    nbytes = sum(size(path) for path in (source / "ckpt-0").iterdir())
    warm(source, 2 * nbytes)
    if role == "unpickle":
        found = run(role, source)
    else:
        found = run(role, source, out, out=folder)
        shutil.rmtree(out)
    return Sample(**found, nbytes=nbytes)


@contextmanager
def made(folder: Path | None, layers: int, copies: int) -> Iterator[Path]:
    """A folder that holds a release, with room for so many times its size."""
    with tempfile.TemporaryDirectory(prefix="grokctl-bench-", dir=folder) as name:
        free = shutil.disk_usage(name).free
        if free < (needed := copies * layers * LAYER):
            sys.exit(f"{name}: {free / 1e9:.0f} GB are free, {needed / 1e9:.0f} GB are needed")
        run("make", Path(name) / "release", layers)
        yield Path(name)


def measure(folder: Path, chosen: Sequence[Case], rounds: int) -> dict[Case, list[Sample]]:
    release, ready = folder / "release", folder / "ready"
    if any(case.is_cut_again for case in chosen):
        run("cut", release, ready, json.dumps(asdict(Case())))
    found: dict[Case, list[Sample]] = {case: [] for case in chosen}
    for turn in range(rounds):
        for case in chosen[:: 1 - 2 * (turn % 2)]:
            source = ready if case.is_cut_again else release
            found[case].append(sample(source, folder, case))
    return found


# --- report


def median(samples: Sequence[Sample], value: Callable[[Sample], float]) -> float:
    return statistics.median(map(value, samples))


def report(found: dict[Case, list[Sample]]) -> None:
    print(
        "| what | bytes | s | CPU s | GB/s | of cp | peak RSS | allowed | compressed to | error |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for case, samples in found.items():
        last = samples[-1]
        shares = [one.share for one in samples]
        print(
            f"| {case.name} | {last.nbytes / 1e9:.1f} GB "
            f"| {median(samples, lambda one: one.seconds):.1f} "
            f"| {median(samples, lambda one: one.cpu):.1f} "
            f"| {median(samples, lambda one: one.rate) / 1e9:.2f} "
            f"| {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f}) "
            f"| {max(one.rss for one in samples) / 1e6:.0f} MB | {last.allowed / 1e6:.0f} MB "
            f"| {f'{last.ratio:.3f}' if case.level else ''} "
            f"| {f'{last.error:.2%}' if last.error else '0'} |"
        )
    copies = [one.nbytes / one.copy_seconds for samples in found.values() for one in samples]
    print(
        f"\ncp and sync: {statistics.median(copies) / 1e9:.2f} GB/s "
        f"({min(copies) / 1e9:.2f} to {max(copies) / 1e9:.2f})\n"
    )
    for case, samples in found.items():
        if case.goal:
            share = median(samples, lambda one: one.share)
            judge(f"{case.name}: {case.goal} of cp", ok=share >= case.goal, found=f"{share:.2f}")
    over = max(one.rss - one.allowed for samples in found.values() for one in samples)
    judge("peak RSS less what is allowed", ok=over <= SLACK, found=f"{over / 1e6:.0f} MB")


def judge(name: str, *, ok: bool, found: str) -> None:
    print(f"{'PASS' if ok else 'FAIL'}  {name}: {found}")


def report_peers(found: dict[str, list[Sample]], ours: list[Sample]) -> None:
    middle = median(ours, lambda one: one.seconds)
    print(
        "\n| beside it, of the same arrays | seconds | GB/s | peak RSS | grokctl, int8 on 8, is |\n"
        "| --- | ---: | ---: | ---: | ---: |"
    )
    names = {
        "unpickle": "unpickled into memory, nothing written",
        "safetensors": "unpickled, safetensors.numpy.save_file",
        "orbax": "unpickled, orbax StandardCheckpointer.save",
    }
    for role, samples in found.items():
        seconds = median(samples, lambda one: one.seconds)
        print(
            f"| {names[role]} | {seconds:.1f} | {median(samples, lambda one: one.rate) / 1e9:.2f} "
            f"| {max(one.rss for one in samples) / 1e6:,.0f} MB | {seconds / middle:.1f}x |"
        )


def peers() -> Iterator[str]:
    yield "unpickle"
    for module, package in PEERS.items():
        try:
            __import__(module)
        except ImportError:
            print(f"{module} is left out: pip install {package}")
        else:
            yield module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: TMPDIR")
    parser.add_argument("--layers", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", action="store_true", help="also those who save with a library")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        play(*options.role)
        return
    print(f"{CORES} cores, {psutil.virtual_memory().total / 1e9:.0f} GB of memory, ", end="")
    print(f"medians of {options.rounds} interleaved rounds, layers: {options.layers[0]}\n")
    with made(options.folder, options.layers[0], copies=7) as folder:
        found = measure(folder, CASES, options.rounds)
        report(found)
        if options.peers:
            roles = list(peers())
            source = folder / "release"
            shutil.rmtree(folder / "ready")
            theirs = {role: [peer(role, source, folder)] for role in roles}
            for _ in range(options.rounds - 1):
                for role in roles:
                    theirs[role].append(peer(role, source, folder))
            report_peers(theirs, found[CASES[0]])
    lines = {options.layers[0]: found[CASES[0]]}
    for layers in options.layers[1:]:
        with made(options.folder, layers, copies=3) as folder:
            lines[layers] = measure(folder, CASES[:1], options.rounds)[CASES[0]]
    if len(lines) > 1:
        report_lines(lines)


def report_lines(found: dict[int, list[Sample]]) -> None:
    """Whether twice the layers take twice as long."""
    print(
        f"\n| layers, {CASES[0].name} | seconds | seconds a layer | of cp | peak RSS |\n"
        "| --- | ---: | ---: | ---: | ---: |"
    )
    for layers, samples in found.items():
        seconds = median(samples, lambda one: one.seconds)
        print(
            f"| {layers} | {seconds:.1f} | {seconds / layers:.2f} "
            f"| {median(samples, lambda one: one.share):.2f} "
            f"| {max(one.rss for one in samples) / 1e6:.0f} MB |"
        )


if __name__ == "__main__":
    main()
