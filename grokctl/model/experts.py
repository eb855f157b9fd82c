"""Mixture of experts: the choice of experts for each token, and the forms to run them in.

Every function here runs inside `jax.shard_map`, as those of `model/forward` do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grokctl.model import cpu_kernel
from grokctl.model.axes import EXPERT_AXIS, MODEL_AXIS, sum_over
from grokctl.model.bucketing import (
    MOST_IN_KERNEL,
    capacities,
    rows_in_kernel,
    rows_of_a_run,
)
from grokctl.model.config import GrokConfig
from grokctl.model.matmul import einsum, project
from grokctl.model.parameters import Experts, Layer
from grokctl.model.step_spec import StepShape

Routed = tuple[Float[Array, "tokens selected"], Int[Array, "tokens selected"]]
"""The probabilities of the experts that each token chose, and their numbers."""


@jax.named_scope("mixture_of_experts")
def mixture_of_experts(
    layer: Layer,
    x: Float[Array, "batch time embed"],
    count: Int[Array, ""],
    *,
    routed: Routed | None = None,
    shape: StepShape,
) -> tuple[Float[Array, "batch time embed"], Int[Array, ""]]:
    """Each token's sum over the experts that it chose: `y = sum_e gate_e(x) * expert_e(x)`.

    An expert that no token chose is not read, and padding goes through no expert.

    Args:
        layer: This device's part.
        x: Tokens.
        count: How many of them are no padding; padding comes last.
        routed: What `route` returns, if it is known.
        shape: Static facts.

    Returns:
        `y`, and how many of this device's experts were read.
    """
    experts, rows = layer.experts, x.reshape(-1, x.shape[-1])
    assert experts is not None  # else they are streamed: see `add_expert`
    here, read = routed_here(
        layer.router, rows, count, routed=routed, num_experts=experts.count, shape=shape
    )
    if has_few_rows(experts, len(rows), shape=shape):
        mixed = _in_one_kernel(experts, rows, *here, shape=shape)
        # counted before the sum over devices: behind it, the sum would wait on another stream
        mixed, read = jax.lax.optimization_barrier((mixed, read))
        return sum_over(mixed, EXPERT_AXIS, MODEL_AXIS).reshape(x.shape), read
    zeros = jnp.zeros(rows.shape, jnp.float32)
    mixed = _added(experts, rows, here, zeros, shape=shape)
    return sum_over(mixed, EXPERT_AXIS, MODEL_AXIS).reshape(x.shape), read


def routed_here(
    router: Float[Array, "embed experts"],
    rows: Float[Array, "tokens embed"],
    count: Int[Array, ""],
    *,
    routed: Routed | None = None,
    num_experts: int,
    shape: StepShape,
) -> tuple[Routed, Int[Array, ""]]:
    """Choose experts for each token, as numbers among this device's.

    Args:
        router: The layer's.
        rows: Tokens.
        count: How many of them are no padding; padding comes last.
        routed: What `route` returns, if it is known.
        num_experts: Experts of this device.
        shape: Static facts.

    Returns:
        The chosen experts' probabilities; their numbers, `num_experts` for those of other devices
        and for padding; and how many of this device's experts are read.
    """
    gates, chosen = routed or route(router, rows, config=shape.config)
    local = chosen
    if len(rows) > 1 or shape.mesh.expert > 1:  # one token alone is no padding
        local = _on_this_device(chosen, count, num_experts=num_experts)
    return (gates, local), _experts_read(local, num_experts, shape=shape)


@jax.named_scope("add_expert")
def add_expert(
    expert: Experts,
    number: Int[Array, ""],
    rows: Float[Array, "tokens embed"],
    routed: Routed,
    total: Float[Array, "tokens embed"],
    *,
    shape: StepShape,
) -> Float[Array, "tokens embed"]:
    """Add one expert of a layer to the sums of the tokens that chose it.

    From zeros on, expert after expert in any order, that is what `mixture_of_experts` computes, bit
    for bit on a CPU: a token adds up two products, and `a + b = b + a`.

    Args:
        expert: The expert, a stack of one.
        number: Its number in the layer.
        rows: As in `mixture_of_experts`, with an axis for all tokens.
        routed: Of `routed_here`.
        total: The sums until now.
        shape: Static facts.
    """
    gates, local = routed
    of_this = jnp.where(local == number, 0, 1)
    return _added(expert, rows, (gates, of_this), total, shape=shape)


def _added(
    experts: Experts,
    rows: Float[Array, "tokens embed"],
    routed: Routed,
    total: Float[Array, "tokens embed"],
    *,
    shape: StepShape,
) -> Float[Array, "tokens embed"]:
    """Sums of tokens, with those of this device's experts that each of them chose."""
    run = rows_of_a_run(
        len(rows),
        config=shape.config,
        platform=shape.platform,
        operand=shape.operand.itemsize,
        skips_padding=shape.has_native_kernel,
    )
    if run == 1:
        return _token_by_token(experts, rows, routed, total, shape=shape)
    many = _in_runs if shape.platform == "cpu" else _expert_after_expert
    return many(experts, rows, routed, total, run=run, shape=shape)


