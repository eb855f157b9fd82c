"""Logits and greedy text of the golden miniatures, through resharded files, on every mesh."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import FLOAT32_BOUND, error_of, load_golden, score_logits, start

from grokctl.checkpoint.frames import Compression
from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.checkpoint.tensor_source import ReleaseSource
from grokctl.errors import PlacementError
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute, Precision
from grokctl.model.sampling import Sampling
from grokctl.native.binary import SWITCH
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard

pytestmark = pytest.mark.optimized

MESHES = [
    pytest.param(name, mesh, id=f"{name}-{mesh}")
    for name, meshes in {
        "two-layers": ["model=1", "model=4", "model=8", "expert=2,model=8"],
        "three-layers": ["model=1", "model=4", "model=8", "model=16"],
        "eleven-layers": ["model=1", "model=4", "model=8", "expert=2,model=8"],
    }.items()
    for mesh in meshes
]


def cut(name: str, mesh: str, folder: Path, **options: Any) -> ReadyCheckpoint:
    release = load_golden(name).release
    return reshard(
        plan_reshard(
            release, ReshardOptions(mesh=MeshShape.parse(mesh), out=folder / "ready", **options)
        )
    )


@pytest.mark.parametrize(("name", "mesh"), MESHES)
def test_float32_matches_the_reference_and_so_does_greedy_text(name, mesh, tmp_path):
    golden = load_golden(name)
    engine = start(cut(name, mesh, tmp_path), mesh)

    error = error_of(engine, golden)
    generation = engine.generate(
        golden.tokens, sampling=Sampling(temperature=0), max_tokens=16, ignore_eos=True
    )
    ids = [token.id for token in generation]

    assert error < FLOAT32_BOUND
    assert ids == golden.greedy


@pytest.mark.parametrize(("name", "mesh"), MESHES)
def test_bfloat16_is_within_twice_the_reference_s_own_error(name, mesh, tmp_path):
    golden = load_golden(name)

    error = error_of(start(cut(name, mesh, tmp_path), mesh, Compute.BFLOAT16), golden)

    assert 0 < error < golden.bfloat16_bound


@pytest.mark.parametrize("mesh", ["model=1", "model=4", "expert=2,model=8"])
@pytest.mark.parametrize("compression", [None, Compression(1)], ids=["plain", "zstd"])
def test_weights_stored_in_another_precision_keep_its_bound(mesh, compression, tmp_path):
    golden = load_golden("two-layers")
    errors = {
        precision: error_of(
            start(
                cut(
                    "two-layers",
                    mesh,
                    tmp_path / precision,
                    precision=precision,
                    compression=compression,
                ),
                mesh,
            ),
            golden,
        )
        for precision in (Precision.FLOAT32, Precision.BFLOAT16)
    }

    assert errors[Precision.FLOAT32] < FLOAT32_BOUND < errors[Precision.BFLOAT16]
    assert errors[Precision.BFLOAT16] < golden.bfloat16_bound


@pytest.mark.parametrize("mesh", ["model=1", "expert=2,model=8"])
@pytest.mark.parametrize("compute", Compute)
def test_both_forms_of_a_product_on_a_cpu_keep_the_bounds(monkeypatch, mesh, compute, tmp_path):
    golden = load_golden("two-layers")
    ready = cut("two-layers", mesh, tmp_path)
    kernel = start(ready, mesh, compute)
    monkeypatch.setenv(SWITCH, "off")
    without = start(ready, mesh, compute)

    errors = [error_of(engine, golden) for engine in (kernel, without)]

    assert without.kernel.startswith("XLA")
    bound = FLOAT32_BOUND if compute is Compute.FLOAT32 else golden.bfloat16_bound
    assert max(errors) < bound


def test_logits_through_the_cache_match_the_reference():
    golden = load_golden("two-layers")
    engine = start(ReleaseSource(golden.release), "model=1")

    score_logits(engine, golden.tokens)
    rows = [
        engine.runner.decode([0], [token], [len(golden.tokens) + step]).on_host()[0]
        for step, token in enumerate(golden.greedy)
    ]

    assert np.abs(np.stack(rows) - golden.continuation).max() < FLOAT32_BOUND


def test_a_prompt_in_many_chunks_gives_the_logits_of_one():
    golden = load_golden("two-layers")
    engine = start(ReleaseSource(golden.release), "model=2")
    whole = score_logits(engine, golden.tokens)

    engine.runner.longest_chunk = 16  # 24 tokens: one full chunk and a padded one
    parts = score_logits(engine, golden.tokens)

    assert np.abs(parts - whole).max() < FLOAT32_BOUND


def test_a_ready_checkpoint_runs_on_another_mesh(tmp_path):
    golden = load_golden("two-layers")
    ready = cut("two-layers", "expert=2,model=8", tmp_path)

    assert error_of(start(ready, "model=4"), golden) < FLOAT32_BOUND


@pytest.mark.parametrize("name", ["two-layers", "eleven-layers"])
def test_sixteen_ways_is_impossible_and_the_nearest_mesh_is_named(name, tmp_path):
    with pytest.raises(PlacementError) as caught:
        cut(name, "model=16", tmp_path)

    assert caught.value.hint == "--devices 16 --mesh expert=2,model=8"
