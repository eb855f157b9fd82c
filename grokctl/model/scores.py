"""Log-probabilities of given tokens, and of the likeliest ones, without keeping the logits."""

from dataclasses import dataclass
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grokctl.model.axes import MODEL_AXIS
from grokctl.model.bucketing import TOP_LOGPROBS, score_width
from grokctl.model.forward import head
from grokctl.model.step_spec import StepShape

_TERMS: Final = 64
"""Numbers that are summed together: rounding errors grow with them, and not with the vocabulary."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Scores:
    """What a model says of the token after each of some positions, in nats.

    A log-probability is `(logit - largest) - log(sum(exp(logit - largest)))`. It differs from one
    computed in float64 from the same logits by at most 1e-5, plus 2^-23 of itself: far below 0
    float32 is no finer. It is not finite if one of the logits is NaN or infinite.
    """

    logprob: Float[Array, " time"]
    """Of the target; the same number as in `top_logprobs` if it is among them."""
    top_logprobs: Float[Array, "time top"]
    """Of the likeliest tokens, descending."""
    top_ids: Int[Array, "time top"]
    """Their ids; of equal logits, the lower id first."""


@jax.named_scope("scores")
def scores(
    embedding: Float[Array, "vocab_local embed"],
    final_norm: Float[Array, " embed"],
    hidden: Float[Array, "1 time embed"],
    targets: Int[Array, "1 time"],
    *,
    shape: StepShape,
) -> Scores:
    """Score targets, by the logits that `head` computes: for one block of the vocabulary at a time.

    Args:
        embedding: This device's part.
        final_norm: The scale of the last norm.
        hidden: The last layer's output.
        targets: The token after each position; of padding, any id.
        shape: Static facts.

    Returns:
        The same on every device.
    """
    vocab, embed = embedding.shape
    width = score_width(hidden.shape[1], vocab=vocab, embed=embed)
    first = jax.lax.axis_index(MODEL_AXIS) * vocab

    def of_block(begin: Array) -> _Part:
        rows = jax.lax.dynamic_slice_in_dim(embedding, begin, width) if width < vocab else embedding
        logits = head(rows, final_norm, hidden, None, shape=shape)[0]
        return _part(logits, targets[0] - (first + begin), first=first + begin)

    blocks = jax.lax.map(of_block, jnp.arange(0, vocab, width))
    every = jax.lax.all_gather(_joined(blocks), MODEL_AXIS)
    return _scores(_joined(every), targets[0])


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class _Part:
    """All that is kept of the logits over a part of the vocabulary; parts have an axis before."""

    largest: Float[Array, "*parts time"]
    total: Float[Array, "*parts time"]
    """Sum of `exp(logit - largest)`."""
    target: Float[Array, "*parts time"]
    """The target's logit; below every logit if the target lies in another part."""
    values: Float[Array, "*parts time top"]
    """The largest logits, descending; of equal ones, the lower id first."""
    ids: Int[Array, "*parts time top"]
    """Their token ids."""


def _part(
    logits: Float[Array, "time vocab"], targets: Int[Array, " time"], *, first: Int[Array, ""]
) -> _Part:
    """Logits of consecutive tokens, `first` onwards, of which the targets are counted too."""
    width = logits.shape[1]
    logits = jnp.where(logits == 0, 0.0, logits)  # top_k orders -0 below 0
    values, ids = jax.lax.top_k(logits, min(TOP_LOGPROBS, width))
    is_here = (targets >= 0) & (targets < width)
    place = jnp.clip(targets, 0, width - 1)[:, None]
    target = jnp.take_along_axis(logits, place, axis=1)[:, 0]
    largest, total = _summed(logits.T, jnp.ones_like(logits.T))
    return _Part(
        largest=largest,
        total=total,
        target=jnp.where(is_here, target, -jnp.inf),
        values=values,
        ids=ids + first,
    )


def _summed(
    largest: Float[Array, "*parts time"], total: Float[Array, "*parts time"]
) -> tuple[Float[Array, " time"], Float[Array, " time"]]:
    """The largest of all parts, and their totals together, relative to it: few at a time."""
    while (parts := len(largest)) > 1:
        terms = max(count for count in range(1, _TERMS + 1) if parts % count == 0)
        grouped = (parts if terms == 1 else terms, -1, *largest.shape[1:])
        apart, totals = largest.reshape(grouped), total.reshape(grouped)
        largest = jnp.max(apart, axis=0)
        total = jnp.sum(totals * jnp.exp(apart - largest[None]), axis=0)
    return largest[0], total[0]


def _joined(parts: _Part) -> _Part:
    """Parts that follow each other as one."""
    largest, total = _summed(parts.largest, parts.total)
    time = parts.values.shape[1]
    values = jnp.swapaxes(parts.values, 0, 1).reshape(time, -1)
    ids = jnp.swapaxes(parts.ids, 0, 1).reshape(time, -1)
    values, places = jax.lax.top_k(values, min(TOP_LOGPROBS, values.shape[1]))
    return _Part(
        largest=largest,
        total=total,
        target=jnp.max(parts.target, axis=0),
        values=values,
        ids=jnp.take_along_axis(ids, places, axis=1),
    )


def _scores(whole: _Part, targets: Int[Array, " time"]) -> Scores:
    logits = jnp.concatenate([whole.target[:, None], whole.values], axis=1)
    logprobs = (logits - whole.largest[:, None]) - jnp.log(whole.total)[:, None]
    own, top = logprobs[:, 0], logprobs[:, 1:]
    # a compiler may have rounded one logit in two ways: multiplied, and in a sum with its product
    is_target = whole.ids == targets[:, None]
    among = jnp.max(jnp.where(is_target, top, -jnp.inf), axis=1)
    own = jnp.where(jnp.any(is_target, axis=1), among, own)
    return Scores(logprob=own, top_logprobs=top, top_ids=whole.ids)
