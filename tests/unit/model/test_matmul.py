"""Every form of a product with a stored weight against the product with the dequantised weight."""

from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from grokctl.checkpoint.miniature import MINIATURE
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.tensor_source import Storage, extent
from grokctl.inference.devices import find_devices
from grokctl.model import axes, forward
from grokctl.model import matmul as products
from grokctl.model.cache import Positions, empty_cache, stored_type
from grokctl.model.config import GROK_1
from grokctl.model.matmul import project, project_back
from grokctl.model.parameters import Matrix, build_parameters
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.model.step_spec import StepShape
from grokctl.model.tensors import tensor_specs
from grokctl.native.binary import NoKernelError
from grokctl.native.library import load

pytestmark = pytest.mark.heavy

ONE = MeshShape(1, 1)
FLOAT32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


def step_shape(config=MINIATURE, *, platform="cpu", compute=FLOAT32) -> StepShape:
    return StepShape(config=config, mesh=ONE, platform=platform, compute=compute)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def packed(codes):
    """Two codes of -7 to 7 in a byte: that of the even input in the low nibble."""
    nibbles = (codes + 8).astype(np.uint8)
    return nibbles[..., 0::2, :] | nibbles[..., 1::2, :] << 4


@dataclass
class Case:
    """A random weight in one storage, and its values."""

    precision: Precision
    inputs: int
    outputs: int
    groups: int = 0
    stack: tuple[int, ...] = ()

    @property
    def matrix(self) -> Matrix:
        return self._made[0]

    @property
    def values(self) -> np.ndarray:
        return self._made[1]

    @cached_property
    def _made(self) -> tuple[Matrix, np.ndarray]:  # not while tests are collected
        rng = np.random.default_rng(self.inputs * self.outputs + self.groups)
        shape = (*self.stack, self.inputs, self.outputs)
        scales = None
        match self.precision:
            case Precision.INT8 | Precision.INT4:
                limit = 127 if self.precision is Precision.INT8 else 7
                codes = rng.integers(-limit, limit + 1, shape).astype(np.int8)
                scales = rng.uniform(0.5, 2, (*self.stack, self.groups, self.outputs))
                scales = scales.astype(BFLOAT16)
                rows = np.repeat(scales.astype(np.float64), self.inputs // self.groups, axis=-2)
                values = codes * rows
                stored = codes if self.precision is Precision.INT8 else packed(codes)
                scales = jnp.asarray(scales.view(np.uint16))
            case Precision.BFLOAT16:
                stored = rng.standard_normal(shape).astype(BFLOAT16)
                values = stored.astype(np.float64)
                stored = stored.view(np.uint16)
            case Precision.FLOAT32:
                stored = rng.standard_normal(shape).astype(np.float32)
                values = stored.astype(np.float64)
        return Matrix(jnp.asarray(stored), scales), values

    def __str__(self) -> str:
        groups = f"-{self.groups}" if self.groups else ""
        return f"{self.precision}-{self.inputs}x{self.outputs}{groups}"


def product(x, matrix, *, shape, expert=None):
    """`project` in one compiled program, as the model runs it."""
    return np.asarray(jax.jit(partial(project, shape=shape))(x, matrix, expert=expert))


def check(found, x, values, *, bound=1e-6):
    expected = x.astype(np.float64) @ values
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=bound * np.abs(expected).max())


INT8, INT4, BFLOAT16_, FLOAT32_ = Precision.INT8, Precision.INT4, "bf16", "float32"
CASES = [
    Case(Precision(precision), inputs, outputs, groups)
    for precision, inputs, outputs, groups in [
        (INT8, 48, 10, 1),
        (INT8, 48, 10, 2),
        (INT8, 48, 10, 8),
        (INT8, 43, 7, 1),  # as odd as a device's part of a miniature can be
        (INT8, 688, 130, 8),
        (INT8, 96, 40_000, 2),  # more sums than are made side by side
        (INT4, 64, 10, 2),
        (INT4, 86, 7, 1),
        (INT4, 20, 33, 10),
        (INT4, 960, 130, 15),
        (INT4, 128, 9000, 64),
        (BFLOAT16_, 24, 10, 0),
        (BFLOAT16_, 43, 7, 0),
        (FLOAT32_, 24, 10, 0),
        (FLOAT32_, 43, 7, 0),
    ]
]


