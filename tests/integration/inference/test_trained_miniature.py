"""The trained miniature that ships: its text on every mesh, and the reference code's logits."""

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import FLOAT32_BOUND, score_logits, start
from places import PROJECT

from grokctl.checkpoint.frames import Compression
from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.checkpoint.release import Release, open_release
from grokctl.checkpoint.tensor_source import ReleaseSource
from grokctl.checkpoint.trained import TRAINED, held_out_text
from grokctl.inference.engine import Engine
from grokctl.model.placement import MeshShape
from grokctl.model.sampling import Sampling
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard

MESHES = ["model=1", "model=2", "model=4", "model=8", "model=16", "expert=2,model=8"]
REFERENCE = os.environ.get("GROKCTL_REFERENCE")
"""Folder of the public reference code."""
REFERENCE_PYTHON = os.environ.get("GROKCTL_REFERENCE_PYTHON")
"""A Python that can run it."""
PROMPT = "The with statement is used to wrap the execution of a block with methods"


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


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_every_mesh_says_the_same(release, text, mesh):
    assert text_of(start(ReleaseSource(release), mesh)) == text


def test_resharding_compressing_and_going_back_keep_the_text(release, text, tmp_path):
    packed = cut(release, "model=8", tmp_path / "packed", compression=Compression(3))
    back = cut(packed, "model=1", tmp_path / "back")

    assert text_of(start(packed, "model=8")) == text
    assert text_of(start(back, "model=1")) == text


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.skipif(not REFERENCE or not REFERENCE_PYTHON, reason="no reference code is given")
@pytest.mark.parametrize("mesh", MESHES)
def test_its_logits_are_the_reference_codes(release, mesh, tmp_path):
    """GROKCTL_REFERENCE is its folder, GROKCTL_REFERENCE_PYTHON has its requirements."""
    engine = start(ReleaseSource(release), mesh)
    tokens = engine.plan.encode(held_out_text())[:128]
    np.save(tmp_path / "tokens.npy", np.asarray(tokens, np.int32))
    program = PROJECT / "tests" / "support" / "reference_code.py"
    places = [REFERENCE, TRAINED, tmp_path / "tokens.npy", tmp_path / "logits.npy"]
    subprocess.run([REFERENCE_PYTHON, program, *places], check=True)
    wanted = np.load(tmp_path / "logits.npy")

    found = score_logits(engine, tokens)

    assert wanted.std() > 1  # of a model that learned something
    assert np.abs(found - wanted).max() < FLOAT32_BOUND * np.abs(wanted).max()
