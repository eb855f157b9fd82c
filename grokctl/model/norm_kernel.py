"""What stands between two blocks of a layer on a GPU, for few tokens: one kernel.

As XLA's operations, norms, residual connections and the choice of experts start a dozen kernels a
layer, and each takes longer to start than to run.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from grokctl.model.config import GrokConfig
from grokctl.model.step_spec import KernelForm, StepShape
from grokctl.model.stored_codes import triton

_WARPS: Final = 16
_ROWS: Final = 2048
"""Rows of the router that a program multiplies at a time."""
_NEVER: Final = -1e30
"""Logit of an expert that there is not."""


def normed(
    x: Float[Array, "*batch embed"],
    scale: Float[Array, " embed"],
    *,
    shape: StepShape,
) -> Float[Array, "*batch embed"]:
    """`rms_norm` of `model/forward`."""
    (found,) = _run(x, before=scale, shape=shape)
    return found


def added(
    hidden: Float[Array, "*batch embed"],
    mixed: Float[Array, "*batch embed"],
    after: Float[Array, " embed"],
    *,
    shape: StepShape,
) -> Float[Array, "*batch embed"]:
    """What a block made, normed, and added to what it was made from."""
    (found,) = _run(hidden, mixed=mixed, after=after, shape=shape)
    return found


def added_and_normed(
    hidden: Float[Array, "*batch embed"],
    mixed: Float[Array, "*batch embed"],
    scales: tuple[Float[Array, " embed"], Float[Array, " embed"]],
    *,
    shape: StepShape,
) -> tuple[Float[Array, "*batch embed"], Float[Array, "*batch embed"]]:
    """`added`, then normed, with the scales of the norms after this block and before the next."""
    after, before = scales
    total, norm = _run(hidden, mixed=mixed, after=after, before=before, shape=shape)
    return total, norm


def added_and_routed(
    hidden: Float[Array, "*batch embed"],
    mixed: Float[Array, "*batch embed"],
    scales: tuple[Float[Array, " embed"], Float[Array, " embed"]],
    router: Float[Array, "embed experts"],
    *,
    shape: StepShape,
) -> tuple[
    Float[Array, "*batch embed"],
    Float[Array, "*batch embed"],
    tuple[Float[Array, "tokens selected"], Int[Array, "tokens selected"]],
]:
    """`added`, then normed, then `route` of `model/experts`.

    Args:
        hidden: What the block was made from.
        mixed: What it made.
        scales: Of the norms after this block and before the next.
        router: As in `route`.
        shape: Number of experts to choose, what norms add to the mean, and the form of the kernel.

    Returns:
        The sum, its norm, and what `route` returns.
    """
    after, before = scales
    total, norm, gates, chosen = _run(
        hidden, mixed=mixed, after=after, before=before, router=router, shape=shape
    )
    return total, norm, (gates, chosen)


def _run(
    hidden: Array,
    *,
    mixed: Array | None = None,
    after: Array | None = None,
    before: Array | None = None,
    router: Array | None = None,
    shape: StepShape,
) -> list[Array]:
    embed = hidden.shape[-1]
    rows = hidden.reshape(-1, embed)
    given = {"hidden": rows}
    if mixed is not None and after is not None:
        given |= {"mixed": mixed.reshape(-1, embed), "after": after}
    if before is not None:
        given["before"] = before
    wide = jax.ShapeDtypeStruct(rows.shape, jnp.float32)
    made = {"sum": wide} if "mixed" in given else {}
    made |= {"norm": wide} if "before" in given else {}
    if router is not None:
        given["router"] = router
        choices = (len(rows) * shape.config.num_selected_experts,)
        made |= {
            "gates": jax.ShapeDtypeStruct(choices, jnp.float32),
            "chosen": jax.ShapeDtypeStruct(choices, jnp.int32),
        }
    found = pl.pallas_call(
        partial(_kernel, names=(*given, *made), embed=embed, config=shape.config),
        grid=(len(rows),),
        out_shape=list(made.values()),
        compiler_params=triton.CompilerParams(num_warps=_WARPS),
        interpret=shape.kernel_form is KernelForm.INTERPRETED,
        name="_".join(made),
    )(*given.values())
    return [
        part.reshape(hidden.shape if name in {"sum", "norm"} else (len(rows), -1))
        for name, part in zip(made, found, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Vector:
    """Consecutive numbers of a token's vectors and of the scales."""

    refs: dict[str, Any]
    token: Array
    columns: Any
    inside: Array

    def load(self, name: str) -> Array:
        is_scale = name in {"after", "before"}
        place = self.columns if is_scale else (self.token, self.columns)
        loaded: Array = triton.load(self.refs[name].at[place], mask=self.inside, other=0.0)
        return loaded

    def store(self, name: str, values: Array) -> None:
        triton.store(self.refs[name].at[self.token, self.columns], values, mask=self.inside)

    def total(self, rate: Array) -> Array:
        """The vector, or its sum with what the block made."""
        hidden = self.load("hidden")
        if "mixed" not in self.refs:
            return hidden
        return hidden + self.load("mixed") * rate * self.load("after")


def _kernel(*refs: Any, names: tuple[str, ...], embed: int, config: GrokConfig) -> None:
    """One program: one token."""
    by_name = dict(zip(names, refs, strict=True))
    token, width = pl.program_id(0), pl.next_power_of_2(embed)

    def rate_of(values: Array) -> Array:
        return jax.lax.rsqrt(jnp.sum(values * values) / embed + config.rms_norm_eps)

    origin = token * 0  # masks hide what is behind an array, of which JAX must not know too soon
    inside = jnp.arange(width) < embed
    whole = _Vector(by_name, token, pl.ds(origin, width), inside)
    mixed_rate = rate_of(whole.load("mixed")) if "mixed" in by_name else jnp.float32(0)
    total = whole.total(mixed_rate)
    if "mixed" in by_name:
        whole.store("sum", total)
    if "before" not in by_name:
        return
    rate = rate_of(total)
    whole.store("norm", total * rate * whole.load("before"))
    if "router" not in by_name:
        return
    router, experts = by_name["router"], pl.next_power_of_2(config.num_experts)
    is_expert, rows = jnp.arange(experts) < config.num_experts, min(width, _ROWS)
    logits = jnp.where(is_expert, 0.0, _NEVER)
    for start in range(0, embed, rows):
        first = origin + start
        in_rows = first + jnp.arange(rows) < embed
        part = _Vector(by_name, token, pl.ds(first, rows), in_rows)
        norm = part.total(mixed_rate) * rate * part.load("before")
        mask = in_rows[:, None] & is_expert[None]
        weights = triton.load(
            router.at[pl.ds(first, rows), pl.ds(origin, experts)], mask=mask, other=0.0
        )
        logits += jnp.sum(weights * norm[:, None], axis=0)
    _choose(logits, by_name, token, selected=config.num_selected_experts)


def _choose(logits: Array, refs: dict[str, Any], token: Array, *, selected: int) -> None:
    """The largest of the softmax, in their order; of equal ones the first."""
    numbers = jnp.arange(len(logits))
    weights = jnp.exp(logits - jnp.max(logits))
    gates = weights / jnp.sum(weights)
    for place in range(selected):
        largest = jnp.max(gates)
        chosen = jnp.min(jnp.where(gates == largest, numbers, len(logits)))
        triton.store(refs["gates"].at[token * selected + place], largest)
        triton.store(refs["chosen"].at[token * selected + place], chosen.astype(jnp.int32))
        gates = jnp.where(numbers == chosen, -1.0, gates)
