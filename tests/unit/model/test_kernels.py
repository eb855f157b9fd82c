"""The kernel for GPUs: its values, run as ordinary operations, and its form, without a GPU."""

import importlib
import re
import sys
from dataclasses import dataclass, replace
from functools import partial, reduce
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from grokctl.checkpoint.miniature import MINIATURE
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.model import (
    cache_kernel,
    experts,
    forward,
    kernel_check,
    kernels,
    norm_kernel,
    stored_codes,
)
from grokctl.model.config import GROK_1
from grokctl.model.kernels import FEW_ROWS, added_up, chosen_products, few_rows, suits, sums
from grokctl.model.matmul import project
from grokctl.model.parameters import Matrix
from grokctl.model.placement import MeshShape, place
from grokctl.model.step_spec import KernelForm, StepShape
from grokctl.model.tensors import tensor_specs

pytestmark = pytest.mark.heavy

CPU = StepShape(
    config=MINIATURE, mesh=MeshShape(1, 1), platform="cpu", compute=jnp.dtype(jnp.float32)
)
INTERPRETED = KernelForm.INTERPRETED
DTYPES = [jnp.int8, jnp.uint8, jnp.uint16, jnp.float32]


@dataclass
class Case:
    """A random weight or stack as a device holds it, and its values."""

    dtype: Any
    groups: int
    height: int
    outputs: int
    experts: int = 0
    scale_dtype: Any = jnp.uint16

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.groups * self.height * self.outputs + self.experts)
        stack = (self.experts,) if self.experts else ()
        rows = max(1, self.groups) * self.height
        shape = (*stack, rows, self.outputs)
        if self.dtype == jnp.int8:
            stored = rng.integers(-128, 128, shape, dtype=np.int8)
            values = stored.astype(np.float64)
        elif self.dtype == jnp.uint8:
            low, high = rng.integers(1, 16, (2, *shape), dtype=np.uint8)
            stored = low | high << 4
            values = np.stack([low, high], axis=-2).reshape(*stack, -1, self.outputs) - 8.0
        else:
            numbers = rng.standard_normal(shape, dtype=np.float32)
            bits = numbers.astype(BFLOAT16)
            values = (bits if self.dtype == jnp.uint16 else numbers).astype(np.float64)
            stored = bits.view(np.uint16) if self.dtype == jnp.uint16 else numbers
        scales = None
        if self.groups:
            factors = rng.uniform(0.5, 2, (*stack, self.groups, self.outputs)).astype(BFLOAT16)
            wide = factors.astype(np.float32)
            scales = jnp.asarray(factors.view(np.uint16) if self.is_bits else wide)
            values = values * np.repeat(wide, values.shape[-2] // self.groups, axis=-2)
        self.inputs = values.shape[-2]
        self.values = values
        self.matrix = Matrix(jnp.asarray(stored), scales)

    @property
    def is_bits(self) -> bool:
        return bool(self.scale_dtype == jnp.uint16)

    def activations(self, tokens: int) -> jax.Array:
        rng = np.random.default_rng(tokens)
        return jnp.asarray(rng.standard_normal((tokens, self.inputs), dtype=np.float32))

    def product(self, x: jax.Array, expert: int | None = None) -> Any:
        number = None if expert is None else jnp.int32(expert)
        return few_rows(x, self.matrix.weight, self.matrix.scales, number, form=INTERPRETED)

    def check(self, tokens: int, expert: int | None = None) -> None:
        x = self.activations(tokens)
        found = np.asarray(self.product(x, expert))
        number = None if expert is None else jnp.int32(expert)
        twin = np.asarray(project(x, self.matrix, shape=CPU, expert=number))
        values = self.values if expert is None else self.values[expert]
        expected = np.asarray(x, np.float64) @ values
        sizes = np.abs(np.asarray(x, np.float64))
        assert found.dtype == jnp.float32
        assert found.shape == expected.shape
        assert (np.abs(found - expected) <= 2e-6 * sizes @ np.abs(values)).all()
        # of int4 the twin takes the offset of all codes away at the end
        assert (np.abs(found - twin) <= 1e-5 * sizes @ np.maximum(np.abs(values), 1)).all()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dtype = draw(st.sampled_from(DTYPES))
    is_coded = dtype in {jnp.int8, jnp.uint8}
    return Case(
        dtype=dtype,
        groups=draw(st.integers(1, 12)) if is_coded else 0,
        height=draw(st.integers(1, 70)),
        outputs=draw(st.integers(1, 300)),
        experts=draw(st.integers(0, 4)),
        scale_dtype=draw(st.sampled_from([jnp.uint16, jnp.float32])),
    )


@given(cases(), st.integers(1, FEW_ROWS), st.sampled_from([1, 7, 512]), st.data())
@settings(max_examples=15, deadline=None)
def test_the_kernel_is_the_product_with_the_dequantised_weight(case, tokens, programs, data):
    expert = data.draw(st.integers(0, case.experts - 1)) if case.experts else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_PROGRAMS", programs)

        case.check(tokens, expert)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_can_divide_a_weight(dtype):
    groups = {jnp.int8: 2, jnp.uint8: 8}.get(dtype, 0)
    case = Case(dtype, groups, 128 // max(1, groups), 256, experts=2)

    case.check(FEW_ROWS, 1)


def test_an_expert_is_chosen_while_it_runs():
    case = Case(jnp.int8, 2, 24, 20, experts=5)
    x = case.activations(3)
    numbers = jnp.array([4, 0, 2, 1, 3])

    @jax.jit
    def every(x, matrix):
        def product(number):
            return few_rows(x, matrix.weight, matrix.scales, number, form=INTERPRETED)

        return jax.lax.map(product, numbers)

    found = every(x, case.matrix)

    for place_, number in enumerate(numbers.tolist()):
        np.testing.assert_array_equal(found[place_], case.product(x, number))


@st.composite
def groups_of_cases(draw: st.DrawFn) -> list[Case]:
    """Weights of one type with the same inputs."""
    first = draw(cases())
    groups = [first.groups] if not first.groups else [1, first.groups]
    height = first.height * max(1, first.groups)
    return [
        Case(
            dtype=first.dtype,
            groups=(number := draw(st.sampled_from(groups))),
            height=height // max(1, number),
            outputs=draw(st.integers(1, 300)),
            experts=first.experts,
            scale_dtype=first.scale_dtype,
        )
        for _ in range(draw(st.integers(1, 3)))
    ]


@given(groups_of_cases(), st.integers(1, 4), st.sampled_from([1, 7, 512]), st.data())
@settings(max_examples=8, deadline=None)
def test_several_weights_in_one_kernel_are_as_many_products(several, tokens, programs, data):
    matrices, x = [case.matrix for case in several], several[0].activations(tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_PROGRAMS", programs)
        if not several[0].experts:
            found = [added_up(part) for part in sums(x, matrices, form=INTERPRETED)]
            rows, numbers = np.arange(tokens), None
        else:
            last = several[0].experts  # of nothing
            numbers = data.draw(st.lists(st.integers(0, last), min_size=2, max_size=2)) * tokens
            found = chosen_products(
                x, matrices, jnp.array(numbers), run=1, may_lack=True, form=INTERPRETED
            )
            rows = np.arange(2 * tokens) // 2

    for case, product in zip(several, found, strict=True):
        values, wide = case.values, np.asarray(x, np.float64)[rows]
        if numbers is None:
            expected, bound = wide @ values, np.abs(wide) @ np.abs(values)
        else:
            values = np.concatenate([values, np.zeros((1, *values.shape[1:]))])[numbers]
            expected = (wide[:, None] @ values)[:, 0]
            bound = (np.abs(wide)[:, None] @ np.abs(values))[:, 0]
        assert (np.abs(product - expected) <= 2e-6 * bound).all()


def test_a_run_of_rows_goes_through_its_own_expert():
    case = Case(jnp.int8, 2, 24, 20, experts=3)
    x = case.activations(12)

    (found,) = chosen_products(
        x,
        [case.matrix],
        jnp.array([2, 3, 0, 2]),
        run=3,
        may_lack=True,
        form=INTERPRETED,
    )

    parts = np.asarray(x, np.float64).reshape(4, 3, -1)
    values = np.concatenate([case.values, np.zeros((1, *case.values.shape[1:]))])[[2, 3, 0, 2]]
    np.testing.assert_allclose(found, (parts @ values).reshape(12, -1), rtol=1e-4, atol=1e-3)
    assert not np.asarray(found)[3:6].any()


@pytest.mark.parametrize("dtype", [jnp.uint16, jnp.float32])
def test_what_lies_around_an_expert_is_not_added(dtype):
    case = Case(dtype, 0, 43, 7, experts=3)
    nothing = np.float32("nan").astype(BFLOAT16).view(np.uint16) if dtype == jnp.uint16 else np.nan
    weight = case.matrix.weight.at[jnp.array([0, 2])].set(nothing)
    x = case.activations(2)

    found = few_rows(x, weight, None, jnp.int32(1), form=INTERPRETED)

    np.testing.assert_array_equal(found, case.product(x, 1))


def test_every_code_is_exact():
    one = jnp.full((1, 256), np.float32(1).view(np.uint32) >> 16, jnp.uint16)
    codes = np.arange(256, dtype=np.uint8)[None]

    int8 = few_rows(jnp.ones((1, 1)), jnp.asarray(codes.view(np.int8)), one, None, form=INTERPRETED)
    int4 = few_rows(jnp.eye(2), jnp.asarray(codes), one, None, form=INTERPRETED)

    np.testing.assert_array_equal(int8[0], np.arange(256).astype(np.int8))
    np.testing.assert_array_equal(int4, np.stack([codes[0] & 15, codes[0] >> 4]).astype(int) - 8)


def test_many_tokens_and_huge_stacks_are_left_to_other_forms():
    def weight(*shape, dtype=jnp.int8):
        return jax.ShapeDtypeStruct(shape, dtype)

    assert suits(8, weight(8, 32768, 6144))
    assert not suits(9, weight(8, 32768, 6144))
    assert suits(4, weight(8, 16384, 6144, dtype=jnp.uint8))
    assert not suits(5, weight(8, 16384, 6144, dtype=jnp.uint8))
    assert not suits(1, weight(16, 32768, 6144))


def test_without_triton_no_product_suits_it():
    name = "jax.experimental.pallas.triton"
    weight = jax.ShapeDtypeStruct((24, 10), jnp.int8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, None)
        patch.delattr("jax.experimental.pallas.triton", raising=False)
        importlib.reload(stored_codes)
        importlib.reload(kernels)
        assert not kernels.suits(1, weight)
    importlib.reload(stored_codes)
    importlib.reload(kernels)
    assert kernels.suits(1, weight)


# --- what is written in PTX, which runs on no CPU


def number_of(operand: str) -> Any:
    return np.uint32(int(operand, 0))


def picked(low: Any, high: Any, selector: Any) -> Any:
    """`prmt.b32`: a byte of eight for every four bits of the selector, the lowest first."""
    both = np.uint64(low) | np.uint64(high) << np.uint64(32)
    places = [int(selector) >> 4 * byte & 7 for byte in range(4)]
    parts = [(both >> np.uint64(8 * place) & np.uint64(255)).astype(np.uint32) for place in places]
    return sum(part << np.uint32(8 * byte) for byte, part in enumerate(parts))


def fused(left: Any, right: Any, total: Any) -> Any:
    wide = [np.asarray(each).view(np.float32).astype(np.float64) for each in (left, right, total)]
    return (wide[0] * wide[1] + wide[2]).astype(np.float32).view(np.uint32)


PTX = {
    "xor.b32": np.bitwise_xor,
    "and.b32": np.bitwise_and,
    "shr.u32": np.right_shift,
    "prmt.b32": picked,
    "fma.rn.f32": fused,
}


def run_ptx(
    text: str, *, args: Any, constraints: str, pack: int, result_shape_dtypes: Any
) -> list[Any]:
    """Instructions as NVIDIA's manual defines them, for words of `pack` elements, little-endian."""
    outputs = constraints.split(",").count("=f")
    assert outputs == pack
    registers = {
        f"${outputs + index}": np.ascontiguousarray(argument).reshape(-1).view(np.uint32)
        for index, argument in enumerate(args)
    }
    body = text.strip("{ }").removeprefix(".reg .b32 a;")
    for line in filter(None, map(str.strip, body.split(";"))):
        name, operands = line.split(" ", 1)
        into, *given = operands.split(", ")
        values = [registers[each] if each in registers else number_of(each) for each in given]
        registers[into] = PTX[name](*values)
    made = np.stack([registers[f"${index}"] for index in range(outputs)], axis=1)
    (result,) = result_shape_dtypes
    return [jnp.asarray(made.astype(np.uint32).view(np.float32).reshape(result.shape))]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_codes_in_ptx_are_those_without_it(monkeypatch, dtype):
    monkeypatch.setattr(stored_codes.triton, "elementwise_inline_asm", run_ptx)
    stored = jnp.asarray(np.random.default_rng(0).permutation(256).astype(np.uint8).view(dtype))

    found, plain = (
        stored_codes.codes(stored.reshape(4, 64), form) for form in (KernelForm.PTX, INTERPRETED)
    )

    np.testing.assert_array_equal(found, plain)


def test_a_product_in_ptx_is_added_to_the_sum(monkeypatch):
    monkeypatch.setattr(stored_codes.triton, "elementwise_inline_asm", run_ptx)
    left, total = np.random.default_rng(0).standard_normal((2, 6, 5)).astype(np.float32)
    right = np.arange(1, 7, dtype=np.float32)

    found = stored_codes.multiply_add(*map(jnp.asarray, (left, right, total)), KernelForm.PTX)

    np.testing.assert_allclose(found, total + left * right[:, None], rtol=1e-6, atol=1e-6)


# --- between the blocks of a layer


@pytest.mark.fused
@pytest.mark.parametrize(
    ("embed", "num_experts", "selected"), [(24, 7, 3), (96, 8, 2), (2500, 8, 2), (3, 1, 1)]
)
def test_what_stands_between_blocks_is_what_plain_operations_make(embed, num_experts, selected):
    config = replace(
        MINIATURE, emb_size=embed, num_experts=num_experts, num_selected_experts=selected
    )
    shape = replace(CPU, config=config, kernel_form=INTERPRETED)
    rng = np.random.default_rng(embed)
    hidden, mixed = jnp.asarray(rng.standard_normal((2, 3, 1, embed)) * 3, jnp.float32)
    after, before = jnp.asarray(rng.uniform(0.5, 2, (2, embed)), jnp.float32)
    router = jnp.asarray(rng.standard_normal((embed, num_experts)) / np.sqrt(embed), jnp.float32)

    total, norm, (gates, chosen) = norm_kernel.added_and_routed(
        hidden, mixed, (after, before), router, shape=shape
    )

    eps = config.rms_norm_eps
    expected = hidden + forward.rms_norm(mixed, after, eps=eps)
    normed = forward.rms_norm(expected, before, eps=eps)
    routed = experts.route(router, normed.reshape(-1, embed), config=config)
    for found, plain in ((total, expected), (norm, normed), (gates, routed[0])):
        np.testing.assert_allclose(found, plain, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(chosen, routed[1])
    both = norm_kernel.added_and_normed(hidden, mixed, (after, before), shape=shape)
    np.testing.assert_array_equal(both[0], total)
    np.testing.assert_array_equal(both[1], norm)
    np.testing.assert_array_equal(norm_kernel.added(hidden, mixed, after, shape=shape), total)
    np.testing.assert_array_equal(norm_kernel.normed(total, before, shape=shape), norm)


def test_of_equal_experts_the_first_is_chosen():
    shape = replace(CPU, config=replace(MINIATURE, emb_size=16), kernel_form=INTERPRETED)
    ones = jnp.ones((1, 16), jnp.float32)
    router = jnp.zeros((16, 8)).at[:, jnp.array([2, 5, 6])].set(1.0)

    _, _, (gates, chosen) = norm_kernel.added_and_routed(
        ones, ones, (ones[0], ones[0]), router, shape=shape
    )

    assert chosen.tolist() == [[2, 5]]
    assert gates[0, 0] == gates[0, 1]


# --- how the work is shared out


@given(
    st.integers(1, 40),
    st.integers(1, 500),
    st.integers(1, 3000),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 1024),
)
def test_every_stored_row_is_read_once(groups, height, outputs, itemsize, splits):
    cut = kernels._Cut.of(groups * height, outputs, groups=groups, itemsize=itemsize, splits=splits)

    read = []
    for split in range(cut.splits):
        for index in range(cut.each):
            group = split // cut.parts * cut.each + index
            for tile in range(cut.steps * cut.ahead):
                start = (split % cut.parts * cut.steps * cut.ahead + tile) * cut.tile
                inside = range(start, min(start + cut.tile, height))
                read += [group * height + row for row in inside]
                assert len(inside) == cut.tile or not cut.is_whole
    assert read == list(range(groups * height))
    assert cut.strips * cut.width >= outputs


@pytest.mark.parametrize("devices", [1, 4, 8, 16])
def test_every_full_width_matrix_fills_a_gpu(devices):
    for spec in tensor_specs(GROK_1)[:10]:
        if not spec.is_quantized:
            continue
        placed = place(
            spec,
            scale_groups=spec.scale_groups,
            mesh=MeshShape(1, devices),
            device=0,
            config=GROK_1,
        )
        rows, outputs = (stop - start for start, stop in placed.weight[-2:])
        groups = placed.scales[-2][1] - placed.scales[-2][0]
        if spec.name.endswith((".key", ".value")):
            continue  # with the query, in one kernel
        weight = jax.ShapeDtypeStruct((rows, outputs), jnp.int8)
        scales = jax.ShapeDtypeStruct((groups, outputs), jnp.uint16)

        (cut,) = kernels._cuts([Matrix(weight, scales)], 1)

        assert cut.programs >= 96, (spec.name, cut)
        sums = 4 * cut.splits * outputs
        assert sums < 0.2 * rows * outputs, (spec.name, cut)


# --- the form of what is compiled for a GPU


HOPPER = AbstractMesh(
    (1,),
    ("only",),
    axis_types=(AxisType.Auto,),
    abstract_device=AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="cuda"),
)


def for_cuda(function, *arguments):
    """StableHLO for an NVIDIA GPU that is not there."""
    with use_abstract_mesh(HOPPER):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


CASES = [
    pytest.param((8, 32768, 6144), 8, jnp.int8, id="int8"),
    pytest.param((8, 16384, 6144), 512, jnp.uint8, id="int4"),
    pytest.param((8, 6144, 32768), 0, jnp.uint16, id="bf16"),
    pytest.param((8, 6144, 32768), 0, jnp.float32, id="float32"),
    pytest.param((8, 43, 7), 1, jnp.int8, id="odd"),
]


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("form", [KernelForm.PTX, KernelForm.PLAIN])
@pytest.mark.parametrize(("shape", "groups", "dtype"), CASES)
@pytest.mark.parametrize("tokens", [1, 8])
def test_for_a_gpu_it_is_one_kernel_that_takes_the_whole_stack(shape, groups, dtype, tokens, form):
    experts, rows, outputs = shape
    inputs = rows * 2 if dtype == jnp.uint8 else rows
    scales = jax.ShapeDtypeStruct((experts, groups, outputs), jnp.uint16) if groups else None

    text = for_cuda(
        partial(few_rows, form=form),
        jax.ShapeDtypeStruct((tokens, inputs), jnp.float32),
        jax.ShapeDtypeStruct(shape, dtype),
        scales,
        jax.ShapeDtypeStruct((), jnp.int32),
    )

    operations = re.findall(r"stablehlo\.(\w+)", text)
    assert operations.count("custom_call") == 1
    assert set(operations) <= {"custom_call", "reshape", "transpose", "constant", "slice", "add"}


# --- the check of an engine on a GPU


def test_a_platform_that_cannot_run_the_kernels_has_no_form_of_them():
    assert kernel_check.working_form(jax.devices("cpu")[0]) is None


@pytest.mark.parametrize(
    ("version", "right", "tried", "found"),
    [
        ("cuda 13000", {KernelForm.PTX, KernelForm.PLAIN}, [KernelForm.PTX], KernelForm.PTX),
        ("cuda 13000", {KernelForm.PLAIN}, [KernelForm.PTX, KernelForm.PLAIN], KernelForm.PLAIN),
        ("cuda 13000", set(), [KernelForm.PTX, KernelForm.PLAIN], None),
        ("ROCm 6.3", {KernelForm.PTX, KernelForm.PLAIN}, [KernelForm.PLAIN], KernelForm.PLAIN),
    ],
)
def test_the_first_form_that_works_is_taken(monkeypatch, version, right, tried, found):
    asked = []
    monkeypatch.setattr(
        kernel_check, "works", lambda _device, form: bool(asked.append(form)) or form in right
    )
    device = SimpleNamespace(client=SimpleNamespace(platform_version=version))

    assert kernel_check.working_form(device) is found
    assert asked == tried


def is_right() -> bool:
    return kernel_check.works(jax.devices("cpu")[0], INTERPRETED)


def test_right_kernels_are_found_to_be_right():
    assert is_right()


def changed(function, change):
    """A function whose first argument, or whose result, is another."""
    return lambda *given, **named: change(function, *given, **named)


@pytest.mark.parametrize(
    ("module", "name", "change"),
    [
        pytest.param(
            kernel_check,
            "few_rows",
            lambda run, x, weight, scales, expert, **named: run(
                x, weight, scales, expert - 1, **named
            ),
            id="the expert before",
        ),
        pytest.param(
            kernel_check,
            "few_rows",
            lambda run, x, weight, scales, *rest, **named: run(
                x, weight, scales[:, ::-1], *rest, **named
            ),
            id="scales of another group",
        ),
        pytest.param(
            stored_codes,
            "codes",
            lambda run, stored, form: [part[::-1] for part in run(stored, form)],
            id="rows in another order",
        ),
        pytest.param(
            stored_codes,
            "codes",
            lambda run, stored, form: [
                part.at[:, :2].set(part[:, 1::-1]) if part.shape[1] > 1 else part
                for part in run(stored, form)
            ],
            id="two bytes of a word exchanged",
        ),
        pytest.param(
            stored_codes,
            "scale",
            lambda run, stored: run(stored ^ 1 if stored.dtype == jnp.uint16 else stored),
            id="the last bit of a scale",
        ),
        pytest.param(
            kernels,
            "_Place.group",
            lambda run, place, _step: run(place, 0),
            id="one scale for several groups",
        ),
        pytest.param(
            kernels,
            "_load",
            lambda _run, part, *_masks: kernels.triton.load(part),
            id="no masks",
        ),
        pytest.param(
            kernel_check,
            "attend_with_one",
            lambda run, query, cache, positions, **named: run(
                query, cache, replace(positions, slots=positions.slots[::-1]), **named
            ),
            id="slots of each other",
        ),
        pytest.param(
            kernel_check,
            "attend_with_one",
            lambda run, query, cache, positions, **named: run(
                query, cache, replace(positions, start=positions.start - 1), **named
            ),
            id="one position too few",
        ),
        pytest.param(
            cache_kernel,
            "rotation",
            lambda run, positions, half, **named: run(positions + 1, half, **named),
            id="turned too far",
        ),
        pytest.param(
            kernel_check,
            "rotated_and_kept",
            lambda run, sums, cache, after, **named: run(
                sums, cache, replace(after, count=after.count + 1), **named
            ),
            id="padding kept",
        ),
        pytest.param(
            kernel_check,
            "rotated_and_kept",
            lambda run, sums, cache, after, **named: run(
                sums, cache, replace(after, slots=after.slots[::-1]), **named
            ),
            id="kept in slots of each other",
        ),
        pytest.param(
            norm_kernel,
            "_choose",
            lambda run, logits, *rest, **named: run(logits[::-1], *rest, **named),
            id="other experts",
        ),
    ],
)
def test_wrong_kernels_are_found_to_be_wrong(module, name, change, monkeypatch):
    *classes, name = name.split(".")
    owner = reduce(getattr, classes, module)  # of the module as it was loaded last
    monkeypatch.setattr(owner, name, changed(getattr(owner, name), change))
    case = kernel_check._case()
    parts = {
        "attend_with_one": slice(-2, None),
        "_choose": slice(-3, -2),
        "group": slice(-4, -3),
        "rotation": slice(6, 7),
        "rotated_and_kept": slice(6, 7),
    }
    part = parts.get(name, slice(0, 3))  # the others need not run
    monkeypatch.setattr(kernel_check, "_RUNS", kernel_check._RUNS[part])
    monkeypatch.setattr(kernel_check, "_case", lambda: (case[0], case[1][part]))

    assert not is_right()
