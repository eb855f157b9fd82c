"""The largest logits of each row, found on the devices, and joined on the host.

A row of logits is 512 kB; what is needed of it to choose a token and to report log-probabilities is
a few kilobytes. Each device finds that of its part of the vocabulary, `largest`; the host joins the
parts of a row, `merge`.
"""

from math import inf, log
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from grokctl.model.axes import MODEL_AXIS
from grokctl.model.bucketing import TOP_LOGPROBS
from grokctl.model.sampling import Candidates

_GROUP: Final = 32
"""Tokens whose largest logit stands for them in a search."""
_ADDED: Final = 64
"""Numbers that are added up at once."""
_TEMPERATURES: Final = (1e-6, 1e6)
"""Those for which devices add weights up."""
_ERROR: Final = 2.0**-14
"""Largest relative error of a device's sum of weights.

Exponents: 2^-21 each, for a difference, a temperature and a quotient in float32: 80 · 2^-21
of a weight above exp(-80); smaller ones are nothing beside 1. exp itself: 2^-17. Three levels of
sums of 64: 192 · 2^-24. Together 0.95 · 2^-14.
"""
_ROUNDING: Final = 1e-12
"""The same for sums in float64."""
_LOWEST: Final = float(np.finfo(np.float32).min)


@jax.named_scope("largest")
def largest(
    logits: Float[Array, "batch vocab"],
    temperatures: Float[Array, " batch"],
    adjust_ids: Int[Array, "batch adjusted"],
    adjust_values: Float[Array, "batch adjusted"],
    *,
    count: int,
) -> Int[Array, "batch columns"]:
    """What the host needs of this device's part of the vocabulary.

    Runs inside `jax.shard_map` over the axis `model`.

    Args:
        logits: float32, this device's part, before adjustment.
        temperatures: float32, of each row; where 0, only the likeliest token is of use.
        adjust_ids: int32, tokens of the whole vocabulary, each once in a row; with no columns,
            nothing is compiled for them. Values of 0 fill up rows that have fewer, with any id.
        adjust_values: float32, what is added to these logits; may be -inf.
        count: How many of the largest adjusted logits to return; at least 20, or all there are.

    Returns:
        int32, floats as their bits, to be read by `merge`: of the largest adjusted logits ids,
        values and, only if there are adjustments, logits before; then ids and values of the
        largest logits before adjustment; then the sum of the weights of all tokens not listed, and
        that of `exp(logit - largest)` before adjustment.
    """
    vocab = logits.shape[-1]
    first = jax.lax.axis_index(MODEL_AXIS) * vocab
    adjusted = logits
    if adjust_ids.shape[1]:
        adjusted = _adjusted(logits, adjust_ids - first, adjust_values)
    values, places = _top(adjusted, _listed(count, vocab))
    columns, top = [places + first, values], values
    if adjust_ids.shape[1]:
        top, top_places = _top(logits, min(TOP_LOGPROBS, vocab))
        raw = jnp.take_along_axis(logits, places, axis=1)
        columns += [raw, top_places + first, top]
    columns.append(_sum(_weights_behind(adjusted, values, places, temperatures)))
    columns.append(_sum(jnp.exp(logits - top[:, :1])))
    return jnp.concatenate([_bits(column) for column in columns], axis=1)


def merge(parts: NDArray[np.int32], *, vocab: int, count: int, temperature: float) -> Candidates:
    """Join the parts of one row.

    The lists are sorted into one, which ends with the first of their last tokens: of each part, all
    that precede it are listed.

    Args:
        parts: What `largest` returned for the row, `(devices, columns)`, in the order of the
            vocabulary.
        vocab: The size of the whole vocabulary.
        count: As given to `largest`.
        temperature: Of the row.
    """
    local = vocab // len(parts)
    listed, floats = _listed(count, local), parts.view(np.float32)
    ids, values = parts[:, :listed], floats[:, listed : 2 * listed]
    raw, top_ids, top_values = values, ids[:, :TOP_LOGPROBS], values[:, :TOP_LOGPROBS]
    if parts.shape[1] > 2 * listed + 2:  # two sums at the end
        top = min(TOP_LOGPROBS, local)
        raw = floats[:, 2 * listed : 3 * listed]
        top_ids, top_values = parts[:, -2 * top - 2 : -top - 2], floats[:, -top - 2 : -2]
    order = np.argsort(-values, axis=None, kind="stable")
    bound = -inf
    if listed < local:
        order = order[: int(np.argmax(order % listed == listed - 1)) + 1]
        bound = float(values.flat[order[-1]])
    top_order = np.argsort(-top_values, axis=None, kind="stable")[:TOP_LOGPROBS]
    total, error = _total(values, floats[:, -2], missing=local - listed, temperature=temperature)
    return Candidates(
        ids=ids.reshape(-1)[order],
        values=values.reshape(-1)[order],
        raw=raw.reshape(-1)[order],
        bound=bound,
        total=total,
        error=error,
        log_normaliser=_log_sum(top_values[:, 0], floats[:, -1]),
        top_ids=top_ids.reshape(-1)[top_order],
        top_values=top_values.reshape(-1)[top_order],
    )


