"""Which type of operands a CPU multiplies faster, beside the one that grokctl chooses."""

import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from grokctl.model.matmul import project
from grokctl.model.parameters import Matrix
from grokctl.model.step_spec import StepShape

TOKENS = (16, 64, 512)
ROUNDS = 5
SLOWER = 1.15
"""The choice may take this many times as long, as a shared machine is not more exact."""


def both_operands(held: Matrix, shape: StepShape) -> dict[int, dict[str, float]]:
    """Seconds of a product by tokens and type: the least of interleaved rounds."""

    def program(tokens: int, *, is_fast: bool) -> Any:
        asked = replace(shape, has_fast_bfloat16=is_fast)
        x = jnp.ones((tokens, shape.config.emb_size))
        run = jax.jit(lambda x, held, n: project(x, held, shape=asked, expert=n))
        return run.lower(x, held, jnp.int32(0)).compile(), x

    found = {}
    for tokens in TOKENS:
        forms = {
            "float32": program(tokens, is_fast=False),
            "bfloat16": program(tokens, is_fast=True),
        }
        spent: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(ROUNDS + 1):
            for name, (run, x) in forms.items():
                began = time.perf_counter()
                jax.block_until_ready(run(x, held, jnp.int32(1)))
                spent[name].append(time.perf_counter() - began)
        found[tokens] = {name: min(each[1:]) for name, each in spent.items()}
    return found


def chosen_over_other(found: dict[str, float], *, is_fast: bool) -> float:
    """How many times as long the chosen type takes as the other."""
    chosen, other = ("bfloat16", "float32") if is_fast else ("float32", "bfloat16")
    return found[chosen] / found[other]
