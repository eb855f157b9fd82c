"""Parameters and key-value cache as pytrees, one leaf per array that a device holds."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grokctl.model.config import GrokConfig
from grokctl.model.placement import MeshShape


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight, outputs first, with its scales when it is quantised."""

    groups: tuple[Array, ...]
    """`(outputs, inputs of the group)` each, int8 with scales; float32 and alone without.

    Arrays of their own, because XLA copies a group that is cut out of a larger one, and runs a
    product over a three-dimensional array eighty times slower (docs/adr/0003)."""
    scales: Array | None
    """bfloat16 `(groups, outputs)`; group g covers inputs `g * inputs / groups` onwards."""

    @property
    def weight(self) -> Array:
        """The only group."""
        (weight,) = self.groups
        return weight

    @classmethod
    def of(cls, weight: Array, scales: Array | None = None) -> "Matrix":
        """From an array as the ready format stores it."""
        return cls((weight,) if scales is None else tuple(weight), scales)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Attention:
    """Projections of one attention block."""

    query: Matrix
    key: Matrix
    value: Matrix
    out: Matrix


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Expert:
    """One expert: `down(gelu(gate x) * (up x))`."""

    gate: Matrix
    up: Matrix
    down: Matrix


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Norms:
    """The four norm scales of a layer: before and after each of its two blocks."""

    pre_attention: Float[Array, " embed"]
    post_attention: Float[Array, " embed"]
    pre_moe: Float[Array, " embed"]
    post_moe: Float[Array, " embed"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer; experts are separate arrays, so that choosing one copies nothing."""

    attention: Attention
    experts: tuple[Expert, ...]
    norms: Norms
    router: Matrix


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Parameters:
    """The whole model, in the order in which it is computed."""

    embedding: Matrix
    layers: tuple[Layer, ...]
    final_norm: Float[Array, " embed"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer for every position of the context."""

    key: Float[Array, "batch kv_heads past head_dim"]
    value: Float[Array, "batch kv_heads past head_dim"]


Cache = tuple[LayerCache, ...]


def build_parameters(
    config: GrokConfig, mesh: MeshShape, matrix: Callable[[str, int | None], Matrix]
) -> Parameters:
    """Put the tree together.

    Args:
        config: The model.
        mesh: How many experts a device holds follows from it.
        matrix: Gives the parameter of a name (`layers.0.moe.gate`), for the experts' tensors that
            of one expert, by its number among the device's own.
    """

    def whole(name: str) -> Matrix:
        return matrix(name, None)

    def vector(name: str) -> Array:
        return whole(name).weight

    def layer(prefix: str) -> Layer:
        attention, moe, norms = (f"{prefix}.{part}" for part in ("attention", "moe", "norms"))
        return Layer(
            attention=Attention(
                query=whole(f"{attention}.query"),
                key=whole(f"{attention}.key"),
                value=whole(f"{attention}.value"),
                out=whole(f"{attention}.out"),
            ),
            experts=tuple(
                Expert(
                    gate=matrix(f"{moe}.gate", index),
                    up=matrix(f"{moe}.up", index),
                    down=matrix(f"{moe}.down", index),
                )
                for index in range(config.num_experts // mesh.expert)
            ),
            norms=Norms(
                pre_attention=vector(f"{norms}.pre_attention"),
                post_attention=vector(f"{norms}.post_attention"),
                pre_moe=vector(f"{norms}.pre_moe"),
                post_moe=vector(f"{norms}.post_moe"),
            ),
            router=whole(f"{prefix}.router"),
        )

    return Parameters(
        embedding=whole("embedding"),
        layers=tuple(layer(f"layers.{index}") for index in range(config.num_layers)),
        final_norm=vector("final_norm"),
    )


def kv_heads_per_device(config: GrokConfig, mesh: MeshShape) -> int:
    """Key heads on a device: at least one, also when several devices share it."""
    return max(1, config.num_kv_heads // mesh.model)


def cache_shape(
    config: GrokConfig, mesh: MeshShape, *, batch: int, context: int
) -> tuple[int, int, int, int]:
    """Shape of a device's keys (and of its values) for one layer."""
    return batch, kv_heads_per_device(config, mesh), context, config.key_size


def cache_bytes(
    config: GrokConfig, mesh: MeshShape, *, batch: int, context: int, dtype: jnp.dtype
) -> int:
    """Bytes of key-value cache on each device."""
    heads = kv_heads_per_device(config, mesh)
    return 2 * config.num_layers * batch * heads * context * config.key_size * dtype.itemsize
