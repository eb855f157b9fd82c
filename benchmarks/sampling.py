"""What a token costs once its logits are there, beside what it costs to go through them once.

Rows of Grok-1's vocabulary with Gaussian logits. On the host, for one row: `definition` sorts all
tokens, `row` is `Sampling.choose`, `candidates` is `merge` and `Sampling.choose_from`. On a device
of the default backend: `devices` is `largest` for one row, `devices_16` for one of 16. `exp` goes
through the row once, in float64: no exact form on the host is faster. `undecided` is the share of
draws for which the candidates do not suffice, so that the row is needed.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from grokctl.model.axes import MODEL_AXIS
from grokctl.model.candidates import largest, merge
from grokctl.model.config import GROK_1
from grokctl.model.sampling import Sampling

VOCAB = GROK_1.vocab_size
COUNT = 256
DRAWS = 1000
SETTINGS = {
    "T 0.7, top-p 0.95": Sampling(temperature=0.7, top_p=0.95),
    "T 1, top-k 40": Sampling(temperature=1.0, top_k=40),
    "T 1": Sampling(temperature=1.0),
}


def milliseconds(rounds: int, **works: Callable[[], Any]) -> dict[str, float]:
    """The shortest time of each work; the works take turns."""
    shortest = dict.fromkeys(works, float("inf"))
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            shortest[name] = min(shortest[name], time.perf_counter() - started)
    return {name: seconds * 1e3 for name, seconds in shortest.items()}


def devices_find(rows: np.ndarray[Any, np.dtype[np.float32]], temperature: float) -> Any:
    """`largest` of rows that are on a device already."""
    everywhere, split = PartitionSpec(), PartitionSpec(None, MODEL_AXIS)
    program = jax.jit(
        jax.shard_map(
            partial(largest, count=COUNT),
            mesh=Mesh(jax.devices()[:1], (MODEL_AXIS,), axis_types=(AxisType.Auto,)),
            in_specs=(split, everywhere, everywhere, everywhere),
            out_specs=split,
            check_vma=False,
        )
    )
    none = np.zeros((len(rows), 0))
    arguments = (
        jax.device_put(rows),
        np.full(len(rows), temperature, np.float32),
        none.astype(np.int32),
        none.astype(np.float32),
    )
    return lambda: np.asarray(program(*arguments))


def measure(sampling: Sampling, spread: float, rounds: int) -> dict[str, float]:
    """Milliseconds for a token of each form, and how often candidates do not decide."""
    rows = np.random.default_rng(0).standard_normal((16, VOCAB), dtype=np.float32)
    rows *= np.float32(spread)
    row, temperature = rows[0], sampling.temperature
    one, sixteen = devices_find(rows[:1], temperature), devices_find(rows, temperature)
    part = one()
    candidates = merge(part, vocab=VOCAB, count=COUNT, temperature=temperature)
    wide = row.astype(np.float64) - row.max()
    times = milliseconds(
        rounds,
        row=lambda: sampling.choose(row, 0),
        exp=lambda: np.exp(wide),
        candidates=lambda: sampling.choose_from(
            merge(part, vocab=VOCAB, count=COUNT, temperature=temperature), 0
        ),
    )
    few = max(rounds // 10, 2)
    times |= milliseconds(few, definition=lambda: sampling.distribution(row))
    times |= milliseconds(rounds, devices=one)
    times |= milliseconds(few, devices_16=sixteen)
    times["devices_16"] /= len(rows)
    drawn = [sampling.choose_from(candidates, step) for step in range(DRAWS)]
    return {
        **{name: round(value, 3) for name, value in times.items()},
        "row_of_exp": round(times["row"] / times["exp"], 2),
        "undecided": drawn.count(None) / DRAWS,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {
        (name, spread): measure(sampling, spread, options.rounds)
        for name, sampling in SETTINGS.items()
        for spread in (1, 2, 3, 4, 5)
    }
    if options.json:
        table = [{"settings": n, "deviation": s, **row} for (n, s), row in found.items()]
        print(json.dumps({"backend": jax.default_backend(), "vocab": VOCAB, "rows": table}))
        return
    columns = (
        "definition", "row", "candidates", "devices", "devices_16", "exp", "row_of_exp", "undecided"
    )  # fmt: skip
    print(f"ms for a token of {VOCAB:,}, on {jax.default_backend()}; the best of {options.rounds}")
    print(f"{'':18} {'deviation':>9} " + " ".join(f"{name:>10}" for name in columns))
    for (name, spread), row in found.items():
        print(f"{name:18} {spread:>9} " + " ".join(f"{row[column]:>10}" for column in columns))


if __name__ == "__main__":
    main()
