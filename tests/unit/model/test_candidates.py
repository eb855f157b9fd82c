import math
from functools import cache, partial

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, PartitionSpec

from grokctl.model.axes import MODEL_AXIS
from grokctl.model.bucketing import TOP_LOGPROBS
from grokctl.model.candidates import largest, merge
from grokctl.model.sampling import Sampling

LARGE = 131072
EVERYWHERE, SPLIT = PartitionSpec(), PartitionSpec(None, MODEL_AXIS)


@cache
def program(devices: int, count: int):
    """`largest` on a mesh of some devices."""
    return jax.jit(
        jax.shard_map(
            partial(largest, count=count),
            mesh=Mesh(jax.devices()[:devices], (MODEL_AXIS,), axis_types=(AxisType.Auto,)),
            in_specs=(SPLIT, EVERYWHERE, EVERYWHERE, EVERYWHERE),
            out_specs=SPLIT,
            check_vma=False,
        )
    )


def found(rows, temperatures, *, devices=8, count=TOP_LOGPROBS, adjustments=None, width=0):
    """Candidates of some rows."""
    ids = np.zeros((len(rows), width), np.int32)
    values = np.zeros((len(rows), width), np.float32)
    for row, made in enumerate(adjustments or []):
        if made is not None:
            ids[row, : len(made.ids)], values[row, : len(made.ids)] = made.ids, made.values
    parts = np.asarray(
        program(devices, count)(
            rows, np.minimum(temperatures, 1e30).astype(np.float32), ids, values
        )
    )
    return [
        merge(part.reshape(devices, -1), vocab=rows.shape[1], count=count, temperature=temperature)
        for part, temperature in zip(parts, temperatures, strict=True)
    ]


def normal(*shape: int, spread: float = 3.0, seed: int = 0):
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(np.float32)


def likeliest_first(logits):
    return np.argsort(-logits, kind="stable")


KINDS = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape) * rng.uniform(0.1, 8),
    "ties": lambda rng, shape: rng.integers(-3, 4, shape),
    "flat": lambda _, shape: np.zeros(shape),
    "spike": lambda rng, shape: rng.random(shape) + 30 * (np.arange(shape[1]) == 5),
    "sorted": lambda rng, shape: np.sort(rng.standard_normal(shape) * 3, axis=1),
    "huge": lambda rng, shape: rng.uniform(-3e38, 3e38, shape),
    "signed-zeros": lambda rng, shape: np.where(rng.random(shape) < 0.5, -0.0, 0.0),
}
ADJUSTED = 128
adjustable = st.fixed_dictionaries(
    {
        "bias": st.dictionaries(st.integers(0, 127), st.floats(-100, 100, width=32), max_size=4),
        "banned": st.sets(st.integers(0, 127), max_size=4)
        | st.sampled_from([range(16), range(16, 128), range(128)]),  # all of a device, or of all
    }
)


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 2**32),
    devices_vocab=st.sampled_from([(1, 128), (8, 128), (8, 1600), (1, 4096), (2, 3200)]),
    temperatures=st.tuples(
        *[st.sampled_from([0.0, 1e-320, 1e-300, 1e-6, 0.7, 1.0, 1e6, 1e300]) | st.floats(0.05, 5)]
        * 3
    ),
    filters=st.fixed_dictionaries(
        {
            "top_k": st.sampled_from([0, 0, 1, 40, 5000]),
            "top_p": st.sampled_from([1.0, 0.25, 0.95, 1e-300]),
            "min_p": st.sampled_from([0.0, 0.0, 0.05, 1.0]),
            "seed": st.integers(0, 2**64 - 1),
        }
    ),
    adjusted=st.none() | st.tuples(*[adjustable] * 3),
)
def test_candidates_choose_the_token_of_the_row_or_none(
    kind, seed, devices_vocab, temperatures, filters, adjusted
):
    devices, vocab = devices_vocab
    rows = KINDS[kind](np.random.default_rng(seed), (3, vocab)).astype(np.float32)
    samplings = [
        Sampling(temperature=temperature, **filters, logit_bias=tuple(some["bias"].items()))
        for temperature, some in zip(temperatures, adjusted or [{"bias": {}}] * 3, strict=True)
    ]
    made = [
        sampling.adjustments({}, some["banned"])
        for sampling, some in zip(samplings, adjusted or [], strict=False)
    ]

    candidates = found(
        rows, temperatures, devices=devices, adjustments=made, width=ADJUSTED if made else 0
    )

    for row, sampling, some, change in zip(
        rows, samplings, candidates, made or [None] * 3, strict=True
    ):
        changed = change.applied(row) if change else row
        order = likeliest_first(changed)
        assert some.ids.tolist() == order[: len(some.ids)].tolist()
        np.testing.assert_array_equal(some.values, changed[some.ids])
        np.testing.assert_array_equal(some.raw, row[some.ids])
        missing = changed[order[len(some.ids) :]]
        assert (missing <= some.bound).all()
        tokens = [sampling.choose(changed, step) for step in range(4)]
        chosen = [sampling.choose_from(some, step) for step in range(4)]
        assert all(one in (None, token) for one, token in zip(chosen, tokens, strict=True))
        if sampling.temperature == 0 or len(some.ids) == vocab or filters["top_k"] == 1:
            assert chosen == tokens


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 20.0])
@pytest.mark.parametrize("temperature", [1e-6, 0.3, 1.0, 7.0, 1e6, 1e-300, 1e300])
def test_the_total_is_as_exact_as_it_says(devices, spread, temperature):
    row = normal(1, 8000, spread=spread)

    (some,) = found(row, [temperature], devices=devices)

    wide = row[0].astype(np.float64)
    with np.errstate(over="ignore"):
        weights = np.exp((wide - wide.max()) / temperature)
    listed = weights[some.ids].sum()
    off = abs(some.total - weights.sum()) / weights.sum()
    assert off <= some.error
    if 1e-6 <= temperature <= 1e6:
        assert some.error <= 2**-14 * (weights.sum() - listed) / weights.sum() * 1.01 + 1e-11


