"""How fast full-width layers of Grok-1 load and run, beside what this machine reads and multiplies.

The second layer (on an accelerator, every one of as many as fit) is the first one again: more than
a gigabyte lies between two readings of a weight, so no cache holds it.
"""

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _llama import Peer, llama
from _operands import SLOWER, both_operands, chosen_over_other
from _reference import run_reference

from grokctl.bench import RUN_DEFAULTS
from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.ready import ReadyCheckpoint, open_ready
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.tensor_source import LogicalTensor, Slices, Storage
from grokctl.infer import infer
from grokctl.inference.chunks import Chunk, chunks
from grokctl.inference.compiled_steps import Head
from grokctl.inference.devices import find_devices, has_fast_bfloat16, memory_bandwidth
from grokctl.inference.engine import Engine
from grokctl.inference.plan import EngineOptions
from grokctl.model.axes import MODEL_AXIS
from grokctl.model.config import GROK_1, GrokConfig
from grokctl.model.matmul import project
from grokctl.model.parameters import Matrix
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.model.sampling import Sampling
from grokctl.model.scores import scores
from grokctl.model.step_spec import StepShape
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard

ONE = MeshShape(1, 1)
CONFIG = replace(GROK_1, num_layers=1, vocab_size=1024)
MATRICES = ("gate", "up", "down")
EXPERT = len(MATRICES) * CONFIG.emb_size * CONFIG.ffn_size
ATTENTION = 2 * CONFIG.emb_size * (CONFIG.q_size + CONFIG.kv_size)
USED = ATTENTION + CONFIG.num_selected_experts * EXPERT
"""Weights of a layer that a token is multiplied with."""
CONTEXT = 4096
STEPS = {1: 10, 2: 6, 4: 4, 8: 3, 16: 2}
"""Decode steps of a round, by how many sequences they go through."""
DISK = {"int8": 10.7e9, "int4": 8.2e9, "bf16": 15.7e9, "float32": 25.5e9}
"""Bytes that are needed at a time."""
ON_CPU = jax.default_backend() == "cpu"
RESERVE = 8e9
"""Bytes of an accelerator for temporaries and for products of their own."""
Timing = tuple[float, int]
"""Seconds, and bytes of weights."""


# --- roles that this file plays as a process of its own


class QuantizedWeight8bit:
    """What the released files say they hold; for our own files only."""


def make(folder: Path, precision: str) -> dict[str, Any]:
    write_miniature(folder / "release", CONFIG, tokenizer=False)
    release = open_release(folder / "release")
    reshard(
        plan_reshard(
            release, ReshardOptions(mesh=ONE, out=folder / "ready", precision=Precision(precision))
        )
    )
    return {}


def unpickle(folder: Path) -> dict[str, Any]:
    """Every array of a release, as the reference gets it but for its detour."""
    started, held = time.perf_counter(), []
    for path in sorted((folder / "release/ckpt-0").iterdir()):
        with path.open("rb") as file:
            held.append(pickle.load(file))  # noqa: S301 (we wrote it)
    return {"s": time.perf_counter() - started, "arrays": len(held)}


def load(folder: Path) -> dict[str, Any]:
    """An engine, once JAX has started; then every byte, because a mapped file still owes them."""
    find_devices(1)
    started = time.perf_counter()
    engine = start(open_ready(folder / "ready"))
    seconds = time.perf_counter() - started
    (path,) = (folder / "ready").glob("*.safetensors")
    parts = np.array_split(np.memmap(path, np.uint8, "r"), os.cpu_count() or 1)
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(np.max, parts))
    return {"s": seconds, "read_s": time.perf_counter() - started, "context": engine.context}


