"""Which experts a text uses: counted layer by layer, and kept under home."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.checkpoint.tensor_source import TensorSource, digest_of_small
from grokctl.errors import UsageError
from grokctl.events import Advanced, Finished, Observer, Stage, Started, Unit, ignore
from grokctl.inference.chunks import chunks
from grokctl.inference.engine import Engine
from grokctl.os_errors import refusal
from grokctl.paths import read_limited, write_atomically
from grokctl.planning.residence import Counts

_LARGEST: Final = 2**22
"""Bytes of a kept file: 256 layers of 4,096 experts are fewer."""
_FEWEST: Final = 2
"""Tokens of a chunk: one token alone is decoded, in programs of several layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How often each expert was chosen."""

    tokens: int
    counts: Counts

    def __add__(self, other: "Routing") -> "Routing":
        """Both texts together."""
        sums = np.array(self.counts) + np.array(other.counts)
        return Routing(tokens=self.tokens + other.tokens, counts=_rows(sums))


def count_experts(engine: Engine, tokens: Sequence[int], *, observe: Observer = ignore) -> Routing:
    """Run a text and count the choices of every layer.

    A text longer than the context is cut into texts of its length. A single token at the end of
    one is left out.

    Args:
        engine: Used by nobody else meanwhile.
        tokens: Ids of the text, at least two.
        observe: Receives progress in tokens.

    Raises:
        UsageError: There are fewer than two tokens.
    """
    if len(tokens) < _FEWEST:
        raise UsageError(f"the text has {len(tokens)} tokens, expected at least {_FEWEST}")
    runner, config = engine.runner, engine.config
    total: NDArray[np.int64] = np.zeros((config.num_layers, config.num_experts), np.int64)
    observe(Started(stage=Stage.SCORE, total=len(tokens), unit=Unit.TOKENS))
    read = 0
    for first in range(0, len(tokens), engine.context):
        part = tokens[first : first + engine.context]
        for chunk in chunks(0, len(part), longest=runner.longest_chunk, past=runner.past):
            if chunk.count >= _FEWEST:
                total += runner.read_and_count(0, part, chunk)
                read += chunk.count
            observe(Advanced(stage=Stage.SCORE, done=first + chunk.end))
    observe(Finished(stage=Stage.SCORE))
    return Routing(tokens=read, counts=_rows(total))


def kept_at(folder: Path, source: TensorSource) -> Path:
    """Where the counts of a checkpoint are kept in a folder: by the sha256 of its manifest.

    A release has none; it is known by its norms and routers.
    """
    if isinstance(source, ReadyCheckpoint):
        name = source.manifest_sha256
    else:
        name = digest_of_small(source)
    return folder / f"{name}.json"


def counts_of(folder: Path, source: TensorSource) -> Counts | None:
    """The counts that a folder keeps for a checkpoint; None if there are none for its layers."""
    kept, config = read_kept(kept_at(folder, source)), source.config
    if kept is None or np.shape(kept.counts) != (config.num_layers, config.num_experts):
        return None
    return kept.counts


def keep(path: Path, routing: Routing) -> Routing:
    """Add counts to those that are kept, and return the sum.

    What is kept and cannot be read, or is of another model, is replaced.

    Raises:
        GrokctlError: The file cannot be written.
    """
    before = read_kept(path)
    if before is not None and np.shape(before.counts) == np.shape(routing.counts):
        routing += before
    values = {"version": 1, "tokens": routing.tokens, "counts": routing.counts}
    try:
        write_atomically(path, json.dumps(values).encode())
    except OSError as error:
        raise refusal(error, path) from error
    return routing


def read_kept(path: Path) -> Routing | None:
    """The counts that are kept; None if there are none, or something else is there."""
    try:
        values = json.loads(read_limited(path, _LARGEST))
        counts = np.array(values["counts"])
        if values["version"] != 1 or counts.ndim != 2 or counts.dtype.kind != "i":  # noqa: PLR2004
            return None
        if counts.min() < 0:
            return None
        return Routing(tokens=int(values["tokens"]), counts=_rows(counts))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _rows(counts: NDArray[np.int64]) -> Counts:
    return tuple(tuple(map(int, row)) for row in counts)
