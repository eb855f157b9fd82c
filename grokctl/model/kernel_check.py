"""Whether the kernels for GPUs give the right numbers on a device, and in which form."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from grokctl.model import kernels
from grokctl.model.attention_kernel import attend_with_one
from grokctl.model.cache import Entries, LayerCache, Positions
from grokctl.model.cache_kernel import rotated_and_kept
from grokctl.model.config import GROK_1
from grokctl.model.kernels import added_up, chosen_products, few_rows
from grokctl.model.norm_kernel import added, added_and_routed, normed
from grokctl.model.parameters import Matrix
from grokctl.model.placement import MeshShape
from grokctl.model.step_spec import KernelForm, StepShape

_BOUND: Final = 3e-5
"""Of a difference to sums of float64, in shares of the largest of them. Exponentials, tangents and
quotients of a GPU that are two units off in the last place may reach 6e-6 in attention; the least
mistake in a kernel is a hundred times as much."""
_EXPERTS: Final = np.array([2, 0, 3, 1], np.int32)
"""Numbers of experts, of which there are three."""
_WIDTH: Final = 2500
"""Of vectors between blocks: more than a program multiplies by the router at a time."""


def working_form(device: jax.Device) -> KernelForm | None:
    """The first form of the kernels that compiles for a device and is right there; or None."""
    forms = [KernelForm.PTX, KernelForm.PLAIN]
    if "rocm" in device.client.platform_version.lower():
        forms.remove(KernelForm.PTX)  # a compiler for AMD's GPUs may end the process over it
    return next((form for form in forms if works(device, form)), None)


def works(device: jax.Device, form: KernelForm) -> bool:
    """Whether the kernels compile for a device and give the right numbers there.

    Experts, rows, outputs, scales and tokens all differ, and some shapes are odd. Weights and their
    scales are stored as an engine has them.
    """
    given, expected = _case()
    try:
        with jax.default_device(device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
            return all(
                _is_near(jax.jit(partial(run, form=form))(given), right)
                for run, right in zip(_RUNS, expected, strict=True)
            )
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, Warning):
        return False  # triton may be missing, or about to be


def _is_near(found: Array, expected: NDArray[np.float64]) -> bool:
    difference = np.abs(np.asarray(found, np.float64) - expected)
    return bool(np.all(difference <= _BOUND * np.abs(expected).max()))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Given:
    """Arguments of the kernels."""

    even: Matrix
    odd: Matrix
    int4: Matrix
    """With so many groups that a program has two, of three rows each."""
    bits: Matrix
    """bfloat16 without scales."""
    narrow: Matrix
    wide: Matrix
    x: Array
    query: Array
    caches: tuple[LayerCache, ...]
    positions: Positions
    sums: tuple[Array, ...]
    """Of queries, keys and values, in three parts."""
    kept: LayerCache
    after: Positions
    """Of tokens to keep, the last of which is padding."""
    vectors: Array
    """What a block was made from, and what it made."""
    norms: Array
    router: Array


def _operands(given: _Given, name: str, rows: int) -> tuple[Array, Matrix]:
    """Rows of activations as long as the inputs of a weight, and the weight."""
    matrix: Matrix = getattr(given, name)
    codes = 2 if matrix.weight.dtype == jnp.uint8 else 1
    return given.x[:rows, : codes * matrix.weight.shape[-2]], matrix


def _product(given: _Given, *, name: str, tokens: int, form: KernelForm) -> Array:
    x, matrix = _operands(given, name, tokens)
    return few_rows(x, matrix.weight, matrix.scales, jnp.int32(_EXPERTS[0]), form=form)


def _together(given: _Given, *, form: KernelForm) -> Array:
    parts = kernels.sums(given.x[:1], (given.narrow, given.wide), form=form)
    return jnp.concatenate([added_up(part) for part in parts], axis=1)


def _chosen(given: _Given, *, name: str, rows: int, run: int, form: KernelForm) -> Array:
    x, matrix = _operands(given, name, rows)
    (found,) = chosen_products(
        x, (matrix,), jnp.asarray(_EXPERTS), run=run, may_lack=True, form=form
    )
    return found


def _attended(given: _Given, *, cache: int, form: KernelForm) -> Array:
    return attend_with_one(
        given.query, given.caches[cache], given.positions, config=GROK_1, form=form
    )


def _kept(given: _Given, *, form: KernelForm) -> Array:
    config = replace(GROK_1, key_size=given.kept.key.values.shape[-1])
    query, cache = rotated_and_kept(given.sums, given.kept, given.after, config=config, form=form)
    parts = [query, cache.key.values, cache.value.values]
    return jnp.concatenate([part.reshape(-1) for part in parts])


def _routed(given: _Given, *, form: KernelForm) -> Array:
    shape = StepShape(
        config=replace(GROK_1, emb_size=len(given.router)),
        mesh=MeshShape(1, 1),
        platform="gpu",
        compute=jnp.dtype(jnp.float32),
        kernel_form=form,
    )
    hidden, mixed = given.vectors
    after, before = given.norms
    total, norm, (gates, chosen) = added_and_routed(
        hidden, mixed, (after, before), given.router, shape=shape
    )
    again = normed(added(hidden, mixed, after, shape=shape), before, shape=shape)
    return jnp.concatenate([total, norm, again, gates, chosen.astype(jnp.float32)], axis=1)


_RUNS: Final[tuple[Callable[..., Array], ...]] = (
    partial(_product, name="odd", tokens=1),
    partial(_product, name="odd", tokens=8),
    partial(_product, name="even", tokens=8),
    partial(_product, name="int4", tokens=4),
    partial(_product, name="bits", tokens=2),
    _together,
    _kept,
    partial(_chosen, name="even", rows=2, run=1),
    partial(_chosen, name="even", rows=8, run=2),
    partial(_chosen, name="int4", rows=2, run=1),
    _routed,
    partial(_attended, cache=0),
    partial(_attended, cache=1),
)


def _case() -> tuple[_Given, list[NDArray[np.float64]]]:
    """Arguments, and what each of `_RUNS` is to make of them."""
    rng = np.random.default_rng(0)
    even, even_values = _matrix(rng, (3, 1024, 256), groups=2)
    odd, odd_values = _matrix(rng, (3, 86, 7), groups=2)
    int4, int4_values = _matrix(rng, (3, 192, 2304), groups=64, is_int4=True)
    bits, bits_values = _bits(rng, (3, 90, 70))
    narrow, narrow_values = _matrix(rng, (1024, 128), groups=1)
    wide, wide_values = _matrix(rng, (1024, 300), groups=1)
    x = rng.standard_normal((8, 1024)).astype(np.float32)
    query = 40 * rng.standard_normal((2, 1, 6, 32)).astype(np.float32)
    caches, attended = zip(
        *[_attention(rng, query, is_int8=each) for each in (False, True)], strict=True
    )
    sums, kept, rotated = _keeping(rng)
    vectors = rng.standard_normal((2, 3, _WIDTH)).astype(np.float32)
    vectors[1, 2] *= 1e-3  # so little that a norm is held by what it adds to the mean
    norms = rng.uniform(0.5, 2, (2, _WIDTH)).astype(np.float32)
    router = (0.03 * rng.standard_normal((_WIDTH, GROK_1.num_experts))).astype(np.float32)
    given = _Given(
        even=even,
        odd=odd,
        int4=int4,
        bits=bits,
        narrow=narrow,
        wide=wide,
        x=jnp.asarray(x),
        query=jnp.asarray(query),
        caches=caches,
        positions=Positions(jnp.asarray(_SLOTS), jnp.asarray(_LAST), jnp.int32(2)),
        sums=sums,
        kept=kept,
        after=Positions(jnp.asarray(_NEXT_SLOTS), jnp.asarray(_NEXT), jnp.int32(2)),
        vectors=jnp.asarray(vectors),
        norms=jnp.asarray(norms),
        router=jnp.asarray(router),
    )
    stack, int4_stack = (
        np.concatenate([values, np.zeros((1, *values.shape[1:]))])[_EXPERTS]
        for values in (even_values, int4_values)
    )
    first = _EXPERTS[0]
    return given, [
        x[:1, :86] @ odd_values[first],
        x[:, :86] @ odd_values[first],
        x @ even_values[first],
        x[:4, :384] @ int4_values[first],
        x[:2, :90] @ bits_values[first],
        x[:1] @ np.concatenate([narrow_values, wide_values], axis=1),
        rotated,
        (x[[0, 0, 1, 1], None] @ stack)[:, 0],
        (x.reshape(4, 2, -1) @ stack).reshape(8, -1),
        (x[[0, 0, 1, 1], None, :384] @ int4_stack)[:, 0],
        _choice(vectors, norms, router),
        *attended,
    ]


def _matrix(
    rng: np.random.Generator, shape: tuple[int, ...], *, groups: int, is_int4: bool = False
) -> tuple[Matrix, NDArray[np.float64]]:
    """Random codes with scales in bfloat16, and their values."""
    stored = rng.integers(0, 256, shape, dtype=np.uint8)
    scales = rng.uniform(0.5, 2, (*shape[:-2], groups, shape[-1])).astype(jnp.bfloat16)
    values = stored.view(np.int8).astype(np.float64)
    if is_int4:
        values = np.stack([stored & 15, stored >> 4], axis=-2) - 8.0
        values = values.reshape(*shape[:-2], -1, shape[-1])
    values *= np.repeat(scales.astype(np.float64), values.shape[-2] // groups, axis=-2)
    codes = stored if is_int4 else stored.view(np.int8)
    return Matrix(jnp.asarray(codes), jnp.asarray(scales.view(np.uint16))), values


def _bits(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Matrix, NDArray[np.float64]]:
    """A random weight in bfloat16 without scales, and its values."""
    values = rng.standard_normal(shape).astype(jnp.bfloat16)
    return Matrix(jnp.asarray(values.view(np.uint16)), None), values.astype(np.float64)


def _choice(
    vectors: NDArray[np.float32], norms: NDArray[np.float32], router: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Sum, norm, the same again, gates, and numbers of the chosen experts, side by side."""

    def norm(x: NDArray[np.float64], scale: NDArray[np.float32]) -> NDArray[np.float64]:
        mean = np.mean(x**2, axis=-1, keepdims=True)
        return np.asarray(x / np.sqrt(mean + GROK_1.rms_norm_eps) * scale)

    hidden, mixed = vectors.astype(np.float64)
    total = hidden + norm(mixed, norms[0])
    before = norm(total, norms[1])
    weights = np.exp(before @ router)
    chosen = np.argsort(-weights, axis=1)[:, : GROK_1.num_selected_experts]
    gates = np.take_along_axis(weights, chosen, axis=1) / weights.sum(axis=1, keepdims=True)
    return np.concatenate([total, before, before, gates, chosen], axis=1)