def peak(folder: Path) -> dict[str, Any]:
    """What a run takes beside its weights, what its programs take, and how long they compile."""
    runner = start(open_ready(folder / "ready")).runner
    programs = {}
    for count in (1, 64, 512):
        compiled = runner.compile_s
        step = runner.chunk_step(Chunk(0, count, count), Head.LAST)
        nbytes = step.layers[0].memory_analysis().temp_size_in_bytes
        name = "1 token" if count == 1 else f"{count} tokens"
        programs[name] = (runner.compile_s - compiled, nbytes)
    tokens = prompt(64)
    runner.read_last(0, tokens, Chunk(0, 64, 64))
    for position, token in enumerate(tokens[:16], 64):
        runner.decode([0], [token], [position]).on_host()
    highest = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    mapped = is_weights = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line[0].isupper():  # the line that begins a mapping
            is_weights = line.endswith(".safetensors")
        elif line.startswith("Rss:") and is_weights:
            mapped += int(line.split()[1])
    return {"programs": programs, "peak": 1024 * highest, "weights": 1024 * mapped}


def run(role: str, folder: Path, *arguments: str) -> dict[str, Any]:
    return result([sys.executable, __file__, "--role", role, str(folder), *arguments])


def result(command: list[str]) -> dict[str, Any]:
    """What a process says on the last line of its output."""
    process = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


# --- what is measured


@dataclass(frozen=True)
class Repeated:
    """A checkpoint of one layer as one of many, for `infer`."""

    ready: ReadyCheckpoint
    layers: int

    @property
    def config(self) -> GrokConfig:
        """The model."""
        return replace(self.ready.config, num_layers=self.layers)

    @property
    def storage(self) -> Storage:
        """What it stores."""
        groups = {
            name.replace("layers.0.", f"layers.{layer}."): count
            for name, count in self.ready.storage.groups.items()
            for layer in range(self.layers)
        }
        return replace(self.ready.storage, config=self.config, groups=groups)

    def read(self, tensor: LogicalTensor, slices: Slices) -> Any:
        """One part of a tensor, whichever layer's."""
        name = tensor.spec.name.replace(f"layers.{tensor.spec.layer}.", "layers.0.")
        first = replace(tensor, spec=replace(tensor.spec, name=name))
        return self.ready.read(first, slices)


def start(source: Any, *, slots: int = 1) -> Engine:
    return infer(source, EngineOptions(mesh=ONE, context=CONTEXT, slots=slots))


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, CONFIG.vocab_size, length).tolist()


class Streams:
    """An engine of some layers, and sequences under way in it, one in each slot."""

    def __init__(self, ready: ReadyCheckpoint, layers: int) -> None:
        self.layers = layers
        self.runner = start(Repeated(ready, layers), slots=max(STEPS)).runner
        self.done = 0

    def decode(self, count: int) -> Timing:
        """Seconds and bytes of a step of some sequences, whose tokens are drawn: so are experts."""
        tokens, positions = prompt(count, self.done), [self.done] * count
        began, read = self.runner.clock(), self.runner.experts_nbytes()
        logits = self.runner.decode(range(count), tokens, positions).on_host()
        for row in logits:
            RUN_DEFAULTS.choose(row, self.done)
        seconds = self.runner.clock() - began
        self.done += 1
        return seconds, self.runner.step_nbytes(self.runner.experts_nbytes() - read)

    def prefill(self, length: int) -> float:
        """Seconds, of two attempts the better."""
        spent = []
        for seed in range(2):
            tokens, runner = prompt(length, seed), self.runner
            began = runner.clock()
            for chunk in chunks(0, length, longest=runner.longest_chunk, past=runner.past):
                if chunk.end < length:
                    runner.read(0, tokens, chunk)
                else:
                    runner.read_last(0, tokens, chunk).on_host()
            spent.append(runner.clock() - began)
        return min(spent)