@pytest.mark.optimized
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_form_is_the_product_with_the_dequantised_weight(case):
    bounds = {("cpu", BF16): 1e-6, ("gpu", FLOAT32): 1e-6}
    if not 1 < case.groups <= products._FEW_GROUPS:  # XLA on the CPU has no batch of such products
        bounds["gpu", BF16] = 2e-2
    xs = [normal(rows, rows, case.inputs) for rows in (1, 2, 5, 16, 17)]

    @jax.jit
    def every(xs, matrix):
        shapes = [step_shape(platform=platform, compute=compute) for platform, compute in bounds]
        return [[project(x, matrix, shape=shape) for shape in shapes] for x in xs]

    for x, products_of_x in zip(xs, every(xs, case.matrix), strict=True):
        for found, bound in zip(products_of_x, bounds.values(), strict=True):
            check(np.asarray(found), x, case.values, bound=bound)


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_an_expert_of_a_stack_is_chosen_while_it_runs(precision, rows, platform):
    groups = {Precision.INT8: 8, Precision.INT4: 24}.get(precision, 0)
    case = Case(precision, 96, 20, groups, stack=(5,))
    x, shape = normal(rows, rows, 96), step_shape(platform=platform)

    @jax.jit
    def every(x, matrix):
        return jax.lax.map(lambda number: project(x, matrix, shape=shape, expert=number), numbers)

    numbers = jnp.array([4, 0, 2, 1, 3])
    found = np.asarray(every(x, case.matrix))

    for place, number in enumerate(numbers.tolist()):
        check(found[place], x, case.values[number])


@pytest.mark.parametrize(("rows", "block"), [(1, 1), (7, 100), (33, 1000), (7, 10_000)])
@pytest.mark.parametrize(("precision", "groups"), [(INT8, 1), (INT8, 2), (INT4, 6), (FLOAT32_, 0)])
@pytest.mark.parametrize("compute", [FLOAT32, BF16], ids=str)
def test_a_weight_can_be_dequantised_in_blocks_of_any_size(
    monkeypatch, rows, block, precision, groups, compute
):
    monkeypatch.setattr(products, "BLOCK", block)
    monkeypatch.setattr(products, "_FEW_ROWS", {FLOAT32: 0, BF16: 0})
    case = Case(Precision(precision), 60, 30, groups)
    x = normal(rows, rows, 60)
    shape = replace(step_shape(compute=compute), has_fast_bfloat16=True)

    found = product(x, case.matrix, shape=shape)

    # the integers of int8 are exact in bfloat16, and so are activations in two parts
    bound = {FLOAT32: 1e-6, BF16: 2e-5 if precision is INT8 else 1e-2}[compute]
    check(found, x, case.values, bound=bound)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_only_experts_round_their_activations(platform):
    case = Case(INT8, 64, 30, 1, stack=(2,))
    x, one = normal(33, 40, 64), Matrix(case.matrix.weight[1], case.matrix.scales[1])
    shape = replace(step_shape(platform=platform, compute=BF16), has_fast_bfloat16=True)

    alone = product(x, one, shape=shape)
    expert = product(x, case.matrix, shape=shape, expert=np.int32(1))

    check(alone, x, case.values[1], bound=2e-5)
    check(expert, x, case.values[1], bound=1e-2)
    assert np.abs(expert - alone).max() > 1e-4 * np.abs(alone).max()


@pytest.mark.parametrize("sums", [1, 40, 100, 10_000])
@pytest.mark.parametrize("unroll", [1, 3, 8])
@pytest.mark.parametrize(("precision", "groups"), [(INT8, 1), (INT8, 3), (INT4, 12), (FLOAT32_, 0)])
def test_rows_can_be_walked_in_any_order(monkeypatch, sums, unroll, precision, groups):
    monkeypatch.setattr(products, "_SUMS", sums)
    monkeypatch.setattr(products, "_UNROLL", unroll)
    case = Case(Precision(precision), 72, 10, groups)
    x = normal(1, 2, 72)

    check(product(x, case.matrix, shape=step_shape()), x, case.values)


@given(st.integers(1, 64), st.integers(1, 200), st.integers(1, 3000))
def test_a_walk_comes_by_every_row_once_and_keeps_to_its_room(groups, height, room):
    walk = products._Walk.over(groups * height, groups=groups, room=room)

    parts = walk.outer * walk.side
    assert parts * walk.turns * walk.unroll == groups * height
    assert parts % groups == 0
    assert walk.side <= room
    assert walk.outer == 1 or parts == groups


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)], ids=str)
def test_a_product_keeps_the_leading_axes(lead):
    case = Case(INT8, 24, 10, 2)
    x = normal(32, *lead, 24)

    check(product(x, case.matrix, shape=step_shape()), x, case.values)


@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_extreme_codes_are_not_lost(rows, platform):
    ones = np.full((1, 2), np.float32(1).view(np.uint32) >> 16, np.uint16)
    lowest = Matrix(np.full((4, 2), -128, np.int8), ones)
    mixed = Matrix(np.full((2, 2), 0xF1, np.uint8), ones)  # -7 and 7
    x = np.tile(np.array([[1, 2, 4, 8]], np.float32), (rows, 1))

    for matrix, expected in ((lowest, -128 * 15), (mixed, 7 * (-1 + 2 - 4 + 8))):
        found = product(x, matrix, shape=step_shape(platform=platform))
        np.testing.assert_array_equal(found, np.full((rows, 2), expected))


