"""Products of a few activations with stored weights on a GPU: one kernel, every byte read once.

It is Pallas for Triton, which takes all sizes, and lowers for AMD's GPUs and without a GPU;
docs/adr/0013 says what replaces it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Shaped

from grokctl.model import stored_codes
from grokctl.model.parameters import Matrix
from grokctl.model.step_spec import KernelForm
from grokctl.model.stored_codes import triton

FEW_ROWS: Final = 8
"""Tokens up to which the kernel is the fastest form; half as many of int4. With more, their sums no
longer fit into registers, and multiplying takes longer than reading."""
LARGEST: Final = 2**31
"""Elements of an array that the offsets of Triton's lowering reach."""
_WARPS: Final = 4
_STRIP: Final = 256
"""Bytes of a stored row that a program reads: two cache lines."""
_TILE: Final = 2048
"""Bytes that a program adds up at a time: 16 for each of its threads, one load."""
_AHEAD: Final = 4
"""Loads that a thread begins before it uses the first, because memory answers late."""
_FEWEST_STEPS: Final = 3
"""So many loads of each thread, of `_AHEAD` each, at least: shorter programs are not worth it."""
_PROGRAMS: Final = 1024
"""Programs that fill a GPU: eight for each of 128 multiprocessors, of which four run at a time."""


def suits(tokens: int, *weights: Shaped[Array, "*stack rows outputs"]) -> bool:
    """Whether the kernel is the fastest form on a GPU, for one weight or for several together."""
    dtype = weights[0].dtype
    return (
        triton is not None
        and tokens <= most_rows(dtype)
        and all(weight.dtype == dtype and weight.size < LARGEST for weight in weights)
    )


def most_rows(dtype: jnp.dtype) -> int:
    """Tokens up to which the kernel is the fastest form, for weights of a stored type."""
    return FEW_ROWS // 2 if dtype == jnp.uint8 else FEW_ROWS


def few_rows(
    x: Float[Array, "tokens inputs"],
    weight: Shaped[Array, "*stack rows outputs"],
    scales: Shaped[Array, "*stack groups outputs"] | None,
    expert: Int[Array, ""] | None,
    *,
    form: KernelForm = KernelForm.PTX,
) -> Float[Array, "tokens outputs"]:
    """Multiply by a stored weight, in float32.

    The kernel takes the number of the expert: nothing is cut out of the stack. Programs share out
    the inputs too, and their sums are added afterwards in an order that never changes.

    Args:
        x: Activations.
        weight: As in `Matrix`.
        scales: As in `Matrix`.
        expert: Number of the weight in the stack.
        form: How the kernel is written down.
    """
    number = jnp.zeros(1, jnp.int32) if expert is None else expert.astype(jnp.int32).reshape(1)
    (parts,) = _sums(x, [Matrix(weight, scales)], number, tokens=x.shape[0], form=form)
    return added_up(parts)


def sums(
    x: Float[Array, "tokens inputs"], matrices: Sequence[Matrix], *, form: KernelForm
) -> list[Float[Array, "_ tokens _"]]:
    """Multiply by several stored weights in one kernel, in float32, up to the last step.

    Returns:
        For each weight parts of the product, which `added_up` adds up.
    """
    return _sums(x, matrices, jnp.zeros(1, jnp.int32), tokens=x.shape[0], form=form)


def chosen_products(
    x: Float[Array, "rows inputs"],
    matrices: Sequence[Matrix],
    experts: Int[Array, " runs"],
    *,
    run: int,
    may_lack: bool,
    form: KernelForm,
) -> list[Float[Array, "runs_times_run _"]]:
    """Multiply runs of rows, each by the weights of its own expert, in one kernel, in float32.

    Args:
        x: Activations: `run` rows for each number; or fewer, and each of them for as many numbers.
        matrices: Stacks of experts' weights.
        experts: Number of an expert in the stacks, for every run.
        run: Rows of a run.
        may_lack: Whether numbers may be beyond the stacks: then products are 0, and nothing is
            read.
        form: How the kernel is written down.
    """
    found = _sums(x, matrices, experts, tokens=run, may_lack=may_lack, form=form)
    return [added_up(parts) for parts in found]