class Bare:
    """One expert's products in a loop, over the bytes that the layer has, and nothing else."""

    def __init__(self, ready: ReadyCheckpoint, *, has_kernel: bool) -> None:
        self.shape = StepShape(
            config=ready.config,
            mesh=ONE,
            platform=jax.devices()[0].platform,
            compute=jnp.dtype(jnp.bfloat16),
            has_fast_bfloat16=has_fast_bfloat16(),
            has_native_kernel=has_kernel,
        )
        self.project = jax.jit(lambda x, held, n: project(x, held, shape=self.shape, expert=n))
        tensors = {tensor.key: tensor for tensor in ready.storage.tensors}

        def whole(key: str) -> Any:
            if key not in tensors:
                return None
            array = ready.read(tensors[key], tuple((0, n) for n in tensors[key].shape))
            return jax.device_put(array.view(np.uint16) if array.dtype == BFLOAT16 else array)

        self.held = [
            Matrix(whole(f"layers.0.moe.{name}.weight"), whole(f"layers.0.moe.{name}.scales"))
            for name in MATRICES
        ]
        self.x = {size: jnp.ones((1, size)) for size in (CONFIG.emb_size, CONFIG.ffn_size)}
        self.nbytes = sum(held.weight.nbytes for held in self.held)
        self.rate()

    def rate(self) -> float:
        """Bytes a second, of all experts once."""
        began = time.perf_counter()
        results = [
            self.project(self.x[CONFIG.ffn_size if name == "down" else CONFIG.emb_size], held, n)
            for n in map(jnp.int32, range(CONFIG.num_experts))
            for name, held in zip(MATRICES, self.held, strict=True)
        ]
        jax.block_until_ready(results)
        return self.nbytes / (time.perf_counter() - began)


def gemm(kind: Any, rows: int) -> float:
    """Operations a second of a matrix product that has the form of a prefill's."""
    left = jnp.ones((rows, CONFIG.emb_size), kind)
    right = jnp.ones((CONFIG.emb_size, 8192), kind)
    multiply = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    spent = []
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready([multiply(left, right) for _ in range(4)])
        spent.append(time.perf_counter() - began)
    return 4 * 2 * rows * right.size / min(spent)


def layers_that_fit(ready: ReadyCheckpoint) -> int:
    """Two on the CPU; of an accelerator, what fills it."""
    stats = jax.devices()[0].memory_stats() if not ON_CPU else None
    if not stats:
        return 2
    room = stats["bytes_limit"] - stats["bytes_in_use"] - RESERVE
    cache = 2 * 2 * max(STEPS) * CONTEXT * CONFIG.kv_size
    others = 2  # the engine of one layer, and the bare kernel's experts
    return max(2, min(GROK_1.num_layers, int(room / (ready.nbytes + cache)) - others))


# --- reports


def table(*rows: Sequence[object]) -> None:
    """Columns of numbers behind one of names."""
    head, *rest = [f"| {' | '.join(map(str, row))} |" for row in rows]
    print("", head, f"| --- |{' ---: |' * (len(rows[0]) - 1)}", *rest, sep="\n", flush=True)


def judge(goal: str, *, ok: bool, found: str) -> None:
    print(f"{'PASS' if ok else 'FAIL'}  {goal}: {found}", flush=True)


def report_load(ours: list[dict[str, Any]], peer: float, reference: dict[str, float]) -> None:
    seconds = median(one["s"] for one in ours)
    rows = {
        "`infer(open_ready(…), …)`": seconds,
        "the same, then every byte of it read": median(one["read_s"] for one in ours),
        "the released files, unpickled into memory": peer,
        "the reference code": reference.get("load_s"),
    }
    table(
        ("load one layer, warm", "seconds", "unpickling takes"),
        *[(name, f"{took:.2f}", f"{peer / took:.1f}x") for name, took in rows.items() if took],
    )
    judge("load under 1 s", ok=seconds < 1, found=f"{seconds:.2f} s")
    judge("15x of unpickling", ok=peer > 15 * seconds, found=f"{peer / seconds:.0f}x")


def report_peak(found: dict[str, Any]) -> None:
    table(
        ("step of", "compile, cold", "temporaries of a layer"),
        *[
            (name, f"{seconds:.2f} s", f"{nbytes / 1e6:.1f} MB")
            for name, (seconds, nbytes) in found["programs"].items()
        ],
    )
    beside = found["peak"] - found["weights"]
    size = f"{beside / 1e6:.0f} MB beside {found['weights'] / 1e9:.1f} GB"
    judge("peak RSS under 1 GB beside the weights", ok=beside < 1e9, found=size)


