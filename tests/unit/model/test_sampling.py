import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grokctl.errors import UsageError
from grokctl.model.sampling import Adjustments, Candidates, Sampling

LARGE = 131072


def reference(logits, *, temperature, top_k, top_p, min_p):
    """Straight from the definitions: a dictionary of token to probability, likeliest first."""
    tokens = sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))
    if top_k:
        tokens = tokens[:top_k]
    top = float(logits[tokens[0]])
    weights = [math.exp((float(logits[token]) - top) / temperature) for token in tokens]
    total = math.fsum(weights)
    kept = []
    for place, token in enumerate(tokens):
        before = math.fsum(weights[:place]) / total
        is_outside = top_p < 1 and before >= top_p  # rounding may reach 1 early
        if place and (is_outside or weights[place] < min_p * weights[0]):
            break
        kept.append((token, weights[place]))
    total = math.fsum(weight for _, weight in kept)
    return {token: weight / total for token, weight in kept}


def logits_of(seed: int, size: int, *, spread: float = 3.0):
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def drawn(sampling, logits, step):
    """The token of the definition: the first up to which the probabilities exceed the draw."""
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    tokens, probabilities = sampling.distribution(logits)
    sums = np.cumsum(probabilities)
    draw = np.random.default_rng([sampling.seed, step]).random()
    return int(tokens[np.searchsorted(sums, draw * sums[-1], side="right")])


def candidates_of(logits, count, temperature, *, error=1e-6, off=0.0):
    """The largest `count` logits, with a total that is off by that share of the error."""
    ids = np.argsort(-logits, kind="stable")[:count].astype(np.int32)
    wide = logits.astype(np.float64)
    top = max(float(wide.max()), -3e38)
    with np.errstate(over="ignore"):
        total = float(np.exp((wide - top) / (temperature or 1.0)).sum())
    return Candidates(
        ids=ids,
        values=logits[ids],
        raw=logits[ids],
        bound=float(logits[ids[-1]]) if count < len(logits) else -math.inf,
        total=total * (1 + off * error),
        error=error / (1 - error) * 1.001,  # in shares of the total that is known
        log_normaliser=0.0,
        top_ids=ids[:20],
        top_values=logits[ids[:20]],
    )


# --- greedy


@given(seed=st.integers(0, 1000), step=st.integers(0, 100))
def test_without_temperature_the_likeliest_token_is_taken(seed, step):
    logits = logits_of(seed, 97)

    assert Sampling(seed=seed).choose(logits, step) == int(np.argmax(logits))


def test_without_temperature_every_other_number_is_ignored():
    logits = logits_of(1, 50)
    greedy = Sampling(temperature=0, top_k=7, top_p=0.3, min_p=0.5, seed=9)

    assert greedy.choose(logits, 3) == int(np.argmax(logits))


def test_the_lowest_of_equally_likely_tokens_is_taken():
    assert Sampling().choose(np.array([0, 5, 5, 1], np.float32), 0) == 1


def test_one_candidate_is_greedy_whatever_the_seed():
    logits = logits_of(2, 300)

    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-6}):
        chosen = {
            Sampling(**{"temperature": 1.0, **options, "seed": seed}).choose(logits, 0)
            for seed in range(20)
        }
        assert chosen == {int(np.argmax(logits))}


# --- distributions


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 80),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 90),
    top_p=st.floats(0.01, 0.999) | st.just(1.0),  # rounding of sums decides closer to 1
    min_p=st.floats(0, 0.9),
)
@example(seed=0, size=60, temperature=1.0, top_k=5, top_p=1.0, min_p=0.0)
@example(seed=0, size=60, temperature=1.0, top_k=0, top_p=0.9, min_p=0.0)
@example(seed=0, size=60, temperature=1.0, top_k=0, top_p=1.0, min_p=0.1)
@example(seed=0, size=60, temperature=0.5, top_k=0, top_p=1.0, min_p=0.0)
@example(seed=2, size=2, temperature=0.0546875, top_k=0, top_p=1.0, min_p=0.0)
def test_the_distribution_is_that_of_the_definitions(seed, size, temperature, top_k, top_p, min_p):
    logits = logits_of(seed, size)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}

    tokens, probabilities = Sampling(**options).distribution(logits)

    expected = reference(logits, **options)
    assert tokens.tolist() == list(expected)
    np.testing.assert_allclose(probabilities, list(expected.values()), rtol=1e-9)
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert (np.diff(probabilities) <= 0).all()


