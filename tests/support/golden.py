"""The golden miniatures: releases with the logits that the public reference code computes."""

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from places import DATA, PROJECT

from grokctl.checkpoint.release import Release, open_release
from grokctl.checkpoint.tensor_source import TensorSource
from grokctl.infer import infer
from grokctl.inference.engine import Engine
from grokctl.inference.plan import EngineOptions
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute

_FOLDERS = (DATA, PROJECT.parent / "shared" / "golden")

FLOAT32_BOUND = 2e-5


@dataclass(frozen=True)
class Golden:
    release: Release
    tokens: list[int]
    float32: NDArray[np.float32]
    bfloat16: NDArray[np.float32]
    greedy: list[int]
    continuation: NDArray[np.float32]

    @property
    def bfloat16_bound(self) -> float:
        """Twice the reference's own error."""
        return 2 * float(np.abs(self.bfloat16 - self.float32).max())


def load_golden(name: str) -> Golden:
    root = next((folder / name for folder in _FOLDERS if (folder / name).is_dir()), None)
    if root is None:
        pytest.skip(f"the golden miniature {name} is not beside this checkout")
    with np.load(root / "reference.npz") as reference:
        return Golden(
            release=open_release(root),
            tokens=reference["tokens"].tolist(),
            float32=reference["logits_float32"],
            bfloat16=reference["logits_bfloat16"],
            greedy=reference["greedy_float32"].tolist(),
            continuation=reference["continuation_logits_float32"],
        )


def start(source: TensorSource, mesh: str, compute: Compute = Compute.FLOAT32) -> Engine:
    return infer(source, EngineOptions(mesh=MeshShape.parse(mesh), compute=compute))


def score_logits(engine: Engine, tokens: list[int]) -> NDArray[np.float32]:
    logits = np.zeros((len(tokens), engine.config.vocab_size), np.float32)
    engine.score(tokens, logits_out=logits)
    return logits


def error_of(engine: Engine, golden: Golden) -> float:
    return float(np.abs(score_logits(engine, golden.tokens) - golden.float32).max())
