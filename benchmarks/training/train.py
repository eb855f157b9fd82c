"""Train the miniature that ships with grokctl: `make miniature`.

Everything is seeded, and state is saved as it goes: a run that was stopped continues.
"""

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from training.curve import draw
from training.network import initial_parameters, loss_of
from training.recipe import (
    BALANCE,
    BATCH,
    CONFIG,
    EVERY,
    LENGTHS,
    SEED,
    STEPS,
    WEIGHT_DECAY,
    rate,
)
from training.state import State
from training.texts import Texts, prepared

from grokctl.model.matmul import einsum


def optimizer(steps: int) -> optax.GradientTransformation:
    """Muon for the matrices, Adam for the embedding, the routers and the norms.

    Muon (Jordan et al., 2024) moves every matrix by the orthogonal one that is nearest to its
    momentum, here at the rate that is usual for Adam (Liu et al., 2025, equation 4).
    """

    def kinds(parameters: Any) -> Any:
        def of(path: Any, leaf: Any) -> str:
            name = jax.tree_util.keystr(path)
            is_matrix = leaf.ndim > 1 and "embedding" not in name and "router" not in name
            return "matrix" if is_matrix else "other"

        return jax.tree_util.tree_map_with_path(of, parameters)

    momentum = optax.trace(decay=0.95, nesterov=True)
    muon = optax.chain(momentum, optax.stateless(lambda found, _: jax.tree.map(orthogonal, found)))
    adam = optax.chain(optax.scale_by_adam(b1=0.9, b2=0.98), optax.scale(0.5))
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition({"matrix": muon, "other": adam}, kinds),
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.scale_by_learning_rate(partial(rate, steps=steps)),
    )


def orthogonal(matrix: jax.Array) -> jax.Array:
    """The orthogonal matrix nearest to each of a stack, roughly, with an RMS of 0.2.

    Five Newton-Schulz steps with Jordan's coefficients, in bfloat16.
    """
    inputs, outputs = matrix.shape[-2:]
    x = matrix if inputs <= outputs else jnp.swapaxes(matrix, -1, -2)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    multiply = partial(einsum, "...ij,...jk->...ik", dtype=jnp.dtype(jnp.bfloat16))
    for _ in range(5):
        square = multiply(x, jnp.swapaxes(x, -1, -2))
        x = 3.4445 * x + multiply(-4.7750 * square + 2.0315 * multiply(square, square), x)
    x = x if inputs <= outputs else jnp.swapaxes(x, -1, -2)
    return x * 0.2 * max(inputs, outputs) ** 0.5


def _used() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def held_out_loss(texts: Texts, loss: Callable[[Any, Any], Any], parameters: Any) -> float:
    """Nats per token on windows spread over all texts that training does not see."""
    length, count = LENGTHS[-1][1], 96
    starts = np.linspace(0, len(texts.held_out) - length - 1, count).astype(int)
    windows = np.stack([texts.held_out[start : start + length + 1] for start in starts])
    parts = windows.astype(np.int32).reshape(-1, BATCH // length, length + 1)
    return float(np.mean([loss(parameters, part) for part in parts]))


def train(work: Path, *, steps: int, stop: int) -> State:
    """Train up to a step, or continue to.

    Args:
        work: Folder of the state, the tokenizer and the picture.
        steps: Over which the rate falls to zero.
        stop: Last step of this run.
    """
    texts = prepared(work)
    parameters = initial_parameters(CONFIG, SEED)
    method = optimizer(steps)
    state = State(parameters, jax.jit(method.init)(parameters), 0, 0.0, [])
    saved = work / "state.npz"
    if saved.exists():
        state.load(saved)
    run(state, texts, method, saved, stop=stop, steps=steps)
    return state


def run(
    state: State,
    texts: Texts,
    method: optax.GradientTransformation,
    saved: Path,
    *,
    stop: int,
    steps: int,
) -> None:
    """Steps, with a line and a saved state every so often."""
    loss = partial(loss_of, config=CONFIG, operand=jnp.dtype(jnp.bfloat16))

    def total(parameters: Any, tokens: Any) -> Any:
        nats, imbalance = loss(parameters, tokens)
        return nats + BALANCE * imbalance, (nats, imbalance)

    @partial(jax.jit, donate_argnums=(0, 1))
    def advance(parameters: Any, moments: Any, tokens: Any) -> Any:
        gradient, seen = jax.grad(total, has_aux=True)(parameters, tokens)
        changes, moments = method.update(gradient, moments, parameters)
        return optax.apply_updates(parameters, changes), moments, seen

    measure = jax.jit(lambda parameters, tokens: loss(parameters, tokens)[0])
    used_before, seen_nats = state.cpu_seconds - _used(), []
    began, first = time.monotonic(), state.step
    while state.step < stop:
        length = max(length for share, length in LENGTHS if state.step >= share * steps)
        tokens = texts.batch(state.step, length)
        state.parameters, state.optimizer, (nats, uneven) = advance(
            state.parameters, state.optimizer, tokens
        )
        seen_nats.append(float(nats))
        state.step += 1
        if state.step % EVERY and state.step != stop:
            continue
        state.cpu_seconds = used_before + _used()
        state.curve.append(
            {
                "step": state.step,
                "tokens": state.step * BATCH,
                "training": float(np.mean(seen_nats)),
                "held_out": held_out_loss(texts, measure, state.parameters),
                "cpu_seconds": state.cpu_seconds,
            }
        )
        last = state.curve[-1]
        per_step = (time.monotonic() - began) / (state.step - first)
        print(
            f"step {state.step:5}/{steps}  training {last['training']:.3f}  held out"
            f" {last['held_out']:.3f} nats/token  imbalance {float(uneven):.2f}"
            f"  {state.cpu_seconds:.0f} CPU s, {per_step:.2f} s a step",
            flush=True,
        )
        seen_nats = []
        state.save(saved)
        draw(state.curve, saved.with_name("curve.svg"))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/miniature"))
    parser.add_argument("--steps", type=int, default=STEPS, help="the rate falls to 0 by then")
    parser.add_argument("--stop", type=int, help="stop earlier, and keep the state")
    arguments = parser.parse_args()
    train(arguments.work, steps=arguments.steps, stop=arguments.stop or arguments.steps)


if __name__ == "__main__":
    main()