def test_log_probabilities_are_of_logits_before_adjustment():
    rows = normal(2, 1600)
    sampling = Sampling(temperature=0.7, logit_bias=((3, 50.0), (1599, 60.0)))
    change = sampling.adjustments({}, [8])

    adjusted = found(rows, [0.7, 0.7], adjustments=[change, None], width=ADJUSTED)
    plain = found(rows, [0.7, 0.7])

    for row, some, other in zip(rows, adjusted, plain, strict=True):
        exact = math.log(np.exp(row.astype(np.float64)).sum())
        assert some.log_normaliser == pytest.approx(exact, abs=1e-6)
        assert other.log_normaliser == pytest.approx(exact, abs=1e-6)
        expected = likeliest_first(row)[:TOP_LOGPROBS]
        for one in (some, other):
            assert one.top_ids.tolist() == expected.tolist()
            np.testing.assert_array_equal(one.top_values, row[expected])
    assert adjusted[0].ids[:2].tolist() == [1599, 3]
    np.testing.assert_array_equal(adjusted[0].raw[:2], rows[0, [1599, 3]])
    assert 8 not in adjusted[0].ids[: len(adjusted[0].ids) // 2]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("options", "spread", "most"),
    [
        pytest.param({"temperature": 0.7, "top_p": 0.95}, 5.0, 0.002, id="defaults-of-run"),
        pytest.param({"temperature": 0.7, "top_p": 0.95}, 3.0, 0.15, id="flatter"),
        pytest.param({"temperature": 1.0}, 6.0, 0.02, id="plain"),
        pytest.param({"temperature": 1.0, "top_k": 40}, 1.0, 0.0, id="top-k"),
        pytest.param({"temperature": 1.0, "min_p": 0.05}, 2.0, 0.0, id="min-p"),
    ],
)
def test_candidates_seldom_do_not_decide(devices, options, spread, most):
    row, sampling = normal(1, LARGE, spread=spread), Sampling(**options)

    (some,) = found(row, [sampling.temperature], devices=devices, count=256)

    draws = [sampling.choose_from(some, step) for step in range(3000)]
    assert draws.count(None) <= most * 3000
    for step in range(0, 3000, 300):
        assert draws[step] in (None, sampling.choose(row[0], step))


def test_a_peaked_distribution_is_always_decided():
    row = normal(1, LARGE, spread=0.5)
    row[0, [7, 100_000, 70_000]] += [20, 20, 20]
    sampling = Sampling(temperature=0.7, top_p=0.95)

    (some,) = found(row, [0.7], count=256)

    draws = [sampling.choose_from(some, step) for step in range(1000)]
    assert set(draws) == {7, 100_000, 70_000}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), high=st.integers(0, 60))
@example(seed=0, high=0)
def test_groups_that_are_not_searched_hold_none_of_the_largest(seed, high):
    row = np.random.default_rng(seed).integers(0, high + 1, (1, 4096)).astype(np.float32)

    (some,) = found(row, [1.0], devices=1)

    assert some.ids.tolist() == likeliest_first(row[0])[:TOP_LOGPROBS].tolist()
