"""Log-probabilities on the device beside float64 on the host, from the same logits."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from grokctl.checkpoint.miniature import MINIATURE
from grokctl.model import axes, bucketing, forward
from grokctl.model.bucketing import TOP_LOGPROBS, score_width
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.scores import _Part, _part, _scores, scores
from grokctl.model.step_spec import StepShape

pytestmark = pytest.mark.heavy

EMBED = 16
TIME = EMBED
"""One position for every entry of a vector, so that any logits can be given."""
PLAIN = replace(MINIATURE, output_multiplier_scale=1.0)
LARGE = 2.0**12
"""A power of two, beside whose square the norm's epsilon is lost: norms are exact."""
ONE = MeshShape(1, 1)
FOUR = MeshShape(1, 4)
MESHES = [ONE, FOUR, MeshShape(2, 2)]
EVERYWHERE = PartitionSpec()


def on(mesh: MeshShape, function):
    """The function on a mesh: of an embedding that is split, and of arrays that are not."""
    names = (axes.EXPERT_AXIS, axes.MODEL_AXIS)
    jax_mesh = jax.make_mesh(
        (mesh.expert, mesh.model),
        names,
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: mesh.size],
    )

    def mapped(embedding, *arrays):
        split = jax.shard_map(
            function,
            mesh=jax_mesh,
            in_specs=(PartitionSpec(axes.MODEL_AXIS), *[EVERYWHERE] * len(arrays)),
            out_specs=EVERYWHERE,
            check_vma=False,
        )
        return split(embedding, *arrays)

    return jax.jit(mapped)


class Scored:
    """Scores on a mesh, of logits that are given or of a model's last two weights."""

    def __init__(self, mesh: MeshShape = ONE, config=PLAIN) -> None:
        shape = StepShape(config=config, mesh=mesh, platform="cpu", compute=jnp.dtype(jnp.float32))

        def both(embedding, norm, hidden, targets):
            found = scores(embedding, norm, hidden, targets, shape=shape)
            logits = forward.head(embedding, norm, hidden, None, shape=shape)[0]
            return found, jax.lax.all_gather(logits, axes.MODEL_AXIS, axis=1, tiled=True)

        self._run = on(mesh, both)

    def of_weights(self, embedding, norm, hidden, targets):
        arrays = (np.float32(embedding), np.float32(norm), np.float32(hidden)[None])
        found, logits = self._run(*arrays, np.int32(targets)[None])
        return jax.tree.map(np.asarray, found), np.asarray(logits)

    def of_logits(self, logits, targets):
        """Of `(TIME, vocab)`: each position is a unit vector, which picks a column."""
        found, given_logits = self.of_weights(
            np.float32(logits).T, np.full(EMBED, EMBED**-0.5), LARGE * np.eye(TIME), targets
        )
        np.testing.assert_array_equal(given_logits, np.float32(logits))
        return found


@cache
def scored_on(mesh: MeshShape) -> Scored:
    """One for all tests, as each compiles."""
    return Scored(mesh)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def logprobs_of(logits):
    """In float64, `(time, vocab)`."""
    wide = np.float64(logits)
    top = wide.max(axis=1, keepdims=True)
    return wide - top - np.log(np.exp(wide - top).sum(axis=1, keepdims=True))


