"""What a kernel for GPUs makes of the sums of attention's products."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokctl.model.cache import Positions, empty_cache, extended
from grokctl.model.cache_kernel import rotated_and_kept, suits
from grokctl.model.config import GROK_1
from grokctl.model.kernels import added_up
from grokctl.model.placement import MeshShape
from grokctl.model.rotary import rotate
from grokctl.model.step_spec import KernelForm

FLOAT32, BF16, BITS, INT8 = (
    jnp.dtype(each) for each in (jnp.float32, jnp.bfloat16, jnp.uint16, jnp.int8)
)


def filled(config, *, slots, past, dtype):
    """A cache of one layer, with random numbers everywhere."""

    def numbers(shape, dtype):
        rng = np.random.default_rng(len(shape))
        return jnp.asarray(rng.standard_normal((1, *shape)), dtype)

    cache = empty_cache(config, MeshShape(1, 1), slots=slots, past=past, dtype=dtype, zeros=numbers)
    return cache[0]


@given(
    heads=st.sampled_from([(1, 1), (2, 3), (2, 1)]),
    head_dim=st.sampled_from([2, 8]),
    parts=st.integers(1, 3),
    dtype=st.sampled_from([FLOAT32, BF16]),
    data=st.data(),
)
@settings(max_examples=12, deadline=None)
def test_the_kernel_does_what_is_otherwise_done_one_after_the_other(
    heads, head_dim, parts, dtype, data
):
    (kv_heads, group), slots, past = heads, 4, 6
    config = replace(
        GROK_1, num_layers=1, key_size=head_dim, num_kv_heads=kv_heads, num_q_heads=kv_heads * group
    )
    chosen = data.draw(st.permutations(range(slots)))[: data.draw(st.integers(1, slots))]
    batch, places = len(chosen), st.integers(0, past - 1)
    start = jnp.asarray(data.draw(st.lists(places, min_size=batch, max_size=batch)), jnp.int32)
    count = data.draw(st.integers(1, batch))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    sums = [
        jnp.asarray(rng.standard_normal((parts, batch, each * head_dim)), jnp.float32)
        for each in (kv_heads * group, kv_heads, kv_heads)
    ]
    before = filled(config, slots=slots, past=past, dtype=dtype)
    positions = Positions(jnp.asarray(chosen, jnp.int32), start, jnp.int32(count))

    query, cache = rotated_and_kept(
        sums, before, positions, config=config, form=KernelForm.INTERPRETED
    )

    first, key, value = (added_up(part).reshape(batch, 1, -1, head_dim) for part in sums)
    first, key = (rotate(x, start[:, None], base=config.rope_base) for x in (first, key))
    real = jax.tree.map(lambda leaf: leaf[:count], (key, value))
    kept = extended(before, *real, replace(positions, slots=positions.slots[:count]))
    np.testing.assert_allclose(query, first, rtol=1e-6, atol=1e-6)
    bound = 1e-6 if dtype == FLOAT32 else 2**-7
    for written, right in ((cache.key, kept.key), (cache.value, kept.value)):
        found, expected = (each.values.astype(jnp.float32) for each in (written, right))
        np.testing.assert_allclose(found, expected, rtol=bound, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "key_size", "is_suited"),
    [
        (FLOAT32, 128, True),
        (BF16, 128, True),
        (BITS, 128, False),
        (INT8, 128, False),
        (BF16, 96, False),
    ],
    ids=str,
)
def test_only_caches_of_floats_are_written_by_the_kernel(dtype, key_size, is_suited):
    config = replace(GROK_1, num_layers=1, key_size=key_size)

    assert suits(filled(config, slots=1, past=2, dtype=dtype)) is is_suited
