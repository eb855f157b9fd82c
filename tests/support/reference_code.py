"""Logits that the public reference code computes on a release: a program for its own environment.

    python reference_code.py CODE RELEASE TOKENS.npy OUT.npy

CODE is a folder with `model.py`, `checkpoint.py` and `runners.py`, and `python` has what its
`requirements.txt` names (JAX 0.4.25, with Python 3.11). The code runs on eight virtual devices, as
published, but with float32 wherever it says bfloat16. It unpickles the release.
"""

import json
import os
import sys
import types
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import haiku as hk  # type: ignore[import-not-found]
import jax
import jax.numpy as jnp
import numpy as np


def imported(name: str, code: Path) -> types.ModuleType:
    """A module of the reference code, in float32."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    text = (code / f"{name}.py").read_text(encoding="utf-8").replace("jnp.bfloat16", "jnp.float32")
    exec(compile(text, f"{name}.py", "exec"), module.__dict__)
    return module


def wide(values: jax.Array) -> jax.Array:
    """Floats as float32; integers as they are."""
    return values if values.dtype == jnp.int8 else values.astype(jnp.float32)


def main() -> None:
    """Write the logits: `(tokens, vocabulary)` float32."""
    code, release, tokens, out = (Path(argument) for argument in sys.argv[1:])
    model, _, runners = (imported(name, code) for name in ("model", "checkpoint", "runners"))
    config = json.loads((release / "config.json").read_text(encoding="utf-8"))
    names = model.TransformerConfig.__dataclass_fields__.keys() & config.keys() - {"vocab_size"}
    transformer = model.TransformerConfig(**{name: config.pop(name) for name in names})
    runner = runners.ModelRunner(
        model=model.LanguageModelConfig(**config, model=transformer),
        bs_per_device=0.125,
        checkpoint_path=str(release),
        transform_forward=True,
    )
    blank = np.zeros((1, config["sequence_len"]), np.int32)
    data = {"inputs": blank, "targets": blank}
    runner.initialize(data, local_mesh_config=(1, 8), between_hosts_config=(1, 1))
    parameters = jax.tree_util.tree_map(wide, runner.load_or_init(data))
    logits_of = hk.transform(lambda ids: runner.model.make(runner.mesh)(ids))  # noqa: PLW0108
    forward = hk.without_apply_rng(logits_of)
    with runner.mesh:
        logits = forward.apply(parameters, np.load(tokens)[None]).logits
    np.save(out, np.asarray(logits[0], np.float32))


if __name__ == "__main__":
    main()
