"""The trained miniature that ships: its text on every mesh, and the reference code's logits."""

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import FLOAT32_BOUND, score_logits
from places import PROJECT

from grokctl.checkpoint.frames import Compression
from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.checkpoint.release import Release, open_release
from grokctl.checkpoint.tensor_source import ReleaseSource, TensorSource
from grokctl.checkpoint.trained import TRAINED, UNSEEN
from grokctl.infer import infer
from grokctl.inference.engine import Engine
from grokctl.inference.plan import EngineOptions
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute
from grokctl.model.sampling import Sampling
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard

MESHES = ["model=1", "model=2", "model=4", "model=8", "model=16", "expert=2,model=8"]
REFERENCE = os.environ.get("GROKCTL_REFERENCE")
"""Folder of the public reference code."""
REFERENCE_PYTHON = os.environ.get("GROKCTL_REFERENCE_PYTHON")
"""A Python that can run it."""
PROMPT = "Raise an exception if"


def start(source: TensorSource, mesh: str) -> Engine:
    options = EngineOptions(mesh=MeshShape.parse(mesh), compute=Compute.FLOAT32)
    return infer(source, options, tokenizer=TRAINED / "tokenizer.model")


def text_of(engine: Engine) -> str:
    stream = engine.generate(
        engine.plan.encode(PROMPT),
        sampling=Sampling(temperature=0),
        max_tokens=24,
        ignore_eos=True,
    )
    for _ in stream:
        pass
    return stream.result.text


def cut(source: Release | ReadyCheckpoint, mesh: str, out: Path, **options: Any) -> ReadyCheckpoint:
    plan = plan_reshard(source, ReshardOptions(mesh=MeshShape.parse(mesh), out=out, **options))
    return reshard(plan)


@pytest.fixture(scope="module")
def release():
    return open_release(TRAINED)


@pytest.fixture(scope="module")
def text(release):
    return text_of(start(ReleaseSource(release), "model=1"))


@pytest.mark.parametrize("mesh", ["model=2", "expert=2,model=8"])
def test_every_mesh_says_the_same(release, text, mesh):
    """Those of the demo, 4, 8 and 16, are compared in the test of the demo."""
    assert text_of(start(ReleaseSource(release), mesh)) == text


def test_resharding_compressing_and_going_back_keep_the_text(release, text, tmp_path):
    packed = cut(release, "model=8", tmp_path / "packed", compression=Compression(3))
    back = cut(packed, "model=1", tmp_path / "back")

    assert text_of(start(packed, "model=8")) == text
    assert text_of(start(back, "model=1")) == text


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """Tokens, and the logits of the reference code: `(tokens, vocabulary)` float32."""
    if not REFERENCE or not REFERENCE_PYTHON:
        pytest.skip("GROKCTL_REFERENCE and GROKCTL_REFERENCE_PYTHON are not given")
    folder = tmp_path_factory.mktemp("reference")
    tokens = start(ReleaseSource(open_release(TRAINED)), "model=1").plan.encode(UNSEEN)[:128]
    np.save(folder / "tokens.npy", np.asarray(tokens, np.int32))
    program = PROJECT / "tests" / "support" / "reference_code.py"
    places = [REFERENCE, TRAINED, folder / "tokens.npy", folder / "logits.npy"]
    own = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XLA"))}
    subprocess.run([REFERENCE_PYTHON, program, *places], check=True, env=own)
    return tokens, np.load(folder / "logits.npy")


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("mesh", MESHES)
def test_its_logits_are_the_reference_codes(release, wanted, mesh):
    """GROKCTL_REFERENCE is a folder with it, GROKCTL_REFERENCE_PYTHON has its requirements."""
    tokens, logits = wanted

    found = score_logits(start(ReleaseSource(release), mesh), tokens)

    assert logits.std() > 1  # of a model that learned something
    assert np.abs(found - logits).max() < FLOAT32_BOUND * np.abs(logits).max()