_SLOTS: Final = np.array([2, 0], np.int32)
_LAST: Final = np.array([150, 3], np.int32)
"""Slot of each sequence, and its last position of 200."""


def _attention(
    rng: np.random.Generator, query: NDArray[np.float32], *, is_int8: bool
) -> tuple[LayerCache, NDArray[np.float64]]:
    """A random cache, and attention to it: of six query heads, three to each key head."""
    stored = rng.standard_normal((2, 3, 2, 200, 32)).astype(jnp.bfloat16)
    scales = rng.uniform(0.01, 0.1, stored.shape[:-1]).astype(np.float32)
    if is_int8:
        stored = (40 * stored.astype(np.float32)).astype(np.int8)
    entries = [
        Entries(jnp.asarray(part[None]), jnp.asarray(scale[None]) if is_int8 else None)
        for part, scale in zip(stored, scales, strict=True)
    ]
    values = stored.astype(np.float64) * (scales[..., None] if is_int8 else 1)
    found = np.zeros(query.shape)
    for batch, (slot, last) in enumerate(zip(_SLOTS, _LAST, strict=True)):
        for head in range(query.shape[2]):
            keys, weighed = values[:, slot, head // 3, : last + 1]
            logits = keys @ query[batch, 0, head] * GROK_1.attn_output_multiplier
            weights = np.exp(GROK_1.attn_logit_cap * np.tanh(logits / GROK_1.attn_logit_cap))
            found[batch, 0, head] = weights @ weighed / weights.sum()
    return LayerCache(*entries), found


_NEXT_SLOTS: Final = np.array([2, 0, 1], np.int32)
_NEXT: Final = np.array([9, 3, 5], np.int32)
"""Slot of each sequence, and its next position of ten."""


def _keeping(
    rng: np.random.Generator,
) -> tuple[tuple[Array, ...], LayerCache, NDArray[np.float64]]:
    """Sums of three tokens, a cache, and the queries, keys and values that are to come of them."""
    batch, heads, head_dim = len(_NEXT), (6, 2, 2), 32
    sums = [rng.standard_normal((3, batch, each * head_dim)).astype(np.float32) for each in heads]
    held = rng.standard_normal((2, 3, 2, 10, head_dim)).astype(np.float32)
    query, key, value = (
        part.astype(np.float64).sum(axis=0).reshape(batch, each, head_dim)
        for part, each in zip(sums, heads, strict=True)
    )
    pairs = np.arange(head_dim // 2) / (head_dim // 2)
    turns = np.exp(1j * _NEXT[:, None, None] / GROK_1.rope_base**pairs)
    turned = [
        (x[..., : head_dim // 2] + 1j * x[..., head_dim // 2 :]) * turns for x in (query, key)
    ]
    query, key = (np.concatenate([x.real, x.imag], axis=-1) for x in turned)
    expected = held.astype(np.float64)
    for token in range(batch - 1):
        place = (_NEXT_SLOTS[token], slice(None), _NEXT[token])
        expected[0][place], expected[1][place] = key[token], value[token]
    kept = LayerCache(*[Entries(jnp.asarray(part[None]), None) for part in held])
    parts = tuple(jnp.asarray(part) for part in sums)
    return parts, kept, np.concatenate([query.reshape(-1), expected.reshape(-1)])
