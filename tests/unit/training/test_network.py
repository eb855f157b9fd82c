from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import FLOAT32_BOUND, load_golden
from training import network
from training.network import initial_parameters, logits_of, loss_of
from training.releases import parameters_of

from grokctl.checkpoint.miniature import MINIATURE

FLOAT32 = jnp.dtype(jnp.float32)
SMALL = replace(MINIATURE, num_layers=1, emb_size=32, vocab_size=64, widening_factor=3)


TOKENS = np.random.default_rng(3).integers(0, SMALL.vocab_size, (2, 9)).astype(np.int32)


def test_the_form_that_is_trained_gives_the_reference_codes_logits():
    golden = load_golden("two-layers")
    parameters = parameters_of(golden.release)

    logits, _ = jax.jit(
        lambda found, tokens: logits_of(
            found, tokens, config=golden.release.config, operand=FLOAT32
        )
    )(parameters, jnp.asarray([golden.tokens]))

    assert np.abs(np.asarray(logits[0]) - golden.float32).max() < FLOAT32_BOUND


@pytest.fixture(scope="module")
def gradient():
    """The change of the loss with every parameter, in runs of 4 tokens and of 64."""

    found = []
    with pytest.MonkeyPatch.context() as patch:
        for run in (4, 64):
            patch.setattr(network, "RUN", run)

            def loss(parameters):  # another one each time: JAX keeps what it has traced
                return loss_of(parameters, TOKENS, config=SMALL, operand=FLOAT32)[0]

            found.append(jax.jit(jax.grad(loss))(initial_parameters(SMALL, 1)))
    return found


def test_the_length_of_a_run_of_an_expert_changes_no_gradient(gradient):
    for one, other in zip(*map(jax.tree.leaves, gradient), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_a_gradient_is_the_slope_of_the_loss(gradient):
    parameters = initial_parameters(SMALL, 1)
    norm = float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient[0]))))

    @jax.jit
    def loss(step):
        moved = jax.tree.map(lambda leaf, slope: leaf + step * slope, parameters, gradient[0])
        return loss_of(moved, TOKENS, config=SMALL, operand=FLOAT32)[0]

    ahead, behind = (float(loss(step / norm)) for step in (0.01, -0.01))

    assert (ahead - behind) / 0.02 == pytest.approx(norm, rel=0.01)


def test_bfloat16_operands_change_gradients_a_little(gradient):
    @jax.jit
    @jax.grad
    def rough(parameters):
        return loss_of(parameters, TOKENS, config=SMALL, operand=jnp.dtype(jnp.bfloat16))[0]

    found = rough(initial_parameters(SMALL, 1))

    for exact, other in zip(*map(jax.tree.leaves, (gradient[0], found)), strict=True):
        scale = float(jnp.linalg.norm(exact))
        assert 0 < float(jnp.linalg.norm(exact - other)) < 0.1 * scale + 1e-3


def test_experts_that_share_the_tokens_evenly_have_an_imbalance_of_one():
    parameters = initial_parameters(SMALL, 1)
    layer = parameters.layers[0]
    # one of two experts is sure of each token, and the others are chosen beside it or never
    two = jnp.zeros_like(layer.router).at[:, 0].set(9.0).at[:, 1].set(-9.0)
    crowded = replace(parameters, layers=(replace(layer, router=two),))
    tokens = np.random.default_rng(4).integers(0, SMALL.vocab_size, (4, 64))

    @jax.jit
    def imbalance(found):
        return logits_of(found, tokens, config=SMALL, operand=FLOAT32)[1]

    assert float(imbalance(parameters)) == pytest.approx(1.0, abs=0.05)
    # 4 (s² + (1 - s)²), where s of the tokens choose one of the two first
    assert 2.0 <= float(imbalance(crowded)) <= 4.0