def order_of(logits):
    """Ids of the likeliest tokens, by a stable sort of whole rows."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :TOP_LOGPROBS]


def assert_within_the_bound(found, expected):
    """1e-5, and the last bit of a float32."""
    assert found.dtype == np.float32
    assert (np.abs(found - expected) <= 1e-5 + 2.0**-23 * np.abs(expected)).all()


def rows_of(kind, vocab):
    rng = np.random.default_rng(vocab)
    flat = np.full((TIME, vocab), 7.25, np.float32)
    if kind == "one above":
        flat[:, rng.integers(0, vocab)] += np.float32(0.6)
    if kind in {"flat", "one above"}:
        return flat
    if kind == "both ends":
        return rng.choice([-1e4, 1e4], (TIME, vocab)) + normal(1, TIME, vocab)
    return float(kind) * normal(2, TIME, vocab)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["0.1", "3", "10000", "both ends", "flat", "one above"])
def test_scores_are_those_of_float64(mesh, kind):
    logits = np.float32(rows_of(kind, 4096))
    targets = np.random.default_rng(3).integers(0, 4096, TIME)

    found = scored_on(mesh).of_logits(logits, targets)

    expected = logprobs_of(logits)
    assert_within_the_bound(found.logprob, expected[np.arange(TIME), targets])
    np.testing.assert_array_equal(found.top_ids, order_of(logits))
    best = np.take_along_axis(expected, order_of(logits), axis=1)
    assert_within_the_bound(found.top_logprobs, best)


def test_a_vocabulary_as_large_as_grok_1s_is_summed_as_exactly():
    vocab = GROK_1.vocab_size
    flat, spread = np.full((TIME // 2, vocab), -0.6), normal(4, TIME // 2, vocab)
    flat[:, 77_777] = 0  # added one after the other, all the exp(-0.6) would be wrong by 0.0019
    logits = np.float32(np.concatenate([flat, spread]))

    found = scored_on(ONE).of_logits(logits, np.full(TIME, 99_999))

    assert_within_the_bound(found.logprob, logprobs_of(logits)[:, 99_999])
    np.testing.assert_array_equal(found.top_ids, order_of(logits))


@pytest.mark.parametrize(("mesh", "vocab"), [(ONE, 8), (FOUR, 40), (MESHES[2], 200)], ids=str)
@settings(max_examples=20)
@given(data=st.data())
def test_of_equal_logits_the_lower_id_comes_first(mesh, vocab, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    values = data.draw(
        st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=1, max_size=vocab)
    )
    rng = np.random.default_rng(seed)
    logits = rng.choice(np.float32(values), (TIME, vocab)) + np.float32(0)
    targets = rng.integers(0, vocab, TIME)

    found = scored_on(mesh).of_logits(logits, targets)

    assert found.top_ids.shape == (TIME, min(TOP_LOGPROBS, vocab))
    np.testing.assert_array_equal(found.top_ids, order_of(logits))
    assert_within_the_bound(found.logprob, logprobs_of(logits)[np.arange(TIME), targets])


def test_a_target_that_was_rounded_in_another_way_has_the_number_of_the_list():
    values = jnp.asarray([[2.0, 1.0, 1.0]])
    part = _Part(
        largest=values[:, 0],
        total=jnp.asarray([1.5]),
        target=jnp.nextafter(values[:, 2], 2.0),
        values=values,
        ids=jnp.asarray([[7, 3, 5]]),
    )

    found = _scores(part, jnp.asarray([5]))
    other = _scores(part, jnp.asarray([6]))

    assert found.logprob[0] == found.top_logprobs[0, 2] != other.logprob[0]


def test_minus_zero_is_zero():
    logits = np.float32([[-0.0, 0.0, -0.0, 1.0, -1.0]])

    found = _part(jnp.asarray(logits), jnp.zeros(1, jnp.int32), first=jnp.int32(0))

    np.testing.assert_array_equal(found.ids, [[3, 0, 1, 2, 4]])


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("mesh", "nbytes"),
    [pytest.param(ONE, bucketing.BLOCK, id="at once"), pytest.param(FOUR, 2**12, id="in blocks")],
)
def test_a_target_among_the_likeliest_has_their_number(mesh, nbytes, monkeypatch):
    monkeypatch.setattr(bucketing, "BLOCK", nbytes)
    found_by = Scored(mesh, config=MINIATURE)
    weights = (30 * normal(5, 512, EMBED), normal(6, EMBED), normal(7, TIME, EMBED))
    first, logits = found_by.of_weights(*weights, np.zeros(TIME))

    for place in range(TOP_LOGPROBS):
        found, _ = found_by.of_weights(*weights, first.top_ids[:, place])

        np.testing.assert_array_equal(found.logprob, found.top_logprobs[:, place])
        np.testing.assert_array_equal(found.top_logprobs, first.top_logprobs)
    np.testing.assert_array_equal(first.top_ids, order_of(logits))
    best = np.take_along_axis(logprobs_of(logits), first.top_ids, axis=1)
    np.testing.assert_allclose(first.top_logprobs, best, atol=1e-4)  # products of other shapes


@pytest.mark.parametrize("nbytes", [2**8, 2**13])
def test_blocks_of_the_vocabulary_change_nothing(monkeypatch, nbytes):
    logits, targets = np.round(normal(8, TIME, 192), 1), np.arange(TIME) * 12
    expected = scored_on(ONE).of_logits(logits, targets)
    monkeypatch.setattr(bucketing, "BLOCK", nbytes)

    found = Scored().of_logits(logits, targets)

    assert score_width(TIME, vocab=192, embed=EMBED) < 192
    np.testing.assert_array_equal(found.top_ids, expected.top_ids)
    for name in ("logprob", "top_logprobs"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=2e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_no_number_is_seen_in_every_score_of_its_row(bad):
    logits = normal(9, 2, 4096)
    logits[1, 1234] = bad

    found = jax.jit(lambda logits: _part(logits, jnp.zeros(2, jnp.int32), first=jnp.int32(0)))(
        jnp.asarray(logits)
    )

    assert np.isfinite(found.total).tolist() == [True, False]


@given(
    tokens=st.sampled_from([1, 16, 64, 512, 2048]),
    vocab=st.sampled_from([256, 1000, 16384, 65536, 131072]),
    embed=st.sampled_from([16, 1536, 6144]),
)
def test_a_block_is_a_part_of_the_vocabulary_that_takes_no_more_than_its_room(tokens, vocab, embed):
    width = score_width(tokens, vocab=vocab, embed=embed)

    assert vocab % width == 0
    assert tokens * width * 4 <= bucketing.BLOCK
    assert width == vocab or embed * width * 4 <= bucketing.SCORED
    assert width == vocab or tokens * vocab * 4 > bucketing.BLOCK


def test_a_chunk_of_grok_1_is_scored_in_blocks_of_whole_products():
    assert score_width(512, vocab=131072, embed=6144) == 1024
    assert score_width(16, vocab=131072, embed=6144) == 131072
    assert score_width(2048, vocab=16384, embed=6144) == 1024