@pytest.mark.parametrize("size", [10, 100, 1000, LARGE])
@pytest.mark.parametrize("top_k", [2, 5, 9])
def test_ties_at_the_border_of_top_k_keep_the_lowest_tokens(size, top_k):
    tokens, probabilities = Sampling(temperature=1, top_k=top_k).distribution(
        np.zeros(size, np.float32)
    )

    assert tokens.tolist() == list(range(top_k))
    np.testing.assert_allclose(probabilities, 1 / top_k)


@settings(deadline=None)
@given(
    values=st.lists(st.integers(-2, 2), min_size=1, max_size=400),
    top_k=st.integers(0, 30),
)
def test_tokens_come_likeliest_first_and_ties_by_number(values, top_k):
    logits = np.array(values, np.float32)

    tokens, _ = Sampling(temperature=1, top_k=top_k).distribution(logits)

    ordered = sorted(range(len(values)), key=lambda token: (-values[token], token))
    assert tokens.tolist() == ordered[: top_k or None]


def test_ties_at_the_border_of_top_p_keep_the_lowest_tokens():
    tokens, _ = Sampling(temperature=1, top_p=0.25).distribution(np.zeros(16, np.float32))

    assert tokens.tolist() == [0, 1, 2, 3]


def test_every_token_can_be_drawn_without_filters():
    tokens, _ = Sampling(temperature=1).distribution(logits_of(3, 500))

    assert sorted(tokens.tolist()) == list(range(500))


# --- draws


def test_the_same_seed_draws_the_same_tokens():
    logits = [logits_of(step, 200) for step in range(30)]
    draws = [
        [Sampling(temperature=1, seed=seed).choose(row, step) for step, row in enumerate(logits)]
        for seed in (5, 5, 6)
    ]

    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_a_draw_does_not_depend_on_those_before_it():
    logits = logits_of(4, 200)
    in_order = Sampling(temperature=1, seed=8)
    forwards = [in_order.choose(logits, step) for step in range(20)]

    backwards = [in_order.choose(logits, step) for step in reversed(range(20))]

    assert backwards[::-1] == forwards
    assert Sampling(temperature=1, seed=8).choose(logits, 13) == forwards[13]
    assert len(set(forwards)) > 5


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"temperature": 2.0}, id="hot"),
        pytest.param({"top_k": 4}, id="top-k"),
        pytest.param({"top_p": 0.8}, id="top-p"),
        pytest.param({"min_p": 0.2}, id="min-p"),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(options):
    logits = np.log(np.array([0.02, 0.3, 0.08, 0.2, 0.1, 0.3], np.float32))
    sampling = Sampling(**{"temperature": 1.0, "seed": 11, **options})
    expected = reference(
        logits, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    )
    draws = 4000

    counts = Counter(sampling.choose(logits, step) for step in range(draws))

    assert set(counts) == set(expected)
    statistic = sum(
        (counts[token] - draws * likely) ** 2 / (draws * likely)
        for token, likely in expected.items()
    )
    assert statistic < 20.5  # 0.1 % of the time for five degrees of freedom


# --- the fast forms