def _experts_read(
    local: Int[Array, "tokens selected"], num_experts: int, *, shape: StepShape
) -> Int[Array, ""]:
    """How many of this device's experts are read. One token alone, which is no padding, has all."""
    if local.shape[0] == 1 and shape.mesh.expert == 1:
        return jnp.asarray(local.size, jnp.int32)
    return jnp.count_nonzero(jnp.any(_is_expert(local, num_experts), axis=0))


def route(
    router: Float[Array, "embed experts"], rows: Float[Array, "tokens embed"], *, config: GrokConfig
) -> tuple[Float[Array, "tokens selected"], Int[Array, "tokens selected"]]:
    """Choose experts for each token: `top_k(softmax(x @ router))`, *not* renormalised.

    Returns:
        The chosen experts' probabilities in float32, and their numbers.
    """
    logits = einsum("te,ex->tx", rows, router, dtype=jnp.dtype(jnp.float32))
    return jax.lax.top_k(jax.nn.softmax(logits, axis=-1), config.num_selected_experts)


def expert_block(
    experts: Experts,
    expert: Int[Array, ""],
    x: Float[Array, "tokens embed"],
    count: Int[Array, ""] | None = None,
    *,
    shape: StepShape,
) -> Float[Array, "tokens embed"]:
    """One expert: `(gelu(x @ gate) * (x @ up)) @ down`.

    Of its columns, this device computes its own: a partial sum in float32. Of tokens after the
    first `count`, if that is given, the output does not matter.
    """
    if shape.has_native_kernel:
        real = len(x) if count is None else count
        return cpu_kernel.expert_block(x, experts, expert, real, compute=shape.compute)
    gate = project(x, experts.gate, shape=shape, expert=expert)
    up = project(x, experts.up, shape=shape, expert=expert)
    hidden = jax.nn.gelu(gate, approximate=True) * up
    return project(hidden, experts.down, shape=shape, expert=expert)


def _on_this_device(
    chosen: Int[Array, "tokens selected"], count: Int[Array, ""], *, num_experts: int
) -> Int[Array, "tokens selected"]:
    """Numbers of chosen experts among this device's; `num_experts` for others and for padding."""
    local = chosen - jax.lax.axis_index(EXPERT_AXIS) * num_experts
    is_here = (local >= 0) & (local < num_experts)
    is_here = is_here & (jnp.arange(chosen.shape[0]) < count)[:, None]
    return jnp.where(is_here, local, num_experts)


def has_few_rows(experts: Experts, tokens: int, *, shape: StepShape) -> bool:
    """Whether so many tokens go through their experts in the kernels for GPUs."""
    if not shape.has_kernel or tokens > MOST_IN_KERNEL:
        return False
    from grokctl.model import kernels  # noqa: PLC0415 (as in the engine)

    return kernels.suits(1, experts.gate.weight, experts.up.weight, experts.down.weight)