def report_decode(
    ready: ReadyCheckpoint, many: Streams, rounds: int, peer: Peer, reference: dict[str, float]
) -> None:
    """A step of one layer and of many: what lies between them is the layers' alone."""
    few, apart = Streams(ready, 1), many.layers - 1
    bare = Bare(ready, has_kernel=many.runner.shape.has_native_kernel)
    memories, kernels, theirs = [], [], []
    steps: dict[int, list[tuple[Timing, Timing]]] = {count: [] for count in STEPS}
    for count in STEPS:
        few.decode(count), many.decode(count)  # to compile, and to map every page
    for _ in range(rounds):
        for count, found in steps.items():
            memories.append(memory_bandwidth(find_devices(1)))
            kernels.append(bare.rate())
            found += [(few.decode(count), many.decode(count)) for _ in range(STEPS[count])]
        theirs += [peer()] if peer else []
    memory, kernel = median(memories), median(kernels)
    rows, layer, rate = [], 0.0, 0.0
    for count, found in reversed(steps.items()):  # the last one is judged
        short, long = (median(both[side][0] for both in found) for side in (0, 1))
        layer = median((many[0] - one[0]) / apart for one, many in found)
        rate = median((many[1] - one[1]) / (many[0] - one[0]) for one, many in found)
        milliseconds = [f"{1e3 * took:.1f}" for took in (short, long, layer)]
        weights = count * USED / layer / 1e9
        shares = [f"{rate / 1e9:.1f}", f"{rate / memory:.2f}", f"{rate / kernel:.2f}"]
        rows.insert(0, (count, *milliseconds, f"{count / short:.1f}", f"{weights:.1f}", *shares))
    used = CONFIG.num_experts * EXPERT / bare.nbytes * kernel
    others = {"llama.cpp, 1": 1 / median(theirs) if theirs else None}
    others["the reference code, 1"] = reference.get("token_s")
    table(
        (
            "sequences", "ms, 1 layer", f"ms, {many.layers} layers", "ms a layer",
            "tokens/s, 1 layer", "G weights/s", "GB/s", "of memory", "of the kernel",
        ),
        *rows,
        ("the bare kernel", *4 * [""], f"{used / 1e9:.1f}", f"{kernel / 1e9:.1f}",
         f"{kernel / memory:.2f}", "1"),
        ("memory", *5 * [""], f"{memory / 1e9:.1f}", "1", ""),
        *[
            (name, f"{1e3 * took:.0f}", "", "", f"{1 / took:.2f}", *4 * [""])
            for name, took in others.items()
            if took
        ],
    )  # fmt: skip
    if "token_s" in reference:
        ratio = reference["token_s"] / median(one[0] for one, _ in steps[1])
        judge("decode 100x of the reference", ok=ratio > 100, found=f"{ratio:.0f}x")
    sums = {count: count / median(one[0] for one, _ in each) for count, each in steps.items()}
    slowest = min(sums, key=sums.__getitem__)
    judge(
        "many sequences are never slower in sum than one",
        ok=sums[slowest] >= sums[1],
        found=f"{sums[slowest] / sums[1]:.2f}x with {slowest}",
    )
    if ON_CPU:
        weights, share = USED / layer, rate / kernel
        judge("decode 6 G weights/s", ok=weights > 6e9, found=f"{weights / 1e9:.1f}")
        judge("decode 0.75 of the bare kernel", ok=share > 0.75, found=f"{share:.2f}")
    else:
        judge("decode 0.6 of memory", ok=rate > 0.6 * memory, found=f"{rate / memory:.2f}")