KINDS = {
    "gaussian": lambda rng, size: rng.standard_normal(size) * rng.uniform(0.1, 8),
    "ties": lambda rng, size: rng.integers(-3, 4, size),
    "flat": lambda _, size: np.zeros(size),
    "spike": lambda rng, size: np.where(np.arange(size) == size // 2, 30, rng.random(size)),
    "half-forbidden": lambda rng, size: np.where(
        rng.random(size) < 0.5, -np.inf, rng.standard_normal(size)
    ),
    "forbidden": lambda _, size: np.full(size, -np.inf),
    "huge": lambda rng, size: rng.uniform(-3e38, 3e38, size),
    "signed-zeros": lambda rng, size: np.where(rng.random(size) < 0.5, -0.0, 0.0),
}
rows = st.builds(
    lambda kind, seed, size: KINDS[kind](np.random.default_rng(seed), size).astype(np.float32),
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 2**32),
    size=st.integers(1, 3000),
)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-320, 1e-300, 1e-3, 0.7, 1.0, 1e300]) | st.floats(0.05, 5),
    top_k=st.sampled_from([0, 0, 1, 2, 40, 10**6]) | st.integers(0, 3000),
    top_p=st.sampled_from([1.0, 1e-300, 0.25, 0.5, 0.95, 1 - 2**-53]) | st.floats(0.01, 1),
    min_p=st.sampled_from([0.0, 0.0, 0.0, 1e-300, 0.05, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(deadline=None, max_examples=300)
@given(sampling=samplings, logits=rows)
def test_a_token_of_a_row_is_that_of_the_definition(sampling, logits):
    for step in range(5):
        assert sampling.choose(logits, step) == drawn(sampling, logits, step)


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0, 5.0])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"temperature": 0.7, "top_p": 0.95}, id="defaults-of-run"),
        pytest.param({"top_k": 40}, id="top-k"),
        pytest.param({"top_k": 70_000, "top_p": 0.9}, id="large-top-k"),
        pytest.param({"min_p": 0.001}, id="min-p"),
    ],
)
def test_a_token_of_a_whole_vocabulary_is_that_of_the_definition(spread, options):
    sampling = Sampling(**{"temperature": 1.0, "seed": 3, **options})
    logits = logits_of(5, LARGE, spread=spread)

    for step in range(4):
        assert sampling.choose(logits, step) == drawn(sampling, logits, step)


@settings(deadline=None, max_examples=300)
@given(
    sampling=samplings,
    logits=rows,
    share=st.floats(0, 1),
    error=st.sampled_from([1e-12, 1e-6, 1e-2, 0.5]),
    off=st.floats(-1, 1),
)
def test_candidates_choose_the_token_of_the_definition_or_none(sampling, logits, share, error, off):
    count = max(1, round(share * len(logits)))
    candidates = candidates_of(logits, count, sampling.temperature, error=error, off=off)

    for step in range(5):
        chosen = sampling.choose_from(candidates, step)
        assert chosen in (None, drawn(sampling, logits, step))


@settings(deadline=None, max_examples=200)
@given(sampling=samplings, logits=rows, extra=st.integers(0, 20))
def test_candidates_that_are_all_tokens_that_count_always_decide(sampling, logits, extra):
    possible = max(1, np.count_nonzero(logits > -np.inf))
    count = min(sampling.top_k or len(logits), possible) + extra
    candidates = candidates_of(logits, min(count, len(logits)), sampling.temperature)

    for step in range(3):
        assert sampling.choose_from(candidates, step) == drawn(sampling, logits, step)


@pytest.mark.parametrize(
    ("options", "spread", "most"),
    [
        pytest.param({"temperature": 0.7, "top_p": 0.95}, 3.0, 0.01, id="defaults-of-run"),
        pytest.param({"temperature": 1.0}, 5.0, 0.03, id="plain"),
        pytest.param({"temperature": 1.0, "min_p": 0.05}, 2.0, 0.0, id="min-p"),
        pytest.param({"temperature": 0.7, "top_p": 0.95}, 2.0, 0.4, id="a-flat-nucleus"),
    ],
)
def test_candidates_seldom_do_not_decide(options, spread, most):
    logits, sampling = logits_of(1, LARGE, spread=spread), Sampling(**options)
    candidates = candidates_of(logits, 1024, sampling.temperature, error=1e-6)

    undecided = sum(sampling.choose_from(candidates, step) is None for step in range(2000))

    assert undecided <= most * 2000


