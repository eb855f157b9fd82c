"""How fast one decode product reads weights in different orders, beside the memory's limit."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grokctl.inference.devices import find_devices, memory_bandwidth
from grokctl.model.config import GROK_1
from grokctl.model.matmul import project
from grokctl.model.parameters import Matrix
from grokctl.model.placement import MeshShape
from grokctl.model.step_spec import StepShape

INPUTS, OUTPUTS, GROUPS, INT4_GROUP = 32768, 6144, 8, 64
ROUNDS, COPIES = 12, 3  # several copies, so that no cache holds the weight
SHAPE = StepShape(
    config=GROK_1, mesh=MeshShape(1, 1), platform="cpu", compute=jnp.dtype(jnp.float32)
)

Product = Callable[[jax.Array, Any], jax.Array]
Weights = list[Any]
Form = tuple[str, Product, Callable[[], Weights], float]
"""Name, product, what makes its weights, and how many bytes a weight takes."""


def dequantised(x: jax.Array, stored: Any) -> jax.Array:
    weight, scales = stored
    wide = weight.reshape(GROUPS, -1, OUTPUTS).astype(jnp.float32) * scales[:, None]
    return x @ wide.reshape(INPUTS, OUTPUTS)


def reduced(x: jax.Array, stored: Any) -> jax.Array:
    weight, scales = stored
    wide = weight.reshape(GROUPS, -1, OUTPUTS).astype(jnp.float32)
    return jnp.sum(jnp.sum(wide * x.reshape(GROUPS, -1, 1), axis=1) * scales, axis=0)


def outputs_first(x: jax.Array, stored: Any) -> jax.Array:
    weight, scales = stored
    wide = weight.reshape(OUTPUTS, GROUPS, -1).astype(jnp.float32)
    return jnp.sum(jnp.sum(wide * x.reshape(1, GROUPS, -1), axis=2) * scales.T, axis=1)


def groups_apart(x: jax.Array, stored: Any) -> jax.Array:
    weights, scales = stored
    parts = x.reshape(GROUPS, 1, -1)
    sums = [jnp.sum(w.astype(jnp.float32) * parts[g], axis=1) for g, w in enumerate(weights)]
    return jnp.sum(jnp.stack(sums) * scales, axis=0)


def row_by_row(x: jax.Array, stored: Any) -> jax.Array:
    return project(x[None], stored, shape=SHAPE)[0]


def expert(x: jax.Array, stored: Any) -> jax.Array:
    matrix, number = stored
    return project(x[None], matrix, shape=SHAPE, expert=number)[0]


def random_codes(limit: int = 127) -> list[Any]:
    rng = np.random.default_rng(0)
    shape = (INPUTS, OUTPUTS)
    return [rng.integers(-limit, limit + 1, shape, dtype=np.int8) for _ in range(COPIES)]


def bits(array: Any) -> jax.Array:
    return jnp.asarray(np.asarray(jnp.asarray(array, jnp.bfloat16)).view(np.uint16))


def random_scales(groups: int) -> Any:
    """Exact in bfloat16."""
    return np.random.default_rng(1).integers(1, 128, (groups, OUTPUTS)).astype(np.float32) / 64


def forms() -> list[Form]:
    scales = random_scales(GROUPS)
    grouped = [w.reshape(GROUPS, -1, OUTPUTS).swapaxes(1, 2) for w in random_codes()]
    int8 = [Matrix(w, bits(scales)) for w in random_codes()]
    return [
        ("int8 (inputs, outputs), dequantised", dequantised,
         lambda: [(w, scales) for w in random_codes()], 1),
        ("int8 (inputs, outputs), multiplied and reduced", reduced,
         lambda: [(w, scales) for w in random_codes()], 1),
        ("int8 (outputs, inputs), groups inside", outputs_first,
         lambda: [(w.T.copy(), scales) for w in random_codes()], 1),
        ("int8 (outputs, inputs), groups as arrays of their own", groups_apart,
         lambda: [([part.copy() for part in w], scales) for w in grouped], 1),
        ("**int8 (inputs, outputs), row by row**", row_by_row, lambda: int8, 1),
        ("the same, one expert of a stack", expert,
         lambda: [(Matrix(np.stack(random_codes()), bits(np.stack([scales] * COPIES))), index)
                  for index in range(COPIES)], 1),
    ]  # fmt: skip


def other_precisions() -> list[Form]:
    def packed() -> Weights:
        scales = bits(random_scales(INPUTS // INT4_GROUP))
        nibbles = [(codes + 8).view(np.uint8) for codes in random_codes(7)]
        return [Matrix(pair[0::2] | pair[1::2] << 4, scales) for pair in nibbles]

    def bfloat16() -> Weights:
        return [Matrix(bits(codes), None) for codes in random_codes()]

    def float32() -> Weights:
        return [Matrix(codes.astype(np.float32), None) for codes in random_codes()]

    return [
        ("**int4 (inputs / 2, outputs), row by row**", row_by_row, packed, 0.5),
        ("**bf16 (inputs, outputs), row by row**", row_by_row, bfloat16, 2),
        ("**float32 (inputs, outputs), row by row**", row_by_row, float32, 4),
    ]


def measure(product: Product, x: jax.Array, weights: Weights) -> tuple[Any, float, float, int]:
    """The result, weights a second, seconds to compile, and bytes of temporaries."""
    lowered = jax.jit(product).lower(x, weights[0])
    start = time.perf_counter()
    compiled = lowered.compile()
    compile_s = time.perf_counter() - start
    result = np.asarray(compiled(x, weights[0]))
    times = []
    for turn in range(ROUNDS):
        start = time.perf_counter()
        compiled(x, weights[turn % COPIES]).block_until_ready()
        times.append(time.perf_counter() - start)
    rate = INPUTS * OUTPUTS / float(np.median(times))
    return result, rate, compile_s, compiled.memory_analysis().temp_size_in_bytes


def report(form: Form, x: jax.Array, ceiling: float) -> Any:
    name, product, make, nbytes = form
    placed = jax.tree.map(jnp.asarray, make())
    result, rate, compile_s, temporaries = measure(product, x, placed)
    share = f"{rate * nbytes / ceiling:.0%}"
    print(
        f"| {name} | {rate / 1e9:.1f} | {share} | {temporaries / 1e6:.1f} MB | {compile_s:.2f} s |",
        flush=True,
    )
    return result


def main() -> None:
    ceiling = memory_bandwidth(find_devices(1))
    x = jnp.asarray(np.random.default_rng(2).standard_normal(INPUTS), jnp.float32)
    print("| order | G weights/s | of the memory's limit | temporaries | compile |")
    print("| --- | ---: | ---: | ---: | ---: |")
    results = [report(form, x, ceiling) for form in forms()]
    for result in results[1:]:
        error = np.linalg.norm(result - results[0]) / np.linalg.norm(results[0])
        assert error < 1e-5, error
    for form in other_precisions():
        report(form, x, ceiling)
    print(f"\nMemory reads at {ceiling / 1e9:.1f} GB/s, measured in this run.")


if __name__ == "__main__":
    main()