def _listed(count: int, local: int) -> int:
    """How many of the largest logits a device lists."""
    return min(max(count, TOP_LOGPROBS), local)


def _adjusted(
    logits: Float[Array, "batch vocab"],
    places: Int[Array, "batch adjusted"],
    added: Float[Array, "batch adjusted"],
) -> Float[Array, "batch vocab"]:
    batch, vocab = logits.shape
    is_here = (places >= 0) & (places < vocab)  # a negative place would count from the end
    rows = jnp.arange(batch)[:, None]
    return logits.at[rows, jnp.where(is_here, places, vocab)].add(added, mode="drop")


def _top(
    x: Float[Array, "batch vocab"], count: int
) -> tuple[Float[Array, "batch count"], Int[Array, "batch count"]]:
    """The largest values of each row and their places; ties by place, and -0 is 0.

    Of a long row, only `count` groups are searched, those with the largest maxima, ties by place. A
    value of another group is not among the `count` largest: the maximum of each of these groups
    precedes it, being larger, or equal and in an earlier group.
    """
    x = jnp.where(x == 0, 0.0, x)  # top_k puts 0 before -0
    batch, vocab = x.shape
    if vocab % _GROUP or vocab // _GROUP < 2 * count:
        return _top_k(x, count)
    groups = x.reshape(batch, -1, _GROUP)
    _, found = _top_k(jnp.max(groups, axis=-1), count)
    found = jnp.sort(found, axis=-1)  # so that ties are by place
    searched = jnp.take_along_axis(groups, found[:, :, None], axis=1).reshape(batch, -1)
    values, places = _top_k(searched, count)
    starts = jnp.take_along_axis(found, places // _GROUP, axis=1) * _GROUP
    return values, starts + places % _GROUP


def _top_k(
    x: Float[Array, "batch values"], count: int
) -> tuple[Float[Array, "batch count"], Int[Array, "batch count"]]:
    """The barriers keep XLA on CPUs from sorting all, which it does if only some are used.

    There are two because XLA's pass over top_k ends the process at a barrier for its pair.
    """
    values, places = jax.lax.top_k(x, count)
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(places)


def _weights_behind(
    adjusted: Float[Array, "batch vocab"],
    values: Float[Array, "batch count"],
    places: Int[Array, "batch count"],
    temperatures: Float[Array, " batch"],
) -> Float[Array, "batch vocab"]:
    """`exp((value - largest) / temperature)` of tokens behind the listed ones; 0 of those."""
    last, last_place = values[:, -1:], places[:, -1:]
    place = jnp.arange(adjusted.shape[1])[None]
    is_behind = (adjusted < last) | ((adjusted == last) & (place > last_place))
    below = adjusted - jnp.maximum(values[:, :1], _LOWEST)  # -inf also where all values are
    return jnp.where(is_behind, jnp.exp(below / jnp.clip(temperatures, *_TEMPERATURES)[:, None]), 0)


def _sum(terms: Float[Array, "batch terms"]) -> Float[Array, "batch 1"]:
    """Sums of numbers that are not negative, a few at a time, which bounds the rounding error.

    The barrier keeps the compiler from making one long sum of it.
    """
    while terms.shape[1] > 1:
        padded = jnp.pad(terms, ((0, 0), (0, -terms.shape[1] % _ADDED)))
        sums = jnp.sum(padded.reshape(len(terms), _ADDED, -1), axis=1)
        terms = jax.lax.optimization_barrier(sums)
    return terms


def _bits(x: Array) -> Int[Array, "batch columns"]:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _total(
    values: NDArray[np.float32], behind: NDArray[np.float32], *, missing: int, temperature: float
) -> tuple[float, float]:
    """The sum of a row's weights, and a bound of its relative error.

    Args:
        values: Listed by each device, `(devices, listed)`.
        behind: Each device's sum of the weights of its other tokens, relative to its largest.
        missing: How many others each device has.
        temperature: Of the row.
    """
    if temperature == 0:
        return 1.0, 0.0
    below = values.astype(np.float64) - max(float(values[:, 0].max()), _LOWEST)
    with np.errstate(over="ignore"):  # a temperature next to 0
        weights: NDArray[Any] = np.exp(below / temperature)
    listed = float(weights.sum())
    low, high = _TEMPERATURES
    if low <= temperature <= high:
        rest = float(weights[:, 0] @ behind.astype(np.float64))
        error = _ERROR * rest
    else:  # between nothing and as much as the last one listed each
        rest = error = float(weights[:, -1].sum()) * missing / 2
    total = max(listed + rest, 1.0)
    return total, error / total + _ROUNDING


def _log_sum(tops: NDArray[np.float32], sums: NDArray[np.float32]) -> float:
    """`log(sum(exp(logit)))` from the devices' largest logits and their sums relative to these."""
    top = float(tops.max())
    return top + log(float(np.exp(tops.astype(np.float64) - top) @ sums.astype(np.float64)))
