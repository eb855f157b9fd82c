"""What stands between the products of attention and attention itself on a GPU: one kernel.

For one token of each sequence it adds up the sums that `model/kernels` left apart, rotates queries
and keys, and writes keys and values into the cache. XLA would start four kernels, and two more for
each further sequence.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from grokctl.model import attention_kernel
from grokctl.model.cache import Entries, LayerCache, Positions
from grokctl.model.config import GrokConfig
from grokctl.model.kernels import added_up
from grokctl.model.rotary import rotation
from grokctl.model.step_spec import KernelForm
from grokctl.model.stored_codes import triton

_WARPS: Final = 1


def suits(cache: LayerCache) -> bool:
    """Whether the kernel can write to a cache: one of floats, not of codes or of bits."""
    return attention_kernel.suits(cache) and cache.key.values.dtype in (jnp.float32, jnp.bfloat16)


def rotated_and_kept(
    sums: Sequence[Float[Array, "_ batch _"]],
    cache: LayerCache,
    positions: Positions,
    *,
    config: GrokConfig,
    form: KernelForm,
) -> tuple[Float[Array, "batch one q_heads head_dim"], LayerCache]:
    """Rotate one token's query and key of each sequence, and extend the cache.

    Args:
        sums: Of the products that make queries, keys and values: parts that are to be added up, for
            each token, of all heads.
        cache: Floats, which the kernel overwrites in place where a step gives its cache away.
        positions: Of these tokens. Sequences behind the first `count` are padding, and write none.
        config: Size of a head, and base of the rotation.
        form: How the kernel is written down.

    Returns:
        Queries in float32, and the cache.
    """
    batch, head_dim = len(positions.start), config.key_size
    queries, kv_heads, _ = (part.shape[-1] // head_dim for part in sums)
    cos, sin = rotation(positions.start, head_dim // 2, base=config.rope_base)
    tables = [entries.values.reshape(-1, head_dim) for entries in (cache.key, cache.value)]
    before = (
        positions.slots,
        positions.start,
        positions.count.reshape(1),
        cos,
        sin,
        *[part.reshape(-1, part.shape[-1]) for part in sums],
    )
    query, *written = pl.pallas_call(
        partial(_kernel, heads=(queries, kv_heads), past=cache.key.values.shape[-2]),
        grid=(queries + 2 * kv_heads, batch),
        out_shape=[
            jax.ShapeDtypeStruct((batch * queries, head_dim), jnp.float32),
            *[jax.ShapeDtypeStruct(table.shape, table.dtype) for table in tables],
        ],
        input_output_aliases={len(before): 1, len(before) + 1: 2},
        compiler_params=triton.CompilerParams(num_warps=_WARPS),
        interpret=form is KernelForm.INTERPRETED,
        name="rotated_and_kept",
    )(*before, *tables)
    key, value = (
        Entries(table.reshape(entries.values.shape), None)
        for table, entries in zip(written, (cache.key, cache.value), strict=True)
    )
    return query.reshape(batch, 1, -1, head_dim), LayerCache(key, value)


def _kernel(*refs: Any, heads: tuple[int, int], past: int) -> None:
    """One program: a head of a token's query, key or value."""
    slots, start, count, cos, sin, *sums, _, _, query, keys, values = refs
    (queries, kv_heads), head, token = heads, pl.program_id(0), pl.program_id(1)
    parts_of = partial(_added_up, batch=start.shape[0], half=query.shape[1] // 2)
    is_real = token < count[0]

    def rotated(halves: _Halves) -> _Halves:
        (low, high), columns = halves, pl.ds(0, halves[0].shape[0])
        cosine, sine = (triton.load(table.at[token, columns]) for table in (cos, sin))
        return low * cosine - high * sine, high * cosine + low * sine

    def row_in_cache(kv_head: Array) -> Any:
        return (slots[token] * kv_heads + kv_head) * past + start[token]

    @pl.when(head < queries)
    def add_query() -> None:
        _store(query, token * queries + head, rotated(parts_of(sums[0], head, token)))

    @pl.when((head >= queries) & (head < queries + kv_heads) & is_real)
    def keep_key() -> None:
        kv_head = head - queries
        _store(keys, row_in_cache(kv_head), rotated(parts_of(sums[1], kv_head, token)))

    @pl.when((head >= queries + kv_heads) & is_real)
    def keep_value() -> None:
        kv_head = head - queries - kv_heads
        _store(values, row_in_cache(kv_head), parts_of(sums[2], kv_head, token))


_Halves = tuple[Array, Array]
"""Of a head."""


def _added_up(sums: Any, head: Array, token: Array, *, batch: int, half: int) -> _Halves:
    """Add up a head's parts, one after the other as `kernels.added_up` does."""

    def total(column: Array) -> Array:
        rows = [index * batch + token for index in range(sums.shape[0] // batch)]
        return added_up([triton.load(sums.at[row, pl.ds(column, half)]) for row in rows])

    first = 2 * half * head
    return total(first), total(first + half)


def _store(table: Any, row: Array, halves: _Halves) -> None:
    half = table.shape[1] // 2
    for index, values in enumerate(halves):
        triton.store(table.at[row, pl.ds(index * half, half)], values.astype(table.dtype))