def _sums(
    x: Float[Array, "rows inputs"],
    matrices: Sequence[Matrix],
    numbers: Int[Array, " choices"],
    *,
    tokens: int,
    may_lack: bool = False,
    form: KernelForm,
) -> list[Float[Array, "splits choices_and_tokens _"]]:
    """Products of `tokens` rows for each number, in a part for each split of a weight's rows."""
    (choices,), rows = numbers.shape, matrices[0].weight.shape[-2]
    cuts = _cuts(matrices, choices)
    # of int4, the inputs of low nibbles before the inputs of high nibbles
    inputs = jnp.moveaxis(x.astype(jnp.float32).reshape(len(x), rows, -1), 2, 0).reshape(-1)
    # shape: codes_per_row rows_of_x rows, flat
    tables = [
        table.reshape(-1, table.shape[-1])
        for matrix in matrices
        for table in (matrix.weight, matrix.scales)
        if table is not None
    ]
    given = _Given(
        rows_of_x=len(x),
        tokens=tokens,
        choices=choices,
        share=choices * tokens // len(x),
        experts=matrices[0].weight.size // (rows * cuts[0].outputs),
        may_lack=may_lack,
        has_scales=matrices[0].scales is not None,
        form=form,
    )
    shapes = [(cut.splits * choices * tokens, cut.outputs) for cut in cuts]
    found = pl.pallas_call(
        partial(_kernel, given=given, cuts=cuts),
        grid=(cuts[-1].first + cuts[-1].programs, choices),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        compiler_params=triton.CompilerParams(num_warps=_WARPS),
        interpret=form is KernelForm.INTERPRETED,
        name="few_rows",
    )(numbers.astype(jnp.int32), inputs, *tables)
    return [
        part.reshape(cut.splits, choices * tokens, cut.outputs)
        for part, cut in zip(found, cuts, strict=True)
    ]


