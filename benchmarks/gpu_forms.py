"""Every form of a product on a GPU, beside what its memory and its matrix units can do.

Without a GPU, and with the CUDA plugin of JAX, `--compile` says what decoding and prefill start,
wait for and copy on absent H100s, and ends with 1 where decoding does what it must not. That is
`make gpu-forms`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _gpu_check import check

from grokctl.model import kernels
from grokctl.model.config import GROK_1
from grokctl.model.kernels import few_rows
from grokctl.model.matmul import einsum, project, project_back, widened
from grokctl.model.parameters import Matrix
from grokctl.model.placement import MeshShape
from grokctl.model.step_spec import KernelForm, StepShape

ROWS = (1, 4, 8, 16, 64, 512)
LAPS = 8  # products with different experts in one program, so that neither calls nor caches count
CALLS, ROUNDS = 8, 3
BF16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
TUNED = {
    "_PROGRAMS": (256, 512, 1024, 2048),
    "_STRIP": (128, 256, 512),
    "_AHEAD": (2, 4, 8),
    "_WARPS": (4, 8),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Stored:
    """Experts' weights and scales in both ways."""

    stack: tuple[jax.Array, jax.Array]
    apart: tuple[tuple[jax.Array, jax.Array], ...]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A stack of experts' weights, as it is stored."""

    name: str
    inputs: int
    outputs: int
    groups: int
    is_int4: bool = False

    @property
    def nbytes(self) -> int:
        """Of one expert, with its scales."""
        codes = self.inputs * self.outputs
        return (codes // 2 if self.is_int4 else codes) + 2 * self.groups * self.outputs

    def random(self) -> "Stored":
        """Made on the device: a gigabyte would take long to get there."""
        rows = self.inputs // 2 if self.is_int4 else self.inputs
        keys = jax.random.split(jax.random.key(0), 2)
        shape = (LAPS, rows, self.outputs)
        codes = jax.random.bits(keys[0], shape, jnp.uint8)
        weight = codes if self.is_int4 else jax.lax.bitcast_convert_type(codes, jnp.int8)
        factors = jax.random.uniform(keys[1], (LAPS, self.groups, self.outputs), minval=0.5)
        scales = jax.lax.bitcast_convert_type(factors.astype(BF16), jnp.uint16)
        apart = tuple(zip(weight, scales, strict=True))
        return Stored(stack=(weight, scales), apart=apart)


WEIGHTS = (
    Weight(name="int8 gate", inputs=6144, outputs=32768, groups=1),
    Weight(name="int8 down", inputs=32768, outputs=6144, groups=8),
    Weight(name="int8 down of 8", inputs=4096, outputs=6144, groups=1),
    Weight(name="int8 query", inputs=6144, outputs=6144, groups=1),
    Weight(name="int8 key, from the cache", inputs=6144, outputs=1024, groups=1),
    Weight(name="int4 down", inputs=32768, outputs=6144, groups=512, is_int4=True),
)
TINY = (
    Weight(name="int8", inputs=64, outputs=48, groups=2),
    Weight(name="int4", inputs=64, outputs=48, groups=4, is_int4=True),
)

Form = Callable[[jax.Array, Stored, int, jax.Array], jax.Array]
"""Takes activations, weights, the number of an expert as Python has it, and as the device has."""


def codes_of(stored: jax.Array) -> jax.Array:
    if stored.dtype != jnp.uint8:
        return stored.astype(BF16)
    pair = jnp.stack([stored & 15, stored >> 4], axis=-2).astype(jnp.int8) - 8
    return pair.reshape(*stored.shape[:-2], -1, stored.shape[-1]).astype(BF16)


def in_groups(x: jax.Array, weight: jax.Array, scales: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """Convert and multiply, which XLA fuses if nothing stands before it; scale the sums."""
    groups, outputs = scales.shape
    wide = codes_of(weight).reshape(groups, -1, outputs)
    sums = einsum("tgi,gio->tgo", x.reshape(len(x), groups, -1), wide, dtype=dtype)
    return jnp.sum(sums * widened(scales)[None], axis=1)


def dequantised(
    x: jax.Array, weight: jax.Array, scales: jax.Array, *, dtype: jnp.dtype
) -> jax.Array:
    groups, outputs = scales.shape
    wide = codes_of(weight).reshape(groups, -1, outputs) * widened(scales)[:, None].astype(BF16)
    return einsum("ti,io->to", x, wide.reshape(-1, outputs), dtype=dtype)


def step_shape(dtype: jnp.dtype) -> StepShape:
    return StepShape(config=GROK_1, mesh=MeshShape(1, 1), platform="gpu", compute=dtype)


def forms(*, interpret: bool) -> dict[str, Form]:
    """Operands of matrix products are bfloat16; a CPU, which only tries them, cannot in batches."""
    dtype = FLOAT32 if interpret else BF16
    dot, wide = partial(in_groups, dtype=dtype), partial(dequantised, dtype=dtype)

    def kernel(x: jax.Array, stored: Stored, _place: int, number: jax.Array) -> jax.Array:
        form = KernelForm.INTERPRETED if interpret else KernelForm.PTX
        return few_rows(x, *stored.stack, number, form=form)

    def own(x: jax.Array, stored: Stored, place: int, _number: jax.Array) -> jax.Array:
        return dot(x, *stored.apart[place])

    def switched(x: jax.Array, stored: Stored, _place: int, number: jax.Array) -> jax.Array:
        branches = [lambda x, all_, k=k: dot(x, *all_[k]) for k in range(LAPS)]
        return jax.lax.switch(number, branches, x, stored.apart)

    def sliced(
        form: Any, x: jax.Array, stored: Stored, _place: int, number: jax.Array
    ) -> jax.Array:
        weight, scales = stored.stack
        return form(x, weight[number], scales[number])

    def chosen(x: jax.Array, stored: Stored, _place: int, number: jax.Array) -> jax.Array:
        return project(x, Matrix(*stored.stack), shape=step_shape(dtype), expert=number)

    return {
        "kernel": kernel,
        "dot, an array of its own": own,
        "dot, switch over such arrays": switched,
        "dot, traced slice": partial(sliced, dot),
        "dequantised, traced slice": partial(sliced, wide),
        "project": chosen,
    }


def seconds(run: Callable[..., Any], *arguments: Any) -> float:
    """Of one call, with many in the queue."""
    jax.block_until_ready(run(*arguments))
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready([run(*arguments) for _ in range(CALLS)])
        best = min(best, (time.perf_counter() - start) / CALLS)
    return best


def bandwidth(nbytes: int) -> float:
    data = jnp.ones(nbytes // 4, jnp.float32)
    return nbytes / seconds(jax.jit(jnp.max), data)


def peak(size: int) -> float:
    square = jax.random.normal(jax.random.key(0), (size, size), BF16)
    return 2 * size**3 / seconds(jax.jit(jnp.matmul), square, square)


def measured(form: Form, xs: jax.Array, stored: Stored) -> tuple[float, float, Any]:
    """Seconds for one product, bytes of temporaries for all, and the last product."""

    def laps(xs: jax.Array, stored: Stored, numbers: jax.Array) -> list[jax.Array]:
        return [form(xs[lap], stored, lap, numbers[lap]) for lap in range(LAPS)]

    numbers = jnp.arange(LAPS)
    compiled = jax.jit(laps).lower(xs, stored, numbers).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    spent = seconds(compiled, xs, stored, numbers) / LAPS
    return spent, temporaries, compiled(xs, stored, numbers)[-1]


def expected(x: jax.Array, stored: Stored) -> Any:
    """The last expert's product, in float32."""
    weight, scales = stored.apart[-1]
    factors = widened(scales)
    wide = codes_of(weight).astype(jnp.float32).reshape(len(factors), -1, factors.shape[1])
    found = jax.lax.map(
        lambda part: einsum("ti,io->to", part[0], part[1], dtype=FLOAT32) * part[2],
        (jnp.moveaxis(x.reshape(len(x), len(factors), -1), 1, 0), wide, factors[:, None]),
    )
    return np.asarray(found.sum(axis=0))


def report(weights: tuple[Weight, ...], rows: tuple[int, ...], **options: Any) -> None:
    read, multiplied = options["read"], options["multiplied"]
    print("| weight | rows | form | ms | of the memory's | of the units' | temporaries | error |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for weight in weights:
        stored = weight.random()
        for count in rows:
            xs = jax.random.normal(jax.random.key(count), (LAPS, count, weight.inputs))
            true = expected(xs[-1], stored)
            for name, form in forms(interpret=options["interpret"]).items():
                if name == "kernel" and count > 2 * kernels.FEW_ROWS:
                    continue
                spent, temporaries, found = measured(form, xs, stored)
                error = np.linalg.norm(found - true) / np.linalg.norm(true)
                operations = 2 * count * weight.inputs * weight.outputs
                shares = weight.nbytes / spent / read, operations / spent / multiplied
                print(
                    f"| {weight.name} | {count} | {name} | {spent * 1e3:.4f} | {shares[0]:.0%} "
                    f"| {shares[1]:.0%} | {temporaries / 1e6:.0f} MB | {error:.0e} |",
                    flush=True,
                )
                assert error < (1e-5 if name == "kernel" else 2e-2), (weight, count, name)


def head(vocab: int, embed: int, read: float) -> None:
    """The product with the embedding, for which there is no kernel."""
    embedding = jax.random.normal(jax.random.key(0), (vocab, embed), jnp.float32)
    run = jax.jit(partial(project_back, shape=step_shape(BF16)))
    print("\n| head, float32 | rows | ms | of the memory's |\n| --- | ---: | ---: | ---: |")
    for count in (1, 8):
        spent = seconds(run, jnp.ones((count, embed)), embedding)
        print(f"| | {count} | {spent * 1e3:.3f} | {embedding.nbytes / spent / read:.0%} |")


def settings() -> Iterator[dict[str, int]]:
    """The kernel's own first, then every other that differs in one or two things."""
    own = {name: getattr(kernels, name) for name in TUNED}
    yield own
    for values in product(*TUNED.values()):
        other = dict(zip(TUNED, values, strict=True))
        if 1 <= sum(other[name] != own[name] for name in own) <= 2:
            yield other


def tune(weight: Weight, count: int, read: float, *, interpret: bool) -> None:
    """How the kernel does when its work is shared out in other ways, the best first."""
    stored = weight.random()
    xs = jax.random.normal(jax.random.key(count), (LAPS, count, weight.inputs))
    own, found = {name: getattr(kernels, name) for name in TUNED}, []
    for other in settings():
        for name, value in other.items():
            setattr(kernels, name, value)
        spent, _, _ = measured(forms(interpret=interpret)["kernel"], xs, stored)
        found.append((spent, other))
    for name, value in own.items():
        setattr(kernels, name, value)
    print(f"\n{weight.name}, {count} rows:")
    for spent, other in sorted(found, key=lambda item: item[0])[:6]:
        mark = " (its own)" if other == own else ""
        print(f"  {spent * 1e3:.4f} ms, {weight.nbytes / spent / read:.0%}: {other}{mark}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", help="also try other settings of the kernel")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--weights", nargs="+", help="names that begin so, such as 'int8 down'")
    parser.add_argument("--compile", action="store_true", help="only compile, for absent H100s")
    parser.add_argument("--devices", type=int, nargs="+", default=(8, 1), help="to compile for")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=(1, 8, 16, 0), help="0 is a chunk of a prompt"
    )
    parser.add_argument("--keep", type=Path, help="folder for XLA's texts")
    parser.add_argument("--interpret", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = tuple(given.weights or [""])
    known = TINY if given.interpret else WEIGHTS
    weights = tuple(weight for weight in known if weight.name.startswith(names))
    if given.compile:
        sys.exit(check(devices=given.devices, batches=given.batches, keep=given.keep))
    if jax.devices()[0].platform != "gpu" and not given.interpret:
        print("No GPU is here: nothing to measure.")
        return
    read = bandwidth(2**24 if given.interpret else 2**32)
    multiplied = peak(256 if given.interpret else 8192)
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}: memory reads at", end=" ")
    print(f"{read / 1e9:.0f} GB/s, bf16 multiplies at {multiplied / 1e12:.1f} TFLOP/s.\n")
    report(weights, tuple(given.rows), read=read, multiplied=multiplied, interpret=given.interpret)
    head(*((64, 32) if given.interpret else (GROK_1.vocab_size, GROK_1.emb_size)), read)
    if given.tune:
        for weight, count in product(weights, (1, 4)):
            tune(weight, count, read, interpret=given.interpret)


if __name__ == "__main__":
    main()
