"""Parameters as pytrees, one leaf per array that a device holds."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jaxtyping import Array, Float, Shaped

from grokctl.model.config import GrokConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Matrix:
    """A stored weight, or a stack of the experts' weights, with its scales.

    bfloat16 is stored as its bits in uint16: XLA on the CPU would convert the whole array to
    float32 before it cuts a part out.
    """

    weight: Shaped[Array, "*stack_and_rows outputs"]
    """int8, bfloat16 or float32 `(inputs, outputs)`; of int4, uint8 `(inputs / 2, outputs)`; the
    scale of a norm is one row without an axis for it."""
    scales: Shaped[Array, "*stack groups outputs"] | None
    """bfloat16 or float32; row g covers inputs `g * inputs / groups` onwards."""


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
class Experts:
    """A device's experts, stacked; each is `down(gelu(gate x) * (up x))`."""

    gate: Matrix
    up: Matrix
    down: Matrix

    @property
    def count(self) -> int:
        """Number of experts."""
        return self.gate.weight.shape[0]


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
    """One decoder layer."""

    attention: Attention
    experts: Experts | None
    """None where experts are streamed."""
    norms: Norms
    router: Float[Array, "embed experts"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Parameters:
    """The whole model, in the order in which it is computed."""

    embedding: Float[Array, "vocab embed"]
    layers: tuple[Layer, ...]
    final_norm: Float[Array, " embed"]


def build_experts(prefix: str, matrix: Callable[[str], Matrix]) -> Experts:
    """Build the experts of a layer, or a part of them.

    Args:
        prefix: Of the layer's parameters, such as `layers.0`.
        matrix: Returns the parameter with a name, such as `layers.0.moe.gate`.
    """
    gate, up, down = (matrix(f"{prefix}.moe.{part}") for part in ("gate", "up", "down"))
    return Experts(gate=gate, up=up, down=down)


def build_parameters(
    config: GrokConfig, matrix: Callable[[str], Matrix], *, has_experts: bool = True
) -> Parameters:
    """Build the tree of parameters.

    Args:
        config: The model.
        matrix: Returns the parameter with a name, such as `layers.0.moe.gate`.
        has_experts: Whether it has the experts, too.
    """

    def plain(name: str) -> Array:
        return matrix(name).weight

    def layer(prefix: str) -> Layer:
        attention, norms = f"{prefix}.attention", f"{prefix}.norms"
        return Layer(
            attention=Attention(
                query=matrix(f"{attention}.query"),
                key=matrix(f"{attention}.key"),
                value=matrix(f"{attention}.value"),
                out=matrix(f"{attention}.out"),
            ),
            experts=build_experts(prefix, matrix) if has_experts else None,
            norms=Norms(
                pre_attention=plain(f"{norms}.pre_attention"),
                post_attention=plain(f"{norms}.post_attention"),
                pre_moe=plain(f"{norms}.pre_moe"),
                post_moe=plain(f"{norms}.post_moe"),
            ),
            router=plain(f"{prefix}.router"),
        )

    return Parameters(
        embedding=plain("embedding"),
        layers=tuple(layer(f"layers.{index}") for index in range(config.num_layers)),
        final_norm=plain("final_norm"),
    )
