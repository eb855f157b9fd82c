"""The shape annotations of `model/*`, checked while the whole model is traced."""

import sys
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import annotations
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, TypeCheckError, install_import_hook, jaxtyped

import grokctl
from grokctl.checkpoint.miniature import MINIATURE
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.tensor_source import Storage, extent
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.model.tensors import tensor_specs

pytestmark = pytest.mark.heavy

ONE = MeshShape(1, 1)
# sizes that differ, or a wrong name would go unnoticed
CONFIG = replace(
    MINIATURE,
    vocab_size=80,
    emb_size=24,
    widening_factor=4,
    key_size=10,
    num_q_heads=12,
    num_kv_heads=3,
    num_layers=1,
    num_experts=7,
    num_selected_experts=3,
)
PAST = 256


@pytest.fixture(scope="module")
def model():
    """The modules of `grokctl.model`, imported once more with all of their functions checked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grokctl, "model", grokctl.model)
        for name in [name for name in sys.modules if name.startswith("grokctl.model")]:
            patch.delitem(sys.modules, name)
        names = ("cache", "forward", "parameters", "step_spec")
        with install_import_hook("grokctl.model", "annotations.checked"):
            modules = {name: import_module(f"grokctl.model.{name}") for name in names}
        yield SimpleNamespace(**modules)
        for name in [name for name in sys.modules if name.startswith("grokctl.model")]:
            del sys.modules[name]


def zeros(shape, dtype):
    return jnp.asarray(np.zeros(shape, np.uint16 if dtype == BFLOAT16 else dtype))


def parameters(model, precision):
    coarse = {Precision.INT8: lambda spec: spec.scale_groups, Precision.INT4: lambda _spec: 4}
    groups = coarse.get(precision, lambda _spec: 0)
    storage = Storage(
        config=CONFIG,
        precision=precision,
        groups={s.name: groups(s) if s.scale_groups else 0 for s in tensor_specs(CONFIG)},
    )
    arrays = {
        tensor.key: zeros(extent(tensor.slices(ONE, 0, CONFIG)), tensor.dtype)
        for tensor in storage.tensors
    }
    return model.parameters.build_parameters(
        CONFIG,
        lambda name: model.parameters.Matrix(
            arrays[f"{name}.weight"], arrays.get(f"{name}.scales")
        ),
    )


def trace(model, precision=Precision.INT8, *, batch=5, time=16, kv=jnp.float32, **facts):
    """Shape of the logits of the whole model; nothing is compiled."""
    compute = jnp.dtype(jnp.bfloat16)
    shape = model.step_spec.StepShape(config=CONFIG, mesh=ONE, compute=compute, **facts)
    cache = model.cache.empty_cache(
        CONFIG,
        ONE,
        slots=batch,
        past=PAST,
        dtype=jnp.dtype(kv),
        zeros=lambda shape, dtype: zeros((1, *shape), dtype),
    )
    counts = np.zeros(batch, np.int32)
    positions = model.cache.Positions(*map(jnp.asarray, (counts, counts, np.int32(batch * time))))
    mapped = jax.shard_map(
        lambda *arguments: model.forward.forward(*arguments, shape=shape)[0],
        mesh=jax.make_mesh(
            (1, 1),
            (model.forward.EXPERT_AXIS, model.forward.MODEL_AXIS),
            axis_types=(jax.sharding.AxisType.Auto,) * 2,
            devices=jax.devices()[:1],
        ),
        in_specs=(PartitionSpec(),) * 5,
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    tokens = jnp.asarray(np.zeros((batch, time), np.int32))
    select = jnp.asarray(counts)
    logits = jax.eval_shape(mapped, parameters(model, precision), cache, tokens, positions, select)
    return logits.shape


@pytest.mark.parametrize(
    ("precision", "facts"),
    [
        pytest.param(Precision.INT4, {"platform": "cpu", "kv": jnp.int8}, id="blocks"),
        pytest.param(Precision.INT8, {"platform": "cpu", "batch": 1, "time": 1}, id="rows"),
        pytest.param(Precision.INT8, {"platform": "gpu", "kv": jnp.bfloat16}, id="groups"),
        pytest.param(Precision.INT4, {"platform": "gpu", "kv": jnp.bfloat16}, id="dequantised"),
        pytest.param(
            Precision.INT4,
            {"platform": "gpu", "batch": 3, "time": 1, "has_kernel": True},
            id="kernel",
        ),
        pytest.param(
            Precision.INT8,
            {"platform": "cpu", "batch": 3, "time": 1, "has_native_kernel": True},
            id="native",
        ),
    ],
)
def test_every_annotated_array_has_the_shape_that_it_says(model, precision, facts):
    annotations.checked_values.clear()

    assert trace(model, precision, **facts) == (facts.get("batch", 5), 1, 80)

    assert len(annotations.checked_values) > 300


def test_a_wrong_annotation_would_be_found(model, monkeypatch):
    def halved(x: Float[Array, "batch time embed"]) -> Float[Array, "batch time embed"]:
        return x[..., ::2]

    checked = jaxtyped(halved, typechecker=annotations.checked)
    monkeypatch.setattr(model.forward, "rms_norm", lambda x, *_, **__: checked(x))

    with pytest.raises(TypeCheckError, match="halved"):
        trace(model, platform="cpu")