def report_sampling(streams: Streams, rounds: int) -> None:
    """Steps of a layer, and draws from as many rows of the whole vocabulary, in turn.

    The layer's own vocabulary is small, so the rows are Gaussian: of deviation 1, which is flat,
    to 5.
    """
    random, rows = np.random.default_rng(5), []
    draws = {"greedy": Sampling(temperature=0), "defaults": RUN_DEFAULTS}
    share = 0.0
    for count in (1, max(STEPS)):
        logits = {
            deviation: random.normal(0, deviation, (count, GROK_1.vocab_size)).astype(np.float32)
            for deviation in (1, 2, 5)
        }
        spent: dict[tuple[str, int], list[float]] = {}
        steps = []
        for number in range(rounds * STEPS[count]):
            steps.append(streams.decode(count)[0])
            for deviation, values in logits.items():
                for name, sampling in draws.items():
                    began = time.perf_counter()
                    for row in values:
                        sampling.choose(row, number)
                    took = time.perf_counter() - began
                    spent.setdefault((name, deviation), []).append(took)
        step = median(steps)
        for deviation in logits:
            greedy, default = (median(spent[name, deviation]) for name in draws)
            slower = (step + default) / (step + greedy) - 1
            share = max(share, slower)
            cells = [f"{1e3 * seconds:.2f}" for seconds in (step, greedy, default)]
            rows.append((f"{count}, deviation {deviation}", *cells, f"{slower:.1%}"))
    table(("sequences", "ms, 1 layer", "ms, greedy", "ms, defaults of run", "slower"), *rows)
    judge("5% of greedy's rate", ok=share <= 0.05, found=f"{share:.1%}")


def report_scores(many: Streams) -> None:
    """Scores of a chunk over the whole vocabulary, beside the chunk itself in Grok-1's layers."""
    length, random = 512, np.random.default_rng(6)
    shape = many.runner.shape
    rows = random.normal(0, 0.02, (GROK_1.vocab_size, CONFIG.emb_size)).astype(np.float32)
    hidden = random.normal(0, 1, (1, length, CONFIG.emb_size)).astype(np.float32)
    targets = random.integers(0, GROK_1.vocab_size, (1, length)).astype(np.int32)
    mesh = jax.make_mesh((1,), (MODEL_AXIS,))
    everywhere = jax.sharding.PartitionSpec()
    compute = jax.jit(
        jax.shard_map(
            partial(scores, shape=shape),
            mesh=mesh,
            in_specs=(everywhere,) * 4,
            out_specs=everywhere,
            check_vma=False,
        )
    )
    norm, spent = np.ones(CONFIG.emb_size, np.float32), []
    given = [jax.device_put(array) for array in (rows, norm, hidden, targets)]
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(compute(*given))
        spent.append(time.perf_counter() - began)
    layers = GROK_1.num_layers * many.prefill(length) / many.layers
    cells = [f"{seconds:.2f}" for seconds in (min(spent), layers)]
    share = min(spent) / layers
    table(("512 tokens", "s, scores", "s, 64 layers", "more"), ("score", *cells, f"{share:.1%}"))
    judge("scores at 5% of the forward pass", ok=share <= 0.05, found=f"{share:.1%}")


def report_prefill(many: Streams, peer: Peer) -> None:
    """Of one sequence; operations are those that are needed: two experts of eight."""
    size = 512 if ON_CPU else 8192
    peaks = {name: gemm(name, size) for name in ("float32", "bfloat16")}
    rows, share = [], 0.0
    for length in (64, 512) if ON_CPU else (64, 512, 2048):
        seconds = many.prefill(length)
        rate = 2 * USED * many.layers * length / seconds
        shares = [rate / best for best in peaks.values()]
        share = shares[-1]
        cells = [f"{seconds:.2f}", f"{length / seconds:.0f}", f"{rate / 1e9:,.0f}"]
        rows.append((f"{length} tokens", *cells, *[f"{one:.2f}" for one in shares]))
    for name, best in peaks.items():
        rows.append((f"XLA, {size} x 6144 x 8192, {name}", "", "", f"{best / 1e9:,.0f}", "", ""))
    if peer:
        rate = peer()
        rows.append(("llama.cpp, 64, 1 layer", f"{64 / rate:.2f}", f"{rate:.0f}", *3 * [""]))
    title = f"prefill, {many.layers} layer{'s' * (many.layers > 1)}"
    table((title, "seconds", "tokens/s", "GFLOP/s needed", "of float32", "of bfloat16"), *rows)
    if not ON_CPU:
        judge("prefill 0.4 of bfloat16", ok=share > 0.4, found=f"{share:.2f}")


