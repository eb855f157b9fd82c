"""Attention over slots of the cache, block by block, against one softmax over all positions."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.miniature import MINIATURE
from grokctl.model import attention_kernel, bucketing
from grokctl.model.attention import attend, attend_at_once
from grokctl.model.attention_kernel import attend_with_one
from grokctl.model.cache import Positions, empty_cache, extended, recall, stored_type
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.sizing import cache_bytes
from grokctl.model.step_spec import KernelForm, StepShape

pytestmark = pytest.mark.heavy

FLOAT32, BF16, INT8 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int8)
SMALL = replace(MINIATURE, num_q_heads=6, num_kv_heads=2, key_size=4, num_layers=1)
ONE = MeshShape(1, 1)
SHAPE = StepShape(config=SMALL, mesh=ONE, platform="cpu", compute=FLOAT32)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def zeros(shape, dtype):
    return jnp.zeros((1, *shape), dtype)


def empty(slots, past, dtype=FLOAT32):
    stored = stored_type(dtype, platform="cpu")
    (layer,) = empty_cache(SMALL, ONE, slots=slots, past=past, dtype=stored, zeros=zeros)
    return layer


def place(slots, start):
    return Positions(
        slots=jnp.array(slots, jnp.int32), start=jnp.array(start, jnp.int32), count=jnp.int32(0)
    )


def attended(query, cache, where):
    return jax.jit(lambda *arguments: attend(*arguments, shape=SHAPE))(query, cache, where)


def filled(past, slots, dtype=FLOAT32):
    """A cache that is full of something everywhere, and what it is full of."""
    key, value = 3 * normal(1, slots, past, 2, 4), normal(2, slots, past, 2, 4)
    everywhere = place(range(slots), [0] * slots)
    return extended(empty(slots, past, dtype), key, value, everywhere), key, value


@pytest.mark.parametrize(
    ("past", "slots", "time", "chosen", "start"),
    [
        pytest.param(1, 1, 1, [0], [0], id="the first token"),
        pytest.param(24, 1, 1, [0], [23], id="the last token"),
        pytest.param(24, 1, 9, [0], [0], id="a prompt"),
        pytest.param(24, 2, 9, [1], [8], id="the next chunk of a prompt"),
        pytest.param(24, 4, 1, [3, 0, 2], [7, 0, 15], id="some streams"),
        pytest.param(20, 3, 4, [2, 1], [3, 16], id="a length that is no power of two"),
    ],
)
@pytest.mark.parametrize("block", [8, 256])
def test_blocks_of_slots_give_what_one_softmax_over_all_gives(
    monkeypatch, past, slots, time, chosen, start, block
):
    monkeypatch.setattr(bucketing, "POSITION_BLOCK", block)
    cache, key, value = filled(past, slots)
    query = 3 * normal(3, len(chosen), time, 6, 4)

    found = attended(query, cache, place(chosen, start))

    positions = np.array(start)[:, None] + np.arange(time)[None]
    mask = jnp.asarray(np.arange(past)[None, None] <= positions[..., None])
    turned = (jnp.swapaxes(array[jnp.array(chosen)], 1, 2) for array in (key, value))
    expected = attend_at_once(query, *turned, mask, config=SMALL)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_positions_behind_the_last_are_not_even_read(monkeypatch):
    monkeypatch.setattr(bucketing, "POSITION_BLOCK", 8)
    cache, _, _ = filled(64, 1)
    nan = jax.tree.map(lambda leaf: leaf.at[:, :, :, 8:].set(jnp.nan), cache)
    query = normal(4, 1, 1, 6, 4)

    found = attended(query, nan, place([0], [7]))
    beyond = attended(query, nan, place([0], [8]))

    np.testing.assert_array_equal(found, attended(query, cache, place([0], [7])))
    assert np.isnan(beyond).all()


@pytest.mark.parametrize("dtype", [FLOAT32, BF16, INT8], ids=str)
def test_entries_go_to_their_slot_and_position_and_nowhere_else(dtype):
    cache = empty(3, 10, dtype)
    key, value = normal(5, 2, 4, 2, 4), normal(6, 2, 4, 2, 4)

    cache = extended(cache, key, value, place([2, 0], [1, 6]))

    for held, new in ((cache.key, key), (cache.value, value)):
        found = recall(held, place([0, 1, 2], [0, 0, 0]), jnp.int32(0), 10)
        bound = {FLOAT32: 0, BF16: 2e-2, INT8: 2e-2}[dtype]
        np.testing.assert_allclose(found[2, :, 1:5], jnp.swapaxes(new[0], 0, 1), atol=bound)
        np.testing.assert_allclose(found[0, :, 6:10], jnp.swapaxes(new[1], 0, 1), atol=bound)
        rest = np.array(found)
        rest[2, :, 1:5] = rest[0, :, 6:10] = 0
        assert not rest.any()


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e30])
def test_codes_of_the_cache_are_within_half_a_step_of_the_largest(size):
    key = size * normal(7, 1, 5, 2, 4)
    key = key.at[0, 2].set(0)

    cache = extended(empty(1, 5, INT8), key, key, place([0], [0]))

    found = np.asarray(recall(cache.key, place([0], [0]), jnp.int32(0), 5)).swapaxes(1, 2)
    largest = np.abs(key).max(axis=-1, keepdims=True)
    assert (np.abs(found - key) <= largest * (0.5 / 127 + 1e-6)).all()
    assert np.isfinite(found).all()


@pytest.mark.parametrize("mesh", [ONE, MeshShape(1, 8), MeshShape(1, 16)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FLOAT32, INT8], ids=str)
def test_the_bytes_of_a_cache_are_those_of_its_arrays(mesh, dtype):
    cache = empty_cache(GROK_1, mesh, slots=3, past=512, dtype=dtype, zeros=jax.ShapeDtypeStruct)

    found = cache_bytes(GROK_1, mesh, slots=3, past=512, dtype=dtype)

    assert found == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert len(cache) == GROK_1.num_layers


# --- one token of each sequence, in a kernel for GPUs


@given(
    past=st.sampled_from([1, 100, 257]),
    slots=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (2, 3), (1, 6)]),
    dtype=st.sampled_from([FLOAT32, BF16, INT8]),
    data=st.data(),
)
@settings(max_examples=8, deadline=None)
def test_the_kernel_attends_to_what_is_written(past, slots, heads, dtype, data):
    kv_heads, group = heads
    config = replace(SMALL, num_q_heads=kv_heads * group, num_kv_heads=kv_heads, key_size=8)
    chosen = data.draw(st.lists(st.integers(0, slots - 1), min_size=1, max_size=3))
    start = data.draw(
        st.lists(st.integers(0, past - 1), min_size=len(chosen), max_size=len(chosen))
    )
    (cache,) = empty_cache(config, ONE, slots=slots, past=past, dtype=dtype, zeros=zeros)
    key, value = (3 * normal(seed, slots, past, kv_heads, 8) for seed in (1, 2))
    cache = extended(cache, key, value, place(range(slots), [0] * slots))
    positions, query = place(chosen, start), 3 * normal(3, len(chosen), 1, kv_heads * group, 8)
    held = [recall(part, positions, jnp.int32(0), past) for part in (cache.key, cache.value)]
    mask = jnp.asarray(np.arange(past)[None, None] <= np.array(start)[:, None, None])

    found = attend_with_one(query, cache, positions, config=config, form=KernelForm.INTERPRETED)

    expected = attend_at_once(query, *held, mask, config=config)
    largest = np.abs(held[1]).max()  # of the values that are added up, and may cancel
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * largest)


def test_the_kernel_does_not_read_behind_the_last_position_or_in_other_slots():
    cache, _, _ = filled(200, 3)
    spoilt = jax.tree.map(
        lambda leaf: leaf.at[:, 1, :, 131:].set(jnp.nan).at[:, jnp.array([0, 2])].set(jnp.nan),
        cache,
    )
    query = normal(4, 1, 1, 6, 4)

    found, plain = (
        attend_with_one(query, each, place([1], [130]), config=SMALL, form=KernelForm.INTERPRETED)
        for each in (spoilt, cache)
    )

    np.testing.assert_array_equal(found, plain)


def test_odd_heads_and_huge_caches_are_left_to_the_loop():
    def suits(key_size, slots=1):
        config = replace(GROK_1, key_size=key_size)
        (layer, *_) = empty_cache(
            config, ONE, slots=slots, past=8192, dtype=BF16, zeros=jax.ShapeDtypeStruct
        )
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), layer)
        return attention_kernel.suits(one)

    assert suits(128)
    assert not suits(96)
    assert not suits(128, slots=256)


def test_a_step_of_one_token_on_a_gpu_takes_the_kernel():
    cache, _, _ = filled(24, 2)
    shape = replace(SHAPE, platform="gpu", has_kernel=True, kernel_form=KernelForm.INTERPRETED)
    query = normal(4, 2, 1, 6, 4)

    text = str(jax.make_jaxpr(partial(attend, shape=shape))(query, cache, place([0, 1], [3, 9])))

    assert "pallas_call" in text
    assert "while" not in text