def _in_one_kernel(
    experts: Experts,
    rows: Float[Array, "tokens embed"],
    gates: Float[Array, "tokens selected"],
    local: Int[Array, "tokens selected"],
    *,
    shape: StepShape,
) -> Float[Array, "tokens embed"]:
    """Run all tokens through all their experts with one kernel for `gate` and `up`, one for `down`.

    Tokens of an expert go through it in runs, of which there are as many as there may have to be:
    the host need not know how many are needed. Those left over have no expert, and read nothing.
    """
    from grokctl.model import kernels  # noqa: PLC0415 (as in the engine)

    tokens, selected = gates.shape
    most = kernels.most_rows(experts.gate.weight.dtype)
    run = rows_in_kernel(tokens, config=shape.config, most=most)
    numbers, places = local.reshape(-1), None
    if run > 1:
        numbers, places = _runs(numbers, experts.count, run=run)
        of_choices = jnp.arange(tokens * selected) // selected
        is_there = jnp.arange(len(numbers) * run)[:, None] == places[None]
        rows = rows[jnp.sum(jnp.where(is_there, of_choices[None], 0), axis=1)]
    multiply = partial(
        kernels.chosen_products,
        experts=numbers,
        run=run,
        may_lack=tokens > 1 or shape.mesh.expert > 1,
        form=shape.kernel_form,
    )
    gate, up = multiply(rows, (experts.gate, experts.up))
    (down,) = multiply(jax.nn.gelu(gate, approximate=True) * up, (experts.down,))
    of_choices = down if places is None else down[jnp.minimum(places, len(down) - 1)]
    is_here = local < experts.count
    weighted = gates[..., None] * of_choices.reshape(tokens, selected, -1)
    return jnp.sum(jnp.where(is_here[..., None], weighted, 0.0), axis=1)


