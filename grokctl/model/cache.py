"""The key-value cache: a device's part of it, and how a step writes to it and reads it."""

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

    The axis of devices, of which a device sees one entry, stays: if it were removed and added
    again, XLA on the CPU would copy the whole cache (docs/adr/0009).
    """

    values: Shaped[Array, "one slots kv_heads past head_dim"]
    """float32, bfloat16 (on a CPU its bits in uint16, as in `Matrix`), or int8 codes."""
    scales: Float[Array, "one slots kv_heads past"] | None
    """Value of code 1, for int8 codes."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer."""

    key: Entries
    value: Entries


Cache = tuple[LayerCache, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Positions:
    """Slots and positions of the cache that a step's tokens go to."""

    slots: Int[Array, " batch"]
    """Slot of the cache in which each sequence is kept."""
    start: Int[Array, " batch"]
    """Position of each sequence's first token in this step."""
    count: Int[Array, ""]
    """How many of `batch` times `time` tokens are no padding; those come first."""

    def of_tokens(self, time: int) -> Int[Array, "batch time"]:
        """Position of every token, of which each sequence has `time`."""
        return self.start[:, None] + jnp.arange(time)[None]


def extended(
    cache: LayerCache,
    key: Float[Array, "batch time kv_heads head_dim"],
    value: Float[Array, "batch time kv_heads head_dim"],
    positions: Positions,
) -> LayerCache:
    """Write new keys and values behind the old ones, each sequence in its slot."""
    return LayerCache(
        key=_extended(cache.key, jnp.swapaxes(key, 1, 2), positions),
        value=_extended(cache.value, jnp.swapaxes(value, 1, 2), positions),
    )


def _extended(
    entries: Entries, new: Float[Array, "batch kv_heads time head_dim"], positions: Positions
) -> Entries:
    if entries.scales is None:
        values = narrowed(new, entries.values.dtype)
        return replace(entries, values=_written(entries.values, values, positions))
    scales = jnp.max(jnp.abs(new), axis=-1) / _LARGEST_CODE
    codes = jnp.round(new / jnp.maximum(scales, _TINY)[..., None])
    return Entries(
        values=_written(entries.values, codes.astype(jnp.int8), positions),
        scales=_written(entries.scales, scales, positions),
    )


def _written(
    array: Shaped[Array, "one slots kv_heads past *head_dim"],
    new: Shaped[Array, "batch kv_heads time *head_dim"],
    positions: Positions,
) -> Shaped[Array, "one slots kv_heads past *head_dim"]:
    for index in reversed(range(new.shape[0])):  # the first last: padding repeats it, less exactly
        rest: list[Array | int] = [0] * (array.ndim - 4)
        begin = [0, positions.slots[index], 0, positions.start[index], *rest]
        array = jax.lax.dynamic_update_slice(array, new[None, index : index + 1], begin)
    return array


def recall(
    entries: Entries, positions: Positions, first: Int[Array, ""], length: int
) -> Float[Array, "batch kv_heads length head_dim"]:
    """Read `length` positions from `first` onwards of each sequence, as float32."""
    values = widened(_read(entries.values, positions, first, length))
    if entries.scales is None:
        return values
    return values * _read(entries.scales, positions, first, length)[..., None]


def _read(
    array: Shaped[Array, "one slots kv_heads past *head_dim"],
    positions: Positions,
    first: Int[Array, ""],
    length: int,
) -> Shaped[Array, "batch kv_heads length *head_dim"]:
    size = (1, 1, array.shape[2], length, *array.shape[4:])
    rest = [0] * (array.ndim - 4)
    return jnp.concatenate(
        [
            jax.lax.dynamic_slice(array, (0, positions.slots[index], 0, first, *rest), size)[0]
            for index in range(positions.slots.shape[0])
        ]
    )


def stored_type(dtype: jnp.dtype, *, platform: str) -> jnp.dtype:
    """How a cache of bfloat16, float32 or int8 stores it: a CPU has the bits of bfloat16.

    From a cache of bits, XLA for GPUs would convert every block before it multiplies.
    """
    is_in_bits = dtype == jnp.bfloat16 and platform == "cpu"
    return jnp.dtype(jnp.uint16) if is_in_bits else dtype


def empty_cache(
    config: GrokConfig,
    mesh: MeshShape,
    *,
    slots: int,
    past: int,
    dtype: jnp.dtype,
    zeros: Callable[[tuple[int, ...], jnp.dtype], Array],
) -> Cache:
    """A cache full of zeros.

    Args:
        config: The model.
        mesh: The mesh that it is split over.
        slots: Sequences that it keeps at a time.
        past: Positions of each.
        dtype: bfloat16, its bits in uint16, float32, or int8 for codes with a float32 scale a head
            and position.
        zeros: Makes an array of a shape on every device, with an axis of devices before it.
    """
    shape = (slots, kv_heads_per_device(config, mesh), past)
    has_scales = dtype == jnp.int8

    def entries() -> Entries:
        scales = zeros(shape, jnp.dtype(jnp.float32)) if has_scales else None
        return Entries(zeros((*shape, config.key_size), dtype), scales)

    return tuple(LayerCache(entries(), entries()) for _ in range(config.num_layers))
