"""What the trained miniature says about precision: bits per token of text that it has not seen.

Prints the table of precisions, that of mistakes in the arithmetic, and what a model of pairs of
tokens reaches.
"""

import argparse
import tempfile
from functools import partial
from math import log
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray
from training import network
from training.bigrams import Bigrams
from training.releases import floats_of, floats_of_release, parameters_from
from training.state import trained
from training.texts import Texts, prepared

from grokctl.checkpoint.release import Release, open_release
from grokctl.checkpoint.tensor_source import ReleaseSource, TensorSource
from grokctl.infer import infer
from grokctl.inference.plan import EngineOptions
from grokctl.model.config import GrokConfig
from grokctl.model.experts import route
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute, KvType, Precision
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard

ONE: Final = MeshShape(1, 1)
LENGTH: Final = 256
Floats = dict[str, NDArray[np.float32]]


def windows_of(texts: Texts, count: int) -> NDArray[np.int32]:
    """`(count, LENGTH + 1)` tokens, spread over all held-out texts."""
    starts = np.linspace(0, len(texts.held_out) - LENGTH - 1, count).astype(int)
    rows = [texts.held_out[start : start + LENGTH + 1] for start in starts]
    return np.stack(rows).astype(np.int32)


def all_windows(texts: Texts) -> NDArray[np.int32]:
    """`(windows, LENGTH + 1)` tokens: all held-out text, each token predicted once."""
    starts = range(0, len(texts.held_out) - LENGTH, LENGTH)
    return np.stack([texts.held_out[at : at + LENGTH + 1] for at in starts]).astype(np.int32)


def bits_of_engine(
    source: TensorSource,
    windows: NDArray[np.int32],
    compute: Compute = Compute.FLOAT32,
    kv: KvType = KvType.COMPUTE,
) -> float:
    """Bits per token, as `grokctl score` computes them on one device."""
    engine = infer(source, EngineOptions(mesh=ONE, compute=compute, kv=kv, context=2 * LENGTH))
    nats = sum(engine.score(window.tolist()).nll for window in windows)
    return nats / log(2) / (len(windows) * LENGTH)


def bits_of_floats(floats: Floats, config: GrokConfig, windows: NDArray[np.int32]) -> float:
    """Bits per token in the form that is trained, in float32."""
    operand = jnp.dtype(jnp.float32)
    loss = jax.jit(lambda found, part: network.loss_of(found, part, config=config, operand=operand))
    parameters = parameters_from(floats, config)
    parts = np.array_split(windows, max(1, len(windows) // 8))
    nats = sum(float(loss(parameters, part)[0]) * len(part) for part in parts)
    return nats / len(windows) / log(2)


def precisions(release: Release, windows: NDArray[np.int32]) -> dict[str, float]:
    """Bits per token of a release in every form that `reshard` and `run` offer."""
    int8 = ReleaseSource(release)
    found = {
        "int8": bits_of_engine(int8, windows),
        "int8, --kv int8": bits_of_engine(int8, windows, kv=KvType.INT8),
        "int8, --compute bfloat16": bits_of_engine(int8, windows, Compute.BFLOAT16),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, options in (
            ("bf16", {"precision": Precision.BFLOAT16}),
            ("int4, groups of 128", {"precision": Precision.INT4, "group_size": 128}),
            ("int4, groups of 64", {"precision": Precision.INT4, "group_size": 64}),
            ("int4, groups of 32", {"precision": Precision.INT4, "group_size": 32}),
        ):
            out = Path(folder) / name.replace(" ", "-")
            plan = plan_reshard(release, ReshardOptions(mesh=ONE, out=out, **options))
            found[name] = bits_of_engine(reshard(plan), windows)
    return found


def mistakes(release: Release, windows: NDArray[np.int32]) -> dict[str, float]:
    """Bits per token with one mistake each in the arithmetic.

    Gates that are renormalised multiply what a token has of its experts by a number, and the norm
    behind takes it out again: that mistake costs nothing in any model of this architecture.
    """
    right, config = floats_of_release(release), release.config
    bits = partial(bits_of_floats, config=config, windows=windows)

    def renormalised(*arguments: Any, **named: Any) -> tuple[Array, Array]:
        gates, chosen = route(*arguments, **named)
        return gates / jnp.sum(gates, axis=-1, keepdims=True), chosen

    swapped = dict(right)
    for name in [name for name in right if name.endswith("moe.gate")]:
        up = name.replace("gate", "up")
        swapped[name], swapped[up] = right[up], right[name]
    exchanged = dict(right)
    for name in [name for name in right if name.startswith("layers.1.")]:
        other = name.replace("layers.1.", "layers.2.")
        exchanged[name], exchanged[other] = right[other], right[name]
    found = {
        "none": bits(right),
        "one scale row for all groups": bits(_with_one_row(release)),
        "gate and up swapped": bits(swapped),
        "layers 1 and 2 swapped": bits(exchanged),
    }
    with patch.object(network, "route", renormalised):
        found["gates renormalised"] = bits(right)
    return found


def _with_one_row(release: Release) -> Floats:
    found = floats_of_release(release)
    for tensor in release.tensors:
        weight, scales = tensor.map()
        if scales is not None:
            first = np.asarray(scales[..., :1, :]).astype(np.float32)
            found[tensor.spec.name] = np.array(weight, np.float32) * first
    return found


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/miniature"))
    parser.add_argument("--release", type=Path, default=Path("build/miniature/miniature"))
    parser.add_argument("--windows", type=int, default=64)
    arguments = parser.parse_args()
    texts, release = prepared(arguments.work), open_release(arguments.release)
    windows = windows_of(texts, arguments.windows)
    per_byte = len(texts.held_out) / texts.held_out_bytes
    training = np.concatenate(list(texts.train.values()))
    pairs = Bigrams.of(training, release.config.vocab_size)
    everything = all_windows(texts)
    of_pairs = pairs.bits(texts.held_out) / (len(texts.held_out) - 1)
    of_int8 = bits_of_floats(floats_of_release(release), release.config, everything)
    print(
        f"all {len(texts.held_out):,} held-out tokens, bits per byte: int8"
        f" {of_int8 * per_byte:.3f}, pairs of tokens {of_pairs * per_byte:.3f},"
        f" {1 - of_int8 / of_pairs:.1%} fewer\n"
    )
    floats = floats_of(trained(arguments.work / "state.npz")[0])
    found = {
        "float32, as trained": bits_of_floats(floats, release.config, windows),
        **precisions(release, windows),
    }
    print("| form | bits per token | bits per byte | more than int8 |")
    print("| --- | ---: | ---: | ---: |")
    for name, bits in found.items():
        more = bits / found["int8"] - 1
        print(f"| {name} | {bits:.3f} | {bits * per_byte:.3f} | {more:+.2%} |")
    print("\n| mistake | bits per token | more |\n| --- | ---: | ---: |")
    wrong = mistakes(release, windows)
    for name, bits in wrong.items():
        print(f"| {name} | {bits:.3f} | {bits - wrong['none']:+.3f} |")


if __name__ == "__main__":
    main()
