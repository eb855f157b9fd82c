"""The golden miniatures through the forms for GPUs, whose kernels run as ordinary operations."""

import jax.numpy as jnp
import pytest
from golden import FLOAT32_BOUND, error_of, load_golden, start

from grokctl.checkpoint.tensor_source import ReleaseSource
from grokctl.inference import engine as engines
from grokctl.model import attention, bucketing, kernels, matmul
from grokctl.model.matmul import einsum
from grokctl.model.precision import Compute
from grokctl.model.sampling import Sampling
from grokctl.model.step_spec import KernelForm, StepShape

pytestmark = pytest.mark.heavy

MESHES = [
    pytest.param("two-layers", "model=1", id="two-layers-model=1"),
    pytest.param("two-layers", "expert=2,model=8", id="two-layers-expert=2,model=8"),
    pytest.param("three-layers", "model=16", id="three-layers-model=16"),
    pytest.param("two-layers", "model=4", marks=pytest.mark.slow, id="two-layers-model=4"),
    pytest.param("two-layers", "model=8", marks=pytest.mark.slow, id="two-layers-model=8"),
    pytest.param("three-layers", "model=8", marks=pytest.mark.slow, id="three-layers-model=8"),
    pytest.param("eleven-layers", "model=4", marks=pytest.mark.slow, id="eleven-layers-model=4"),
    pytest.param(
        "eleven-layers",
        "expert=2,model=8",
        marks=pytest.mark.slow,
        id="eleven-layers-expert=2,model=8",
    ),
]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    def shape(**facts):
        facts |= {"platform": "gpu", "has_kernel": True, "kernel_form": KernelForm.INTERPRETED}
        return StepShape(**facts)

    monkeypatch.setattr(engines, "StepShape", shape)
    monkeypatch.setattr(kernels, "_PROGRAMS", 8)  # an interpreter runs one after the other
    monkeypatch.setattr(bucketing, "_TOGETHER", 2)


@pytest.mark.parametrize(("name", "mesh"), MESHES)
def test_float32_matches_the_reference_and_so_does_greedy_text(name, mesh):
    golden = load_golden(name)
    engine = start(ReleaseSource(golden.release), mesh)

    error = error_of(engine, golden)
    generation = engine.generate(
        golden.tokens, sampling=Sampling(temperature=0), max_tokens=16, ignore_eos=True
    )

    assert error < FLOAT32_BOUND
    assert [token.id for token in generation] == golden.greedy


@pytest.mark.parametrize(("name", "mesh"), MESHES)
def test_bfloat16_is_within_twice_the_reference_s_own_error(name, mesh, monkeypatch):
    def rounded(equation, left, right, *, dtype):  # a CPU does not multiply batches of bfloat16
        wide = (each.astype(dtype).astype(jnp.float32) for each in (left, right))
        return einsum(equation, *wide, dtype=jnp.dtype(jnp.float32))

    monkeypatch.setattr(attention, "einsum", rounded)
    monkeypatch.setattr(matmul, "einsum", rounded)
    golden = load_golden(name)

    error = error_of(start(ReleaseSource(golden.release), mesh, Compute.BFLOAT16), golden)

    assert 0 < error < golden.bfloat16_bound