def test_candidates_do_not_decide_where_the_total_does():
    logits = np.zeros(100, np.float32)
    half = Sampling(temperature=1, top_p=0.2)  # 20 tokens, or 21 if the total is a little more

    exact = half.choose_from(candidates_of(logits, 50, 1.0, error=0.0), 0)
    blurred = [
        half.choose_from(candidates_of(logits, 50, 1.0, error=1e-2), step) for step in range(300)
    ]

    assert exact == half.choose(logits, 0)
    assert 0 < blurred.count(None) < 200


# --- adjustments


def adjusted(logits, counts=None, banned=(), **options):
    return Sampling(**options).adjustments(counts or {}, banned).applied(logits)


def test_nothing_to_adjust_is_none():
    assert Sampling().adjustments({3: 2}) is None
    assert Sampling(logit_bias=((4, 0.0),)).adjustments({}) is None
    assert Sampling(frequency_penalty=1).adjustments({3: 0}) is None


@settings(deadline=None)
@given(
    counts=st.dictionaries(st.integers(0, 49), st.integers(0, 30)),
    bias=st.dictionaries(st.integers(0, 49), st.floats(-100, 100)),
    banned=st.sets(st.integers(0, 49), max_size=10),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
)
def test_adjustments_are_bias_less_penalties_and_forbid_what_is_banned(
    counts, bias, banned, frequency, presence
):
    logits = logits_of(6, 50)
    before = logits.copy()
    expected = [
        -math.inf
        if token in banned
        else logit
        + bias.get(token, 0)
        - counts.get(token, 0) * frequency
        - (counts.get(token, 0) > 0) * presence
        for token, logit in enumerate(logits.tolist())
    ]

    made = Sampling(
        frequency_penalty=frequency, presence_penalty=presence, logit_bias=tuple(bias.items())
    ).adjustments(counts, banned) or Adjustments(np.array([], np.int32), np.array([], np.float32))

    np.testing.assert_allclose(made.applied(logits), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(logits, before)
    assert (np.diff(made.ids) > 0).all()
    assert (np.abs(made.values) > 1e-38).all()  # smaller ones are 0 to devices
    assert (made.ids.dtype, made.values.dtype) == (np.int32, np.float32)


def test_a_banned_token_is_never_chosen_whatever_its_bias():
    logits = np.zeros(3, np.float32)
    options = {"logit_bias": ((1, 100.0),), "temperature": 1.0}

    chosen = {
        Sampling(**options, seed=seed).choose(adjusted(logits, banned=[1, 2], **options), 0)
        for seed in range(30)
    }

    assert chosen == {0}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_all_tokens_are_banned_the_lowest_is_chosen(temperature):
    row = adjusted(logits_of(7, 30), banned=range(30))
    sampling = Sampling(temperature=temperature)

    assert {sampling.choose(row, step) for step in range(20)} == {0}
    assert sampling.choose_from(candidates_of(row, 10, temperature), 0) == 0
    assert Sampling(temperature=1).distribution(row)[0].tolist() == [0]


# --- extremes


@pytest.mark.parametrize(
    ("logits", "likely"),
    [
        pytest.param([1e30, 0, -1e30], {0: 1.0}, id="huge"),
        pytest.param([0, -np.inf, 0, -np.inf], {0: 0.5, 2: 0.5}, id="impossible-ones"),
        pytest.param([-np.inf, 3, -np.inf], {1: 1.0}, id="one-possible"),
        pytest.param([-1e30, -1e30], {0: 0.5, 1: 0.5}, id="all-tiny"),
        pytest.param([3e38, -3e38], {0: 1.0}, id="whole-range"),
        pytest.param([1.0], {0: 1.0}, id="one-token"),
    ],
)
def test_extreme_logits_are_distributions_all_the_same(logits, likely):
    tokens, probabilities = Sampling(temperature=1).distribution(np.array(logits, np.float32))

    found = dict(zip(tokens.tolist(), probabilities.tolist(), strict=True))
    assert {token: chance for token, chance in found.items() if chance > 0} == likely
    assert all(
        Sampling(temperature=1, seed=seed).choose(np.array(logits, np.float32), 0) in likely
        for seed in range(10)
    )


@pytest.mark.parametrize("temperature", [1e-320, 1e-300, 1e-30, 1e30, 1e300])
def test_extreme_temperatures_are_distributions_all_the_same(temperature):
    logits = np.array([4, 5, -2], np.float32)

    tokens, probabilities = Sampling(temperature=temperature).distribution(logits)

    assert tokens[0] == 1
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities[0] == pytest.approx(1 if temperature < 1 else 1 / 3)


def test_a_whole_vocabulary_keeps_its_last_bit_of_probability():
    logits = np.zeros(LARGE, np.float32)
    tokens, probabilities = Sampling(temperature=1, top_p=1.0).distribution(logits)

    assert len(tokens) == LARGE
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)


