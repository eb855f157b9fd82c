"""The state of a training, as a file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from training.network import initial_parameters
from training.recipe import CONFIG, SEED

from grokctl.model.parameters import Parameters


@dataclass(slots=True)
class State:
    """What a training step changes."""

    parameters: Any
    optimizer: Any
    step: int
    cpu_seconds: float
    """Of user and system, in all runs together."""
    curve: list[dict[str, float]]

    def save(self, path: Path) -> None:
        """Replace the file."""
        leaves = jax.tree.leaves((self.parameters, self.optimizer))
        arrays = {f"leaf{index:03d}": np.asarray(leaf) for index, leaf in enumerate(leaves)}
        facts = {"step": self.step, "cpu_seconds": self.cpu_seconds, "curve": self.curve}
        new = path.with_suffix(".new")
        with new.open("wb") as file:
            np.savez(file, facts=np.array(json.dumps(facts)), allow_pickle=False, **arrays)
        new.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a file."""
        like, tree = jax.tree.flatten((self.parameters, self.optimizer))
        with np.load(path) as saved:
            leaves = [jnp.asarray(saved[f"leaf{index:03d}"]) for index in range(len(like))]
            facts = json.loads(str(saved["facts"]))
        self.parameters, self.optimizer = jax.tree.unflatten(tree, leaves)
        self.step, self.cpu_seconds = facts["step"], facts["cpu_seconds"]
        self.curve = facts["curve"]


def trained(path: Path) -> tuple[Parameters, State]:
    """The parameters in a file, without what the optimizer has."""
    state = State(initial_parameters(CONFIG, SEED), None, 0, 0.0, [])
    state.load(path)
    return state.parameters, state
