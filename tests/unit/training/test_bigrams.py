import numpy as np
import pytest
from training.bigrams import Bigrams

TOKENS = np.array([0, 1, 0, 2, 0, 1, 3, 1, 0, 1, 2, 2, 0, 3, 0, 1], np.uint16)


def probabilities(model: Bigrams, vocabulary: int) -> np.ndarray:
    """Of every pair of tokens."""
    pairs = [[v, w] for v in range(vocabulary) for w in range(vocabulary)]
    bits = [model.bits(np.array(pair, np.uint16)) for pair in pairs]
    return 2.0 ** -np.array(bits).reshape(vocabulary, vocabulary)


def test_the_probabilities_after_every_token_sum_to_one():
    found = probabilities(Bigrams.of(TOKENS, 6), 6)

    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    assert (found > 0).all()


def test_a_pair_is_as_likely_as_the_formula_says():
    # of 15 pairs, 5 were seen once and 3 twice; of 4 tokens, 2 in three contexts and 2 in two
    counts = np.zeros((4, 4))
    np.add.at(counts, (TOKENS[:-1], TOKENS[1:]), 1)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice)
    contexts = (counts > 0).sum(axis=0)
    less = 1 / (1 + 2 * (contexts == 2).sum())  # no token has one context: one is assumed
    lower = (contexts[1] - less + less * 4 / 4) / contexts.sum()
    expected = (counts[0, 1] - discount) / counts[0].sum() + (
        discount * (counts[0] > 0).sum() / counts[0].sum() * lower
    )

    found = Bigrams.of(TOKENS, 4).bits(np.array([0, 1], np.uint16))

    assert 2.0**-found == pytest.approx(expected)


def test_a_token_in_many_contexts_is_likelier_after_an_unseen_one_than_a_frequent_token_in_one():
    tokens = np.array([0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 4, 3, 5, 3, 0], np.uint16)

    found = probabilities(Bigrams.of(tokens, 8), 8)

    assert found[7, 3] > found[7, 1]
