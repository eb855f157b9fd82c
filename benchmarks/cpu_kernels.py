"""The native kernel on Grok-1's weights, beside XLA's form and what the machine can do.

Few tokens: bytes of the weight a second, as a share of a plain read by the same threads. Many:
multiplications and additions of bytes a second, as a share of what the form's instruction can do.
All take turns, and the least of many rounds counts: other work on the machine hits all alike.
"""

import argparse
import ctypes
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import environ
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grokctl.model.config import GROK_1
from grokctl.model.matmul import project
from grokctl.model.parameters import Matrix
from grokctl.model.placement import MeshShape
from grokctl.model.step_spec import StepShape
from grokctl.native.build import headers
from grokctl.native.compiler import compile_library, find_compiler
from grokctl.native.library import load
from grokctl.system import usable_cores

STACK = 4  # matrices that take turns, so that none is in a cache
FEW, MANY = (1, 4, 16), (64, 512)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight of the layer."""

    name: str
    inputs: int
    outputs: int
    groups: int
    is_int4: bool = False

    @property
    def nbytes(self) -> int:
        """Of one matrix without its scales."""
        return self.inputs * self.outputs // (2 if self.is_int4 else 1)

    def random(self) -> Matrix:
        """Codes of any value; a stack of them."""
        rng = np.random.default_rng(0)
        rows = self.inputs // 2 if self.is_int4 else self.inputs
        codes = rng.integers(0, 256, (STACK, rows, self.outputs), np.uint8)
        scales = rng.uniform(0.5, 1.0, (STACK, self.groups, self.outputs)).astype(np.float32)
        return Matrix(
            jnp.asarray(codes if self.is_int4 else codes.view(np.int8)),
            jnp.asarray((scales.view(np.uint32) >> 16).astype(np.uint16)),
        )


WEIGHTS = (
    Weight(name="int8 gate", inputs=6144, outputs=32768, groups=1),
    Weight(name="int8 down", inputs=32768, outputs=6144, groups=8),
    Weight(name="int8 query", inputs=6144, outputs=6144, groups=1),
    Weight(name="int4 gate", inputs=6144, outputs=32768, groups=96, is_int4=True),
    Weight(name="int4 down", inputs=32768, outputs=6144, groups=512, is_int4=True),
)


def instruction_limit(form: str, threads: int) -> float:
    """Operations a second of all threads; 0 if the form's instruction is not known."""
    compiler = find_compiler(environ)
    if compiler is None:
        return 0.0
    source = Path(__file__).with_name("_limits.cc")
    with tempfile.TemporaryDirectory() as folder:
        flags = ("-std=c++17", "-O2", "-fPIC")
        path = compile_library(compiler, {source: flags}, Path(folder), includes=headers())
        limit = ctypes.CDLL(str(path)).limit
    limit.restype = ctypes.c_double
    with ThreadPoolExecutor(threads) as pool:
        rounds = [sum(pool.map(limit, [form.encode()] * threads)) for _ in range(9)]
    return max(rounds)


def reader(nbytes: int, threads: int) -> Callable[[int], None]:
    """Reads as many bytes as a weight has."""
    data = np.ones((STACK, nbytes // 8), np.int64)
    pool = ThreadPoolExecutor(threads)

    def read(turn: int) -> None:
        list(pool.map(np.max, np.array_split(data[turn % STACK], threads)))

    return read


def product(weight: Matrix, x: jax.Array, shape: StepShape) -> Callable[[int], None]:
    run = jax.jit(lambda x, weight, number: project(x, weight, shape=shape, expert=number))
    compiled = run.lower(x, weight, jnp.int32(0)).compile()
    numbers = [jnp.int32(number) for number in range(STACK)]

    def multiply(turn: int) -> None:
        jax.block_until_ready(compiled(x, weight, numbers[turn % STACK]))

    return multiply


def least_times(runs: dict[str, Callable[[int], None]], rounds: int) -> dict[str, float]:
    """Seconds of each, in turns."""
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(rounds + 1):
        for place, (name, run) in enumerate(runs.items()):
            began = time.perf_counter()
            run(turn + place)
            if turn:
                best[name] = min(best[name], time.perf_counter() - began)
    return best


def report(weights: Sequence[Weight], tokens: Sequence[int], rounds: int) -> None:
    library = load()
    threads, form = usable_cores(), library.instruction_set
    limit = instruction_limit(form, threads)
    print(f"{form}, {threads} threads; limit of its instruction: {limit / 1e9:.0f} Gop/s\n")
    print("| weight | tokens | parts | ms | GB/s | of a read | Gop/s | of the limit | XLA |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for weight in weights:
        stored, read = weight.random(), reader(weight.nbytes, threads)
        for count in tokens:
            x = jax.random.normal(jax.random.key(count), (count, weight.inputs))
            shape = StepShape(
                config=GROK_1, mesh=MeshShape(1, 1), platform="cpu", compute=jnp.dtype(jnp.bfloat16)
            )
            native = replace(shape, has_native_kernel=True)
            exact = replace(native, compute=jnp.dtype(jnp.float32))
            runs: dict[str, Any] = {"read": read, "xla": product(stored, x, shape)}
            runs |= {"2": product(stored, x, native), "3": product(stored, x, exact)}
            spent = least_times(runs, rounds if count <= max(FEW) else max(2, rounds // 6))
            for parts in (2, 3):
                seconds = spent[str(parts)]
                operations = 2 * count * weight.inputs * weight.outputs * parts / seconds
                print(
                    f"| {weight.name} | {count} | {parts} | {seconds * 1e3:.1f}"
                    f" | {weight.nbytes / seconds / 1e9:.1f} | {spent['read'] / seconds:.2f}"
                    f" | {operations / 1e9:.0f} | {operations / limit if limit else 0:.2f}"
                    f" | {spent['xla'] / seconds:.1f} x |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weight", action="append", help="by name; all by default")
    parser.add_argument("--tokens", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--form", help="an instruction set, such as avx512vnni")
    asked = parser.parse_args()
    if asked.form and not load().force(asked.form):
        raise SystemExit(f"{asked.form}: does not run here")
    chosen = [weight for weight in WEIGHTS if not asked.weight or weight.name in asked.weight]
    report(chosen, asked.tokens or FEW + MANY, asked.rounds)


if __name__ == "__main__":
    main()