def added_up(parts: Float[Array, "parts ..."] | Sequence[Array]) -> Float[Array, "..."]:
    """The sum of parts, one after the other: XLA makes no launch of its own of additions."""
    total = parts[0]
    for index in range(1, len(parts)):
        total += parts[index]
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """What the programs of a kernel have in common."""

    rows_of_x: int
    tokens: int
    """Rows of activations that a program multiplies."""
    choices: int
    """Numbers of weights."""
    share: int
    """Numbers that have the same row of activations."""
    experts: int
    """Numbers from here on are of no expert."""
    may_lack: bool
    has_scales: bool
    form: KernelForm


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """How programs share out a weight.

    A program has `width` outputs. Of the `groups` scale groups of `height` stored rows, it has
    `each` whole groups, or one of the `parts` of a group. It reads `ahead` tiles of `tile` rows
    before it adds up those that it read before, `steps` times for a group.
    """

    first: int
    """Number of its first program, in a kernel for several weights."""
    outputs: int
    groups: int
    height: int
    width: int
    tile: int
    ahead: int
    steps: int
    parts: int
    each: int

    @classmethod
    def of(
        cls, rows: int, outputs: int, *, groups: int, itemsize: int, splits: int, first: int = 0
    ) -> "_Cut":
        """About `splits` programs for the same outputs, unless some would have little to read."""
        height = rows // groups
        width = _width(outputs, itemsize)
        tile = min(_TILE // (width * itemsize), pl.next_power_of_2(height))
        ahead = min(_AHEAD, pl.cdiv(height, tile))
        parts = min(pl.cdiv(splits, groups), pl.cdiv(height, tile * ahead * _FEWEST_STEPS))
        steps = pl.cdiv(height, tile * ahead * pl.next_power_of_2(parts))
        most = max(1, groups // splits)
        return cls(
            first=first,
            outputs=outputs,
            groups=groups,
            height=height,
            width=width,
            tile=tile,
            ahead=ahead,
            steps=steps,
            parts=pl.cdiv(height, tile * ahead * steps),
            each=max(each for each in range(1, most + 1) if groups % each == 0),
        )

    @property
    def splits(self) -> int:
        """How many programs share the same outputs."""
        return self.groups // self.each * self.parts

    @property
    def strips(self) -> int:
        """How many programs share the same rows."""
        return pl.cdiv(self.outputs, self.width)

    @property
    def programs(self) -> int:
        return self.strips * self.splits

    @property
    def is_whole(self) -> bool:
        """Whether every tile lies in the rows of its group."""
        return self.parts * self.steps * self.ahead * self.tile == self.height


def _width(outputs: int, itemsize: int) -> int:
    return min(_STRIP // itemsize, pl.next_power_of_2(outputs))


def _cuts(matrices: Sequence[Matrix], choices: int) -> tuple[_Cut, ...]:
    """As many programs as a GPU needs for all weights together."""
    itemsize = matrices[0].weight.dtype.itemsize
    widths = [matrix.weight.shape[-1] for matrix in matrices]
    strips = sum(pl.cdiv(outputs, _width(outputs, itemsize)) for outputs in widths)
    splits, first, cuts = pl.cdiv(_PROGRAMS, strips * choices), 0, []
    for matrix in matrices:
        rows, outputs = matrix.weight.shape[-2:]
        groups = 1 if matrix.scales is None else matrix.scales.shape[-2]
        cuts.append(
            _Cut.of(rows, outputs, groups=groups, itemsize=itemsize, splits=splits, first=first)
        )
        first += cuts[-1].programs
    return tuple(cuts)


def _kernel(numbers: Any, x: Any, *refs: Any, given: _Given, cuts: tuple[_Cut, ...]) -> None:
    """One program: sums over its rows, for its outputs, of one of the weights."""
    program, choice = pl.program_id(0), pl.program_id(1)
    number, per_weight = numbers[choice], 2 if given.has_scales else 1
    is_here = number < given.experts if given.may_lack else None
    for index, cut in enumerate(cuts):
        tables = refs[index * per_weight : (index + 1) * per_weight]
        sums = refs[len(cuts) * per_weight + index]
        place = _Place(cut=cut, given=given, program=program - cut.first, choice=choice)
        conditions = [] if is_here is None else [is_here]
        if len(cuts) > 1:
            conditions.append((program >= cut.first) & (program < cut.first + cut.programs))
        _when(conditions, partial(_add_up, place, number, x, tables, sums))
        if is_here is not None:
            _when([~is_here, *conditions[1:]], partial(_store, place, sums, [0.0] * given.tokens))


def _when(conditions: list[Array], run: Callable[[], None]) -> None:
    if not conditions:
        run()
        return
    every = conditions[0]
    for condition in conditions[1:]:
        every &= condition
    pl.when(every)(run)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Rows and outputs of one program, of one weight."""

    cut: _Cut
    given: _Given
    program: Array
    """Its number among those of this weight."""
    choice: Array

    @property
    def split(self) -> Array:
        return _divided(self.program, self.cut.strips)[0]

    @property
    def column(self) -> Array:
        """The first of its outputs."""
        return _divided(self.program, self.cut.strips)[1] * self.cut.width

    @property
    def columns(self) -> Any:
        return pl.ds(self.column, self.cut.width)

    @property
    def in_outputs(self) -> Array | None:
        """Which columns there are; None, if all."""
        if self.cut.outputs % self.cut.width == 0:
            return None
        return self.column + jnp.arange(self.cut.width) < self.cut.outputs

    def group(self, step: Array | int) -> Array:
        """Scale group of a step."""
        part_of = _divided(self.split, self.cut.parts)[0]
        return part_of * self.cut.each + _divided(step, self.cut.steps)[0]

    def rows(self, step: Array | int) -> list[tuple[Array, Array | None]]:
        """First row of each tile of a step, and which of the tile's rows there are."""
        cut, group = self.cut, self.group(step)
        part, step_of_group = _divided(self.split, cut.parts)[1], _divided(step, cut.steps)[1]
        first = (part * cut.steps + step_of_group) * cut.ahead
        starts = [(first + index) * cut.tile for index in range(cut.ahead)]
        inside = [
            None if cut.is_whole else start + jnp.arange(cut.tile) < cut.height for start in starts
        ]
        return [
            (group * cut.height + start, rows) for start, rows in zip(starts, inside, strict=True)
        ]


def _divided(number: Array | int, by: int) -> tuple[Array, Array]:
    """Quotient and remainder of a number that is not negative."""
    number, divisor = jnp.asarray(number, jnp.int32), jnp.asarray(by, jnp.int32)
    return jax.lax.div(number, divisor), jax.lax.rem(number, divisor)


def _add_up(place: _Place, number: Array, x: Any, tables: Sequence[Any], sums: Any) -> None:
    """Sums over the rows of a program: tiles are loaded while those before them are added."""
    cut, given = place.cut, place.given
    weight, *scales = tables
    all_rows, in_outputs = cut.groups * cut.height, place.in_outputs
    zeros = (jnp.zeros((cut.tile, cut.width), jnp.float32),) * given.tokens
    first_row = _divided(place.choice * given.tokens, given.share)[0] if given.choices > 1 else 0

    def tiles_of(step: Array | int) -> tuple[Array, ...]:
        parts = (
            (weight.at[pl.ds(number * all_rows + row, cut.tile), place.columns], inside)
            for row, inside in place.rows(step)
        )
        return tuple(_load(part, _column(inside), _row(in_outputs)) for part, inside in parts)

    def scaled(step: Array | int, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        for table in scales:
            line = table.at[number * cut.groups + place.group(step), place.columns]
            scale = stored_codes.scale(_load(line, in_outputs))
            totals = tuple(total * scale[None] for total in totals)
        return totals

    def added(
        step: Array | int, tiles: tuple[Array, ...], totals: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        before, totals = totals, totals if cut.each == 1 else zeros
        for (row, inside), tile in zip(place.rows(step), tiles, strict=True):
            for nibble, codes in enumerate(stored_codes.codes(tile, given.form)):
                begins = [
                    (nibble * given.rows_of_x + first_row + token) * all_rows + row
                    for token in range(given.tokens)
                ]
                factors = [_load(x.at[pl.ds(begin, cut.tile)], inside) for begin in begins]
                totals = tuple(
                    stored_codes.multiply_add(codes, factor, total, given.form)
                    for total, factor in zip(totals, factors, strict=True)
                )
        if cut.each == 1:
            return totals
        return tuple(old + new for old, new in zip(before, scaled(step, totals), strict=True))

    def step_on(step: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        ahead = tiles_of(step + 1)  # the loop carries them, so no compiler can load them later
        return ahead, added(step, *state)

    last = cut.each * cut.steps - 1
    tiles, totals = jax.lax.fori_loop(0, last, step_on, (tiles_of(0), zeros))
    totals = added(last, tiles, totals)
    if cut.each == 1:
        totals = scaled(0, totals)
    _store(place, sums, [jnp.sum(total, axis=0) for total in totals])


def _store(place: _Place, sums: Any, rows: Sequence[Array | float]) -> None:
    given = place.given
    first = (place.split * given.choices + place.choice) * given.tokens
    for token, row in enumerate(rows):
        line = sums.at[first + token, place.columns]
        wide = jnp.full(place.cut.width, row, jnp.float32) if isinstance(row, float) else row
        triton.store(line, wide, mask=place.in_outputs)


def _column(mask: Array | None) -> Array | None:
    return None if mask is None else mask[:, None]


def _row(mask: Array | None) -> Array | None:
    return None if mask is None else mask[None]


def _load(part: Any, *masks: Array | None) -> Array:
    """Load, with zeros where one of the masks is false."""
    mask = None
    for each in masks:
        if each is not None:
            mask = each if mask is None else mask & each
    other = None if mask is None else jnp.zeros((), part.dtype)
    loaded: Array = triton.load(part, mask=mask, other=other)
    return loaded