def report_operands(bare: Bare) -> None:
    """One product with operands of both types: whether the processor's flags chose the faster."""
    is_fast, held = bare.shape.has_fast_bfloat16, bare.held[0]
    found = both_operands(held, bare.shape)
    ratios = {count: chosen_over_other(took, is_fast=is_fast) for count, took in found.items()}
    table(
        ("`gate` of an expert, tokens", "ms, float32", "ms, bfloat16", "chosen / other"),
        *[
            (count, *[f"{1e3 * one:.0f}" for one in took.values()], f"{ratios[count]:.2f}")
            for count, took in found.items()
        ],
    )
    worst = max(ratios.values())
    name = "bfloat16" if is_fast else "float32"
    judge("operands by capability are the faster", ok=worst < SLOWER, found=f"{name}, {worst:.2f}x")


def report_start(folder: Path) -> None:
    """A two-layer miniature from the shell, without compiled programs and with them."""
    write_miniature(folder / "small", replace(MINIATURE, num_layers=2))
    reshard(
        plan_reshard(
            open_release(folder / "small"), ReshardOptions(mesh=ONE, out=folder / "ready-small")
        )
    )
    command = [sys.executable, "-m", "grokctl", "run", str(folder / "ready-small")]
    command += ["-p", "The", "-n", "1", "--json", "-q", "--home", str(folder / "home")]
    rows = []
    for name, goal in {"cold": 6, "warm": 3}.items():
        began = time.perf_counter()
        stats = result(command)["stats"]
        seconds = time.perf_counter() - began
        rows.append((name, f"{seconds:.2f} s", f"{stats['compile_s']:.2f} s", f"{goal} s"))
    table(("`grokctl run`, two-layer miniature", "process", "of it compiling", "goal"), *rows)


@contextmanager
def made(parent: Path | None, precision: str) -> Iterator[Path]:
    """A folder with a layer, released and ready."""
    with tempfile.TemporaryDirectory(prefix="grokctl-bench-", dir=parent) as name:
        if (free := shutil.disk_usage(name).free) < (needed := DISK[precision]):
            sys.exit(f"{name}: {free / 1e9:.0f} GB are free, {needed / 1e9:.0f} GB are needed")
        run("make", Path(name), precision)
        yield Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="on which disk; default: TMPDIR")
    parser.add_argument("--precision", choices=DISK, default="int8")
    parser.add_argument("--layers", type=int, help="default: 2, or what fits an accelerator")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reference", type=Path, metavar="DIR", help="of model.py, runners.py, …")
    parser.add_argument("--reference-python", type=Path, default=sys.executable, metavar="PATH")
    parser.add_argument(
        "--llama-cli", type=Path, metavar="PATH", help="for int8; llama-bench is beside it"
    )
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        role, folder, *rest = options.role
        roles = {"make": make, "unpickle": unpickle, "load": load, "peak": peak}
        print(json.dumps(roles[role](Path(folder), *rest)))
        return
    reference: dict[str, Any] = {}
    with made(options.folder, options.precision) as folder:
        loads = [(run("load", folder), run("unpickle", folder)["s"]) for _ in range(options.rounds)]
        if options.reference:
            reference = run_reference(
                options.reference, options.reference_python, folder / "release"
            )
        report_load([ours for ours, _ in loads], median(peer for _, peer in loads), reference)
        report_peak(run("peak", folder))
        shutil.rmtree(folder / "release")
        ready = open_ready(folder / "ready")
        decodes = prefills = None
        if options.llama_cli and options.precision == "int8":
            decodes, prefills = llama(options.llama_cli, ready, folder / "layer.gguf")
        many = Streams(ready, options.layers or layers_that_fit(ready))
        report_decode(ready, many, options.rounds, decodes, reference)
        report_sampling(Streams(ready, 1), options.rounds)
        report_scores(Streams(ready, 1))
        report_prefill(Streams(ready, 1) if ON_CPU else many, prefills)
        if ON_CPU:
            report_operands(Bare(ready, has_kernel=False))
        report_start(folder)


if __name__ == "__main__":
    main()