# --- bad numbers


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"temperature": -0.1}, id="negative-temperature"),
        pytest.param({"temperature": math.nan}, id="no-temperature"),
        pytest.param({"temperature": math.inf}, id="endless-temperature"),
        pytest.param({"top_k": -1}, id="negative-top-k"),
        pytest.param({"top_p": 0}, id="zero-top-p"),
        pytest.param({"top_p": 1.01}, id="large-top-p"),
        pytest.param({"top_p": math.nan}, id="no-top-p"),
        pytest.param({"min_p": -0.01}, id="negative-min-p"),
        pytest.param({"min_p": 1.5}, id="large-min-p"),
        pytest.param({"min_p": math.nan}, id="no-min-p"),
        pytest.param({"seed": -1}, id="negative-seed"),
        pytest.param({"seed": 2**64}, id="large-seed"),
        pytest.param({"frequency_penalty": 2.1}, id="large-frequency-penalty"),
        pytest.param({"frequency_penalty": math.nan}, id="no-frequency-penalty"),
        pytest.param({"presence_penalty": -2.1}, id="low-presence-penalty"),
        pytest.param({"presence_penalty": math.inf}, id="endless-presence-penalty"),
    ],
)
def test_a_number_outside_its_range_is_a_usage_error_that_says_it(options):
    ((name, value),) = options.items()

    with pytest.raises(UsageError, match=f"^{name} {value}: expected ") as caught:
        Sampling(**options)

    assert caught.value.name == name


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        pytest.param(((3, 1.0), (-1, 2.0)), "'-1=2': expected an id of at least 0", id="id"),
        pytest.param(((3, 100.5),), "'3=100.5': expected an id", id="large"),
        pytest.param(((3, -100.5),), "'3=-100.5': expected an id", id="low"),
        pytest.param(((3, math.nan),), "'3=nan': expected an id", id="none"),
        pytest.param(((3, 1.0), (3, 2.0)), "'3=2': expected each id once", id="twice"),
    ],
)
def test_a_bias_outside_its_range_is_a_usage_error_that_says_it(bias, said):
    with pytest.raises(UsageError, match=f"^logit_bias {re.escape(said)}") as caught:
        Sampling(logit_bias=bias)

    assert caught.value.name == "logit_bias"


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 2**64 - 1},
        {"top_p": 1},
        {"min_p": 1},
        {"min_p": 0},
        {"top_k": 2**40},
        {"frequency_penalty": -2},
        {"presence_penalty": 2},
        {"logit_bias": ((0, -100.0), (1, 100.0))},
    ],
)
def test_the_ends_of_the_ranges_are_good(options):
    assert Sampling(temperature=1, **options).choose(logits_of(0, 9), 0) in range(9)
