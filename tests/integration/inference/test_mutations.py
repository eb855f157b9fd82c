"""The oracle notices the mistakes that pass every shape check: each makes logits wrong.

Renormalised gates are not among them: the norm behind the experts divides the factor out again,
but for its epsilon (2e-6 here). tests/unit/model/test_forward.py holds them in absolute scale.
"""

from collections.abc import Mapping
from dataclasses import replace

import jax
import numpy as np
import pytest
from golden import FLOAT32_BOUND, error_of, load_golden, start

from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.tensor_source import LogicalTensor, ReleaseSource, Slices
from grokctl.model import axes, experts, forward, tensors
from grokctl.model.config import GrokConfig
from grokctl.model.matmul import widened

pytestmark = pytest.mark.optimized


class Mutated(ReleaseSource):
    """A release that is read wrongly."""

    def read(self, tensor: LogicalTensor, slices: Slices):
        return super().read(tensor, slices)


class GateAndUpSwapped(Mutated):
    other: Mapping[str, str] = {"moe.gate": "moe.up", "moe.up": "moe.gate"}

    def read(self, tensor: LogicalTensor, slices: Slices):
        prefix, dot, last = tensor.spec.name.rpartition("moe.")
        name = prefix + self.other.get(dot + last, dot + last)
        return super().read(replace(tensor, spec=replace(tensor.spec, name=name)), slices)


class OneScaleRowForAll(Mutated):
    def read(self, tensor: LogicalTensor, slices: Slices):
        part = super().read(tensor, slices)
        if tensor.is_scales and tensor.groups > 1:
            part = np.repeat(part[..., :1, :], part.shape[-2], axis=-2)
        return part


@pytest.mark.parametrize("source", [GateAndUpSwapped, OneScaleRowForAll])
def test_a_misread_release_is_noticed(source):
    golden = load_golden("two-layers")

    assert error_of(start(source(golden.release), "model=1"), golden) > 10 * FLOAT32_BOUND


def test_the_release_read_as_it_is_passes():
    golden = load_golden("two-layers")

    assert error_of(start(Mutated(golden.release), "model=1"), golden) < FLOAT32_BOUND


def test_layers_in_numeric_order_are_noticed(monkeypatch):
    golden = load_golden("eleven-layers")
    monkeypatch.setattr(tensors, "layer_order", lambda count: tuple(range(count)))
    tensors.tensor_specs.cache_clear()

    try:
        misread = open_release(golden.release.root)  # every shape fits
        error = error_of(start(ReleaseSource(misread), "model=1"), golden)
    finally:
        tensors.tensor_specs.cache_clear()

    assert error > 10 * FLOAT32_BOUND


def test_a_dropped_attention_cap_is_noticed(monkeypatch):
    golden = load_golden("two-layers")
    monkeypatch.setattr(GrokConfig, "attn_logit_cap", 1e9)

    error = error_of(start(ReleaseSource(golden.release), "model=1"), golden)

    assert error > FLOAT32_BOUND


def test_summing_over_devices_before_scaling_is_noticed(monkeypatch):
    golden = load_golden("two-layers")
    project = forward.project

    def late_scales(x, matrix, **options):
        mean = jax.lax.pmean(widened(matrix.scales), axes.MODEL_AXIS)
        return project(x, replace(matrix, scales=mean), **options)

    monkeypatch.setattr(forward, "project", late_scales)
    monkeypatch.setattr(experts, "project", late_scales)

    error = error_of(start(ReleaseSource(golden.release), "model=8"), golden)

    assert error > 10 * FLOAT32_BOUND
