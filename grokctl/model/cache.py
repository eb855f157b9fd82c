"""The key-value cache: what a device holds of it, and how a step writes to it and reads it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from grokctl.model.config import GrokConfig
from grokctl.model.matmul import narrowed, widened
from grokctl.model.placement import MeshShape
from grokctl.model.sizing import kv_heads_per_device

_LARGEST_CODE: Final = 127.0
_TINY: Final = 1e-30
"""In place of a scale of 0, by which nothing can be divided."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Entries:
    """Keys, or values, of one layer for every slot and every position of the context.

    The axis of devices stays on, of which a device sees one entry: where it is taken off and put
    back, XLA on the CPU copies the whole cache (docs/adr/0009).
    """

    values: Shaped[Array, "one slots kv_heads past head_dim"]
    """float32, the bits of bfloat16 in uint16 (as in `Matrix`), or int8 codes."""
    scales: Float[Array, "one slots kv_heads past"] | None
    """What a code of 1 is worth, of int8 codes."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one layer remembers."""

    key: Entries
    value: Entries


Cache = tuple[LayerCache, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Place:
    """Which tokens a step is about."""

    slots: Int[Array, " batch"]
    """Where in the cache each sequence is kept."""
    start: Int[Array, " batch"]
    """Position of each sequence's first token in this step."""
    count: Int[Array, ""]
    """How many of `batch` times `time` tokens are no padding; those come first."""


def extended(
    cache: LayerCache,
    key: Float[Array, "batch time kv_heads head_dim"],
    value: Float[Array, "batch time kv_heads head_dim"],
    where: Place,
) -> LayerCache:
    """Write new keys and values behind the old ones, each sequence in its slot."""
    return LayerCache(
        key=_written(cache.key, jnp.swapaxes(key, 1, 2), where),
        value=_written(cache.value, jnp.swapaxes(value, 1, 2), where),
    )


def _written(
    held: Entries, new: Float[Array, "batch kv_heads time head_dim"], where: Place
) -> Entries:
    if held.scales is None:
        return replace(held, values=_placed(held.values, narrowed(new, held.values.dtype), where))
    scales = jnp.max(jnp.abs(new), axis=-1) / _LARGEST_CODE
    codes = jnp.round(new / jnp.maximum(scales, _TINY)[..., None])
    return Entries(
        values=_placed(held.values, codes.astype(jnp.int8), where),
        scales=_placed(held.scales, scales, where),
    )


def _placed(held: Array, new: Array, where: Place) -> Array:
    for index in reversed(range(new.shape[0])):  # the first last: padding repeats it, less truly
        rest: list[Array | int] = [0] * (held.ndim - 4)
        place = [0, where.slots[index], 0, where.start[index], *rest]
        held = jax.lax.dynamic_update_slice(held, new[None, index : index + 1], place)
    return held


def recall(
    held: Entries, where: Place, first: Array, length: int
) -> Float[Array, "batch kv_heads length head_dim"]:
    """Positions `first` onwards of each sequence, in float32."""
    values = widened(_cut(held.values, where, first, length))
    if held.scales is None:
        return values
    return values * _cut(held.scales, where, first, length)[..., None]


def _cut(held: Array, where: Place, first: Array, length: int) -> Array:
    size = (1, 1, held.shape[2], length, *held.shape[4:])
    rest = [0] * (held.ndim - 4)
    return jnp.concatenate(
        [
            jax.lax.dynamic_slice(held, (0, where.slots[index], 0, first, *rest), size)[0]
            for index in range(where.slots.shape[0])
        ]
    )


def empty_cache(
    config: GrokConfig,
    mesh: MeshShape,
    *,
    slots: int,
    past: int,
    dtype: jnp.dtype,
    zeros: Callable[[tuple[int, ...], jnp.dtype], Array],
) -> Cache:
    """A cache without anything in it.

    Args:
        config: The model.
        mesh: Over which it is split.
        slots: Sequences that are kept at a time.
        past: Positions of each.
        dtype: bfloat16, float32, or int8 for codes with a float32 scale a head and position.
        zeros: Makes an array of such a shape on every device, with an axis of devices before it.
    """
    shape = (slots, kv_heads_per_device(config, mesh), past)
    has_scales = dtype == jnp.int8
    kept = jnp.dtype(jnp.uint16) if dtype == jnp.bfloat16 else dtype

    def entries() -> Entries:
        scales = zeros(shape, jnp.dtype(jnp.float32)) if has_scales else None
        return Entries(zeros((*shape, config.key_size), kept), scales)

    return tuple(LayerCache(entries(), entries()) for _ in range(config.num_layers))