def _runs(
    numbers: Int[Array, " choices"], num_experts: int, *, run: int
) -> tuple[Int[Array, " runs"], Int[Array, " choices"]]:
    """Runs of `run` rows, none of them of two experts, in which every choice has a place.

    Args:
        numbers: Expert of each choice; `num_experts` for those that are not here.
        num_experts: Experts of this device.
        run: Rows of a run.

    Returns:
        Expert of each run, `num_experts` for those that are not needed, and the row of each choice,
        behind all of them for those that are not here.
    """
    is_of = _is_expert(numbers, num_experts)
    counts = jnp.sum(is_of, axis=0)
    ends = jnp.cumsum(-(-counts // run))
    most = min(len(numbers), (len(numbers) + num_experts * (run - 1)) // run)
    expert_of_run = jnp.sum(ends[None] <= jnp.arange(most)[:, None], axis=1)
    before = jnp.cumsum(is_of, axis=0) - 1  # choices of the same expert
    first = (ends - -(-counts // run)) * run
    places = jnp.sum(jnp.where(is_of, first[None] + before, 0), axis=1)
    return expert_of_run, jnp.where(numbers < num_experts, places, most * run)


def _token_by_token(
    experts: Experts,
    rows: Float[Array, "tokens embed"],
    routed: Routed,
    total: Float[Array, "tokens embed"],
    *,
    shape: StepShape,
) -> Float[Array, "tokens embed"]:
    """Run each token alone through each of its experts on this device.

    On an accelerator with all experts, only padding could be skipped, and is not: the condition
    would wait for the host.
    """
    (gates, local), selected = routed, routed[0].shape[1]
    may_skip = shape.platform == "cpu" or shape.mesh.expert > 1

    def add_product(index: Array, total: Array) -> Array:
        token, expert = index // selected, local.reshape(-1)[index]

        def product() -> Array:
            row, number = jax.lax.dynamic_slice_in_dim(rows, token, 1), expert % experts.count
            return gates.reshape(-1)[index] * expert_block(experts, number, row, shape=shape)

        output = _if(expert < experts.count, product, like=rows[:1]) if may_skip else product()
        return jax.lax.dynamic_update_slice_in_dim(
            total, jax.lax.dynamic_slice_in_dim(total, token, 1) + output, token, 0
        )

    return jnp.asarray(jax.lax.fori_loop(0, local.size, add_product, total))


@dataclass(frozen=True, slots=True)
class _Choices:
    """Choices, each a token with one of its experts, sorted by expert."""

    order: Int[Array, " choices"]
    counts: Int[Array, " experts"]
    ends: Int[Array, " experts"]
    """Where the choices of each expert end."""

    @classmethod
    def of(cls, local: Int[Array, "tokens selected"], num_experts: int) -> "_Choices":
        """Those of this device's experts; others come last."""
        order = jnp.argsort(local.reshape(-1))  # stable: of an expert in the order of tokens
        counts = jnp.sum(_is_expert(local, num_experts), axis=0)
        return cls(order, counts, jnp.cumsum(counts))

    def part(
        self,
        expert: Array,
        first: Array | int,
        size: int,
        *,
        gates: Float[Array, "tokens selected"],
    ) -> tuple[Int[Array, " size"], Float[Array, " size"], Int[Array, ""]]:
        """Tokens of an expert from its `first` one on, their gates, and how many are no padding.

        Padding repeats the last one, with a gate of 0.
        """
        end = self.ends[expert]
        places = end - self.counts[expert] + first + jnp.arange(size)
        picked = self.order[jnp.minimum(places, end - 1)]
        gate = jnp.where(places < end, gates.reshape(-1)[picked], 0.0)
        return picked // gates.shape[1], gate, jnp.minimum(size, end - places[0])


def _in_runs(
    experts: Experts,
    rows: Float[Array, "tokens embed"],
    routed: Routed,
    total: Float[Array, "tokens embed"],
    *,
    run: int,
    shape: StepShape,
) -> Float[Array, "tokens embed"]:
    """Run the tokens of each expert through it, `run` tokens at a time.

    The last run of an expert is filled up with choices whose gate is 0.
    """
    gates, local = routed
    choices = _Choices.of(local, experts.count)
    runs = -(-choices.counts // run)
    run_ends = jnp.cumsum(runs)

    def add_run(index: Array, total: Array) -> Array:
        expert = jnp.sum(run_ends <= index)
        first = (index - (run_ends[expert] - runs[expert])) * run
        tokens, gate, count = choices.part(expert, first, run, gates=gates)
        output = expert_block(experts, expert, rows[tokens], count, shape=shape)
        return total.at[tokens].add(gate[:, None] * output)

    return jnp.asarray(jax.lax.fori_loop(0, run_ends[-1], add_run, total))


def _expert_after_expert(
    experts: Experts,
    rows: Float[Array, "tokens embed"],
    routed: Routed,
    total: Float[Array, "tokens embed"],
    *,
    run: int,
    shape: StepShape,
) -> Float[Array, "tokens embed"]:
    """Run the tokens of each expert through it together, filled up to one of a few numbers.

    The host of a GPU is asked once for every expert which of the programs of these numbers it has
    to start, and once more whether an expert has more tokens than the largest, `run`.
    """
    gates, local = routed
    choices, sizes = _Choices.of(local, experts.count), capacities(len(rows), config=shape.config)
    counts = choices.counts

    def added(
        total: Array, *, expert: Array, first: Array | int, size: int
    ) -> Float[Array, "tokens embed"]:
        """With `size` tokens of an expert, from one of its tokens on."""
        tokens, gate, count = choices.part(expert, first, size, gates=gates)
        output = expert_block(experts, expert, rows[tokens], count, shape=shape)
        return total.at[tokens].add(gate[:, None] * output)

    def add(expert: Array, total: Array) -> Array:
        forms = [partial(added, expert=expert, first=0, size=size) for size in sizes]
        form = jnp.sum(counts[expert] > jnp.array((0, *sizes[:-1])))
        return jnp.asarray(jax.lax.switch(form, (lambda total: total, *forms), total))

    def add_rest(total: Array) -> Array:
        parts = -(-len(rows) // run) - 1

        def add(index: Array, total: Array) -> Array:
            expert, first = index // parts, (index % parts + 1) * run
            form = partial(added, expert=expert, first=first, size=run)
            return jnp.asarray(jax.lax.cond(counts[expert] > first, form, lambda old: old, total))

        return jnp.asarray(jax.lax.fori_loop(0, experts.count * parts, add, total))

    total = jax.lax.fori_loop(0, experts.count, add, total)
    if run == len(rows):
        return jnp.asarray(total)
    return jnp.asarray(jax.lax.cond(jnp.any(counts > run), add_rest, lambda old: old, total))


def _is_expert(local: Int[Array, "*any"], num_experts: int) -> Bool[Array, "choices experts"]:
    """Whether each choice, a token with one of its experts, is of each expert."""
    expert_ids = jnp.arange(num_experts)
    return local.reshape(-1, 1) == expert_ids[None]


def _if(condition: Array, then: Callable[[], Array], *, like: Array) -> Array:
    """`then()`; without computing anything, zeros if the condition is false."""
    result: Array = jax.lax.cond(condition, then, lambda: jnp.zeros(like.shape, jnp.float32))
    return result