@pytest.mark.parametrize("rows", [1, 4, 5, 9])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_head_is_the_embedding_turned(rows, platform):
    embedding, x = normal(30, 10, 24), normal(31, 2, rows, 24)

    found = jax.jit(partial(project_back, shape=step_shape(platform=platform)))(x, embedding)

    check(np.asarray(found), x, embedding.T)


# --- what a full-width layer takes, without a weight


def temporaries(config, precision, groups, *, length, is_fast, batch=1, is_native=False):
    """Bytes that the compiled program of a decoder layer takes beside its arguments."""
    storage = Storage(
        config=config,
        precision=precision,
        groups={
            spec.name: groups(spec) if spec.is_quantized else 0 for spec in tensor_specs(config)
        },
    )
    tensors = {tensor.key: tensor for tensor in storage.tensors}

    def array(key):
        if key not in tensors:
            return None
        dtype = tensors[key].dtype
        shape = extent(tensors[key].slices(ONE, 0, config))
        return jax.ShapeDtypeStruct(shape, "u2" if dtype == BFLOAT16 else dtype)

    (layer,) = build_parameters(
        config, lambda name: Matrix(array(f"{name}.weight"), array(f"{name}.scales"))
    ).layers
    (cache,) = empty_cache(
        config,
        ONE,
        slots=batch,
        past=4096,
        dtype=stored_type(BF16, platform="cpu"),
        zeros=lambda shape, dtype: jax.ShapeDtypeStruct((1, *shape), dtype),
    )
    hidden = jax.ShapeDtypeStruct((batch, length, config.emb_size), jnp.float32)
    mesh = jax.make_mesh(
        (1, 1),
        (axes.EXPERT_AXIS, axes.MODEL_AXIS),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=find_devices(1),
    )
    shape = replace(
        step_shape(config, compute=BF16), has_fast_bfloat16=is_fast, has_native_kernel=is_native
    )
    mapped = jax.shard_map(
        lambda *arguments: forward.decoder_layer(*arguments, shape=shape),
        mesh=mesh,
        in_specs=(PartitionSpec(),) * 4,
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    one = jax.ShapeDtypeStruct((batch,), jnp.int32)
    where = Positions(slots=one, start=one, count=jax.ShapeDtypeStruct((), jnp.int32))
    arguments = (layer, cache, hidden, where)
    compiled = jax.jit(mapped, donate_argnums=1).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


FULL = replace(GROK_1, num_layers=1)
STORAGES = [
    pytest.param(Precision.INT8, lambda spec: spec.scale_groups, id="int8"),
    pytest.param(Precision.INT4, lambda spec: spec.shape[-2] // 64, id="int4"),
    pytest.param(Precision.BFLOAT16, lambda _spec: 0, id="bf16"),
    pytest.param(Precision.FLOAT32, lambda _spec: 0, id="float32"),
]


@pytest.mark.fused
@pytest.mark.parametrize(("precision", "groups"), STORAGES)
@pytest.mark.parametrize(
    ("length", "is_fast", "limit"),
    [
        pytest.param(1, False, 2e6, id="one"),
        pytest.param(64, False, 64e6, id="float32"),
        pytest.param(64, True, 64e6, id="bfloat16"),
    ],
)
def test_a_full_width_layer_runs_without_a_copy_of_any_weight(
    precision, groups, is_fast, length, limit
):
    # the smallest weight of a layer beside the router, a key, takes 3 to 25 MB
    assert temporaries(FULL, precision, groups, length=length, is_fast=is_fast) < limit


@pytest.mark.fused
@pytest.mark.parametrize(("precision", "groups"), STORAGES)
@pytest.mark.parametrize(("length", "limit"), [(1, 2e6), (64, 64e6)])
def test_the_native_kernel_copies_no_weight_either(precision, groups, length, limit):
    try:
        load()
    except NoKernelError as reason:
        pytest.skip(f"there is no native kernel: {reason}")

    found = temporaries(FULL, precision, groups, length=length, is_fast=True, is_native=True)

    assert found < limit


@pytest.mark.fused
@pytest.mark.parametrize(("batch", "limit"), [(4, 12e6), (16, 60e6)])
def test_a_batch_runs_without_a_copy_of_its_cache(batch, limit):
    # keys and values of 16 streams and 4,096 positions take 268 MB
    int8 = STORAGES[0].values
    assert temporaries(FULL, *int8, length=1, is_fast=True, batch=batch) < limit
