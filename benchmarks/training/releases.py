"""Releases as trained floats, and back."""

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.release import Release
from grokctl.model.config import GrokConfig
from grokctl.model.parameters import Layer, Matrix, Parameters, build_parameters


def floats_of_release(release: Release) -> dict[str, NDArray[np.float32]]:
    """Every tensor by its name: integers times their scales."""
    found = {}
    for tensor in release.tensors:
        weight, scales = tensor.map()
        values = np.array(weight, np.float32)
        if scales is not None:
            *lead, inputs, outputs = values.shape
            groups = scales.shape[-2]
            grouped = values.reshape(*lead, groups, inputs // groups, outputs)
            grouped *= np.asarray(scales).astype(np.float32)[..., None, :]
        found[tensor.spec.name] = values
    return found


def parameters_from(floats: dict[str, NDArray[np.float32]], config: GrokConfig) -> Parameters:
    """The tree of parameters."""
    return build_parameters(config, lambda name: Matrix(jnp.asarray(floats[name]), None))


def parameters_of(release: Release) -> Parameters:
    """The parameters of a release in float32."""
    return parameters_from(floats_of_release(release), release.config)


def floats_of(parameters: Parameters) -> dict[str, NDArray[np.float32]]:
    """Every tensor by its name: the inverse of `parameters_from`."""
    found = {"embedding": parameters.embedding, "final_norm": parameters.final_norm}
    for index, layer in enumerate(parameters.layers):
        found |= {f"layers.{index}.{name}": values for name, values in _of_layer(layer).items()}
    return {name: np.asarray(values) for name, values in found.items()}


def _of_layer(layer: Layer) -> dict[str, jnp.ndarray]:
    attention, experts, norms = layer.attention, layer.experts, layer.norms
    return {
        "attention.query": attention.query.weight,
        "attention.key": attention.key.weight,
        "attention.value": attention.value.weight,
        "attention.out": attention.out.weight,
        "moe.gate": experts.gate.weight,
        "moe.up": experts.up.weight,
        "moe.down": experts.down.weight,
        "norms.pre_attention": norms.pre_attention,
        "norms.post_attention": norms.post_attention,
        "norms.pre_moe": norms.pre_moe,
        "norms.post_moe": norms.post_moe,
        "router": layer.router,
    }
