"""How fast one decode product reads int8 weights in different orders, beside the memory's limit."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grokctl.hardware import find_devices, memory_bandwidth

INPUTS, OUTPUTS, GROUPS = 32768, 6144, 8
ROUNDS, COPIES = 12, 3  # several copies, so that no cache holds the weight

Product = Callable[[jax.Array, Any, jax.Array], jax.Array]


def released(x: jax.Array, weight: jax.Array, scales: jax.Array) -> jax.Array:
    wide = weight.reshape(GROUPS, -1, OUTPUTS).astype(jnp.float32) * scales[:, None]
    return x @ wide.reshape(INPUTS, OUTPUTS)


def outputs_first(x: jax.Array, weight: jax.Array, scales: jax.Array) -> jax.Array:
    wide = weight.reshape(OUTPUTS, GROUPS, -1).astype(jnp.float32)
    return jnp.sum(jnp.sum(wide * x.reshape(1, GROUPS, -1), axis=2) * scales.T, axis=1)


def outputs_first_cut(x: jax.Array, weight: jax.Array, scales: jax.Array) -> jax.Array:
    width = INPUTS // GROUPS
    parts = [slice(group * width, (group + 1) * width) for group in range(GROUPS)]
    sums = [jnp.sum(weight[:, part].astype(jnp.float32) * x[None, part], axis=1) for part in parts]
    return jnp.sum(jnp.stack(sums) * scales, axis=0)


def groups_first(x: jax.Array, weight: jax.Array, scales: jax.Array) -> jax.Array:
    wide = weight.astype(jnp.float32)
    return jnp.sum(jnp.sum(wide * x.reshape(GROUPS, 1, -1), axis=2) * scales, axis=0)


def groups_apart(x: jax.Array, weight: list[jax.Array], scales: jax.Array) -> jax.Array:
    parts = x.reshape(GROUPS, 1, -1)
    sums = [jnp.sum(w.astype(jnp.float32) * parts[g], axis=1) for g, w in enumerate(weight)]
    return jnp.sum(jnp.stack(sums) * scales, axis=0)


def ungrouped(x: jax.Array, weight: jax.Array, scales: jax.Array) -> jax.Array:
    return jnp.sum(weight.astype(jnp.float32) * x[None], axis=1) * scales[0]


def ungrouped_in_three_dimensions(x: jax.Array, weight: jax.Array, scales: jax.Array) -> jax.Array:
    return jnp.sum(weight[None].astype(jnp.float32) * x[None, None], axis=2)[0] * scales[0]


def measure(
    product: Product, x: jax.Array, weights: list[Any], scales: jax.Array
) -> tuple[Any, ...]:
    compiled = jax.jit(product).lower(x, weights[0], scales).compile()
    result = np.asarray(compiled(x, weights[0], scales))
    times = []
    for turn in range(ROUNDS):
        start = time.perf_counter()
        compiled(x, weights[turn % COPIES], scales).block_until_ready()
        times.append(time.perf_counter() - start)
    rate = INPUTS * OUTPUTS / np.median(times)
    return result, rate, compiled.memory_analysis().temp_size_in_bytes


def report(
    forms: list[tuple[str, Product, list[Any]]], x: jax.Array, scales: jax.Array, ceiling: float
) -> None:
    expected = None
    for name, product, weights in forms:
        placed = jax.tree.map(jnp.asarray, weights)
        result, rate, temporaries = measure(product, x, placed, scales)
        expected = result if expected is None else expected
        error = np.linalg.norm(result - expected) / np.linalg.norm(expected)
        assert error < 1e-5, (name, error)
        share = f"{rate / ceiling:.0%}"
        print(f"| {name} | {rate / 1e9:.1f} | {share} | {temporaries / 1e6:.0f} MB |")


def main() -> None:
    devices = find_devices(1)
    ceiling = memory_bandwidth(devices)
    rng = np.random.default_rng(0)
    raw = [rng.integers(-127, 128, (INPUTS, OUTPUTS), dtype=np.int8) for _ in range(COPIES)]
    scales = jnp.asarray(rng.random((GROUPS, OUTPUTS)), jnp.float32)
    x = jnp.asarray(rng.standard_normal(INPUTS), jnp.float32)
    grouped = [w.reshape(GROUPS, -1, OUTPUTS).swapaxes(1, 2).copy() for w in raw]
    forms: list[tuple[str, Product, list[Any]]] = [
        ("(inputs, outputs), dequantised", released, raw),
        ("(outputs, inputs), groups inside", outputs_first, [w.T.copy() for w in raw]),
        ("(outputs, inputs), cut in groups", outputs_first_cut, [w.T.copy() for w in raw]),
        ("(groups, outputs, inputs)", groups_first, grouped),
        ("groups as arrays of their own", groups_apart, [list(w) for w in grouped]),
    ]
    plain = [w.T.copy() for w in raw]
    print("| order | G weights/s | of the memory's limit | temporaries |")
    print("| --- | ---: | ---: | ---: |")
    report(forms, x, scales, ceiling)
    forms = [
        ("one group, (outputs, inputs)", ungrouped, plain),
        ("one group, (1, outputs, inputs)", ungrouped_in_three_dimensions, plain),
    ]
    report(forms, x, scales, ceiling)
    print(f"memory reads at {ceiling / 1e9:.1f} GB/s, measured in this run; one weight is one byte")


if __name__ == "__main__":
    main()
