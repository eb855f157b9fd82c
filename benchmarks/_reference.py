"""One token of the public reference code, run from a folder of its files on 8 virtual CPU devices.

A process of its own, for a Python that has what the reference needs: haiku, and a JAX of its age.
Nothing of grokctl is imported. The last line of its output is JSON.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

MODEL = ("vocab_size", "pad_token", "eos_token")
SCALES = ("embedding_multiplier_scale", "output_multiplier_scale")
LAYERS = (
    "emb_size",
    "widening_factor",
    "key_size",
    "num_q_heads",
    "num_kv_heads",
    "num_layers",
    "attn_output_multiplier",
    "num_experts",
    "num_selected_experts",
)
STEPS = 2
"""Decode steps: one in which it compiles, and one that counts."""


class EnoughError(Exception):
    """All that is wanted was measured."""


class Numbers:
    """Stands in for its tokenizer, which the layers of a benchmark have none of."""

    def __init__(self, model_file: str) -> None:
        del model_file

    def encode(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]


def timed(function: Callable[..., Any], *, limit: int) -> tuple[Callable[..., Any], list[float]]:
    """A function that notes how long it took to the last byte, and ends all after some calls."""
    import jax  # noqa: PLC0415

    spent: list[float] = []

    def call(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        found = jax.block_until_ready(function(*arguments, **named))
        spent.append(time.perf_counter() - began)
        if len(spent) == limit:
            raise EnoughError
        return found

    return call, spent


def measure(release: Path) -> dict[str, float]:
    """Seconds to load the release, and for a token; the folder of the code is on the path."""
    import checkpoint  # noqa: PLC0415
    import model  # noqa: PLC0415
    import runners  # noqa: PLC0415

    runners.sentencepiece.SentencePieceProcessor = Numbers
    checkpoint.restore, load = timed(checkpoint.restore, limit=2)
    config = json.loads((release / "config.json").read_text())
    layers = model.TransformerConfig(
        **{name: config[name] for name in LAYERS}, shard_activations=True
    )
    server = runners.InferenceRunner(
        name="local",
        load=str(release),
        tokenizer_path="",
        pad_sizes=(16,),
        local_mesh_config=(1, 8),  # it runs on no other: scale rows must meet their shards
        between_hosts_config=(1, 1),
        runner=runners.ModelRunner(
            model=model.LanguageModelConfig(
                model=layers,
                sequence_len=256,
                **{name: config[name] for name in MODEL + SCALES},
            ),
            bs_per_device=1 / 8,
            checkpoint_path=str(release),
        ),
    )
    server.initialize()
    server.sample_step, steps = timed(server.sample_step, limit=STEPS)
    with suppress(EnoughError):
        runners.sample_from_model(server.run(), "5 6 7", max_len=STEPS, temperature=0.01)
    return {"load_s": load[0], "token_s": steps[-1], "layers": config["num_layers"]}


def run_reference(code: Path, python: Path, release: Path) -> dict[str, Any]:
    """Do all this in a process of its own.

    Args:
        code: The folder of model.py, checkpoint.py, run.py and runners.py.
        python: One that has what they import.
        release: Layers as they are released.

    Returns:
        Nothing if it cannot be run, which is then said.
    """
    command = [python, __file__, code, release]
    process = subprocess.run(command, capture_output=True, check=False)
    try:
        found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        lines = process.stderr.decode().splitlines()
        found = {"error": lines[-1] if lines else f"exit {process.returncode}"}
    if "error" in found:
        print(f"the reference is left out: {found['error']} (--reference-python PATH?)")
        return {}
    return found


def main() -> None:
    """Arguments: the folder of model.py and the others, and that of a release."""
    folder, release = sys.argv[1:]
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    sys.path.insert(0, folder)
    try:
        found: dict[str, Any] = measure(Path(release))
    except (ImportError, AttributeError) as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
