"""Attention of one token of each sequence on a GPU: one kernel, which reads what is written.

The loop of `model/attention` would ask the host after every block whether there is another. Here a
program has a block of positions of a key head. Behind the last written position it loads nothing.
"""

from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from grokctl.model import stored_codes
from grokctl.model.cache import LayerCache, Positions
from grokctl.model.config import GrokConfig
from grokctl.model.kernels import LARGEST, added_up
from grokctl.model.step_spec import KernelForm
from grokctl.model.stored_codes import triton

_POSITIONS: Final = 128
"""Positions of a program: 64 kB of keys and values in bfloat16, all of which it loads at once."""
_WARPS: Final = 8


def suits(cache: LayerCache) -> bool:
    """Whether the kernel can read a cache."""
    head_dim = cache.key.values.shape[-1]
    return (
        triton is not None
        and cache.key.values.size < LARGEST
        and head_dim == pl.next_power_of_2(head_dim)
    )


def attend_with_one(
    query: Float[Array, "batch one q_heads head_dim"],
    cache: LayerCache,
    positions: Positions,
    *,
    config: GrokConfig,
    form: KernelForm,
) -> Float[Array, "batch one q_heads head_dim"]:
    """`attend` for one token of each sequence.

    As logits are between -30 and 30, weights are `exp(logit - 30)`, none of them too small for
    float32: no largest logit is looked for, and sums of blocks are simply added.

    Args:
        query: Already rotated.
        cache: Already extended by these tokens.
        positions: Of these tokens.
        config: The multiplier and the cap of logits.
        form: How the kernel is written down.

    Returns:
        One float32 context vector per query head.
    """
    batch, _, q_heads, head_dim = query.shape
    _, _, kv_heads, past, _ = cache.key.values.shape
    group, blocks = q_heads // kv_heads, pl.cdiv(past, _POSITIONS)
    tables = []
    for entries in (cache.key, cache.value):
        tables.append(entries.values.reshape(-1, head_dim))
        if entries.scales is not None:
            tables.append(entries.scales.reshape(-1))
    programs = batch * kv_heads * blocks
    weighted, weights = pl.pallas_call(
        partial(_kernel, heads=(kv_heads, group), past=past, config=config),
        grid=(blocks, batch * kv_heads),
        out_shape=(
            jax.ShapeDtypeStruct((programs * group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((programs * group,), jnp.float32),
        ),
        compiler_params=triton.CompilerParams(num_warps=_WARPS),
        interpret=form is KernelForm.INTERPRETED,
        name="attend_with_one",
    )(positions.slots, positions.start, query.astype(jnp.float32).reshape(-1, head_dim), *tables)
    heads = (batch * kv_heads, blocks, group)
    total = added_up(jnp.swapaxes(weighted.reshape(*heads, head_dim), 0, 1))
    weight = added_up(jnp.swapaxes(weights.reshape(heads), 0, 1))
    return (total / weight[..., None]).reshape(query.shape)


def _kernel(
    slots: Any,
    start: Any,
    query: Any,
    *tables_and_sums: Any,
    heads: tuple[int, int],
    past: int,
    config: GrokConfig,
) -> None:
    """One program: sums over a block of positions, for the query heads of one key head."""
    *tables, weighted, weights = tables_and_sums
    kv_heads, group = heads
    multiplier, cap = config.attn_output_multiplier, config.attn_logit_cap
    key, *key_scales = tables[: len(tables) // 2]
    value, *value_scales = tables[len(tables) // 2 :]
    block, head = pl.program_id(0), pl.program_id(1)
    sequence, key_head = (
        operation(head, jnp.int32(kv_heads)) for operation in (jax.lax.div, jax.lax.rem)
    )
    position = block * _POSITIONS + jnp.arange(_POSITIONS)
    is_written = position <= start[sequence]
    first = (slots[sequence] * kv_heads + key_head) * past + block * _POSITIONS
    rows = pl.ds(first, _POSITIONS)
    keys, values = (_load(table.at[rows, :], is_written[:, None]) for table in (key, value))
    in_keys, in_values = (
        [_load(table.at[rows], is_written) for table in scales]
        for scales in (key_scales, value_scales)
    )
    for index in range(group):
        vector = triton.load(query.at[head * group + index, :])
        logits = jnp.sum(keys * vector[None], axis=1) * multiplier
        for scale in in_keys:
            logits *= scale
        capped = cap * jnp.tanh(logits / cap)
        weight = jnp.where(is_written, jnp.exp(capped - cap), 0.0)
        place = (head * pl.num_programs(0) + block) * group + index
        triton.store(weights.at[place], jnp.sum(weight))
        for scale in in_values:
            weight *= scale
        triton.store(weighted.at[place, :], jnp.sum(values * weight[:, None], axis=0))


def _load(part: Any, mask: Array) -> Array:
    """Load as float32, with zeros where the mask is false."""
    loaded = triton.load(part, mask=mask, other=jnp.zeros((), part.dtype))
    if loaded.dtype == jnp.uint16:
        return stored_codes.scale(loaded)
    return loaded.astype(jnp.float32)
