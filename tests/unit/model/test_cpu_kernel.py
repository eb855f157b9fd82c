"""The native kernel: each instruction set against float64, and those of integers alike."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.model import cpu_kernel
from grokctl.model.config import GROK_1
from grokctl.model.matmul import project
from grokctl.model.parameters import Experts, Matrix
from grokctl.model.placement import MeshShape
from grokctl.model.step_spec import StepShape
from grokctl.native.binary import NoKernelError
from grokctl.native.library import load

FLOAT32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
INTEGERS = ("amx", "avx512vnni", "avxvnni", "neon_i8mm", "neon_dotprod", "portable")
"""Sets that multiply integers with any number of tokens."""
SETS = (*INTEGERS, "avx512", "avx2")

try:
    library = load()
except NoKernelError as reason:
    pytest.skip(f"there is no native kernel: {reason}", allow_module_level=True)


@pytest.fixture(autouse=True)
def fastest():
    yield
    library.force(None)
    library.set_threads(2)


def here(names):
    """Those that run on this machine."""
    found = [name for name in names if library.force(name)]
    library.force(None)
    return found


def packed(codes):
    nibbles = (codes + 8).astype(np.uint8)
    return nibbles[..., 0::2, :] | nibbles[..., 1::2, :] << 4


def stored(kind, inputs, outputs, groups, *, stack=(), wide=False, seed=0):
    """A random matrix and its values."""
    rng = np.random.default_rng(seed)
    shape = (*stack, inputs, outputs)
    if kind == "float32":
        values = rng.standard_normal(shape).astype(np.float32)
        return Matrix(values, None), values.astype(np.float64)
    if kind == "bf16":
        values = rng.standard_normal(shape).astype(BFLOAT16)
        return Matrix(values.view(np.uint16), None), values.astype(np.float64)
    limit = 127 if kind == "int8" else 7
    codes = rng.integers(-limit, limit + 1, shape).astype(np.int8)
    scales = rng.uniform(0.5, 2, (*stack, groups, outputs))
    scales = scales.astype(np.float32 if wide else BFLOAT16)
    values = codes * np.repeat(scales.astype(np.float64), inputs // groups, axis=-2)
    weight = codes if kind == "int8" else packed(codes)
    return Matrix(weight, scales if wide else scales.view(np.uint16)), values


def multiplied(x, matrix, *, compute=FLOAT32, expert=None):
    run = jax.jit(partial(cpu_kernel.project, compute=compute))
    return np.asarray(run(x, matrix.weight, matrix.scales, expert))


def error(found, x, values):
    expected = x.astype(np.float64) @ values
    return np.abs(found - expected).max() / np.abs(expected).max()


def loss_of_bfloat16(x, values):
    return error(x.astype(BFLOAT16).astype(np.float64) @ values, x, values)


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


SHAPES = [
    pytest.param(kind, inputs, outputs, groups, id=f"{kind}-{inputs}x{outputs}-{groups}")
    for kind, inputs, outputs, groups in [
        ("int8", 43, 7, 1),
        ("int8", 96, 130, 8),
        ("int8", 4160, 200, 2),  # runs shorter than a group
        ("int8", 40_000, 10, 1),  # more than one sum of integers can hold
        ("int4", 20, 33, 10),
        ("int4", 86, 7, 1),
        ("int4", 1280, 200, 20),  # several runs in a segment
        ("bf16", 700, 90, 0),
        ("float32", 43, 7, 0),
        ("float32", 2100, 90, 0),
    ]
]


@pytest.mark.parametrize(("kind", "inputs", "outputs", "groups"), SHAPES)
def test_every_instruction_set_is_as_exact_as_promised(kind, inputs, outputs, groups):
    matrix, values = stored(kind, inputs, outputs, groups)
    for tokens in (1, 3, 20):
        x = normal(tokens, inputs)
        loss = loss_of_bfloat16(x, values)
        for name in here(SETS):
            library.force(name)

            assert error(multiplied(x, matrix), x, values) < 1e-6
            assert error(multiplied(x, matrix, compute=BF16), x, values) < loss / 10


@pytest.mark.parametrize("kind", ["int8", "int4"])
@given(
    st.sampled_from([1, 2, 4, 10, 20]),
    st.integers(1, 40),
    st.integers(1, 150),
    st.integers(1, 40),
    st.integers(0, 2),
    st.booleans(),
)
@settings(max_examples=15)
def test_integers_are_the_same_in_every_set(kind, groups, pairs, outputs, tokens, number, wide):
    matrix, values = stored(kind, 2 * pairs * groups, outputs, groups, stack=(3,), wide=wide)
    x = normal(tokens, 2 * pairs * groups) * np.float32(10.0) ** normal(tokens, 1)

    for compute in (FLOAT32, BF16):
        found = []
        for name in here(INTEGERS):
            library.force(name)
            found.append(multiplied(x, matrix, compute=compute, expert=np.int32(number)))

        for other in found[1:]:
            np.testing.assert_array_equal(found[0], other)
    assert error(found[0], x, values[number]) < 1e-2


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_an_output_depends_on_no_other_token_and_on_no_number_of_threads(kind):
    matrix, _ = stored(kind, 2560, 4500, 20)  # wider than a panel
    x = normal(40, 2560)

    library.set_threads(1)
    whole = multiplied(x, matrix)

    for threads in (1, 2, 3, 7):
        library.set_threads(threads)
        for first, last in ((0, 40), (3, 4), (7, 9), (5, 21)):
            np.testing.assert_array_equal(multiplied(x[first:last], matrix), whole[first:last])


@pytest.mark.parametrize("kind", ["int8", "int4", "bf16", "float32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_what_is_not_finite_spoils_its_own_token_only(kind, bad):
    matrix, values = stored(kind, 1300, 90, 2)
    x = normal(5, 1300)
    x[3, 700] = bad
    others = [0, 1, 2, 4]
    with np.errstate(invalid="ignore"):  # infinity times 0
        expected = bad * values[700]

    for name in here(SETS):
        library.force(name)
        found = multiplied(x, matrix)

        assert error(found[others], x[others], values) < 1e-6
        np.testing.assert_array_equal(found[3], expected.astype(np.float32))


@pytest.mark.parametrize("largest", [0.0, 1e-42, 1e-37, 1e-31, 1e-20, 1e20, 1e35])
def test_activations_of_any_size_keep_their_digits(largest):
    matrix, values = stored("int8", 260, 70, 2)
    x = normal(2, 260)
    x[1] *= np.float32(largest) / np.abs(x[1]).max()

    for name in here(SETS):
        library.force(name)
        found = multiplied(x, matrix)

        assert error(found[:1], x[:1], values) < 1e-6
        if largest > 1e-37:  # below, XLA makes them 0 as well
            assert error(found[1:], x[1:], values) < 1e-6
        else:
            assert np.abs(found[1]).max() < 1e-33


def test_the_extreme_codes_are_not_lost():
    ones = np.full((1, 66), np.float32(1).view(np.uint32) >> 16, np.uint16)
    lowest = Matrix(np.full((4, 66), -128, np.int8), ones)
    mixed = Matrix(np.full((2, 66), 0xF1, np.uint8), ones)  # -7 and 7
    x = np.array([[1, 2, 4, 8]], np.float32)

    for name in here(SETS):
        library.force(name)
        for matrix, expected in ((lowest, -128 * 15), (mixed, 7 * (-1 + 2 - 4 + 8))):
            found = multiplied(x, matrix)
            np.testing.assert_allclose(found, np.full((1, 66), expected), rtol=1e-6)


def test_integers_without_scales_have_a_scale_of_one():
    matrix, _ = stored("int8", 96, 70, 1)
    x = normal(3, 96)

    found = multiplied(x, Matrix(matrix.weight, None))

    assert error(found, x, matrix.weight.astype(np.float64)) < 1e-6


@pytest.mark.parametrize(("number", "nearest"), [(-1, 0), (3, 2)])
def test_a_number_outside_the_stack_is_the_nearest_inside(number, nearest):
    matrix, values = stored("int8", 64, 70, 1, stack=(3,))
    x = normal(1, 64)

    assert error(multiplied(x, matrix, expert=np.int32(number)), x, values[nearest]) < 1e-6


def test_the_model_calls_the_kernel_where_it_is_loaded():
    matrix, values = stored("int8", 512, 300, 8, stack=(2,))
    x = normal(2, 3, 512)
    shape = StepShape(
        config=GROK_1, mesh=MeshShape(1, 1), platform="cpu", compute=FLOAT32, has_native_kernel=True
    )
    run = jax.jit(partial(project, shape=shape))

    before, _ = library.counts()
    found = np.asarray(run(x, matrix, expert=np.int32(1)))

    assert found.shape == (2, 3, 300)
    assert error(found.reshape(6, 300), x.reshape(6, 512), values[1]) < 1e-6
    assert library.counts()[0] == before + 1


def test_a_matrix_is_shared_out_once():
    matrix, _ = stored("int8", 2048, 1024, 8)
    x = normal(1, 2048)
    multiplied(x, matrix)

    before = library.counts()
    multiplied(x, matrix)

    after = library.counts()
    assert (after[0] - before[0], after[1] - before[1]) == (1, 1)


def test_devices_that_multiply_at_once_share_the_threads():
    matrix, values = stored("int8", 1024, 1000, 8)
    xs = [normal(2, 1024, seed=seed) for seed in range(16)]
    run = jax.jit(partial(cpu_kernel.project, compute=FLOAT32))
    placed = [
        jax.device_put((x, matrix.weight, matrix.scales), device)
        for x, device in zip(xs, jax.devices("cpu"), strict=True)
    ]

    library.set_threads(5)
    with ThreadPoolExecutor(16) as pool:
        for _ in range(3):
            found = list(pool.map(lambda arrays: np.asarray(run(*arrays, None)), placed))
            for x, y in zip(xs, found, strict=True):
                assert error(y, x, values) < 1e-6

    if sys.platform == "linux":  # the fifth is the one that calls
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        assert names.count("grokctl-kernel") == 4


FORK = """
import os
import jax.numpy as jnp
import numpy as np
from grokctl.model import cpu_kernel
from grokctl.native.library import load

load().set_threads(2)
weight, x = np.ones((2048, 1024), np.int8), np.ones((1, 2048), np.float32)

def multiply():
    product = cpu_kernel.project(x, weight, None, None, compute=jnp.dtype(jnp.float32))
    assert (np.asarray(product) == 2048).all()

multiply()
child = os.fork()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
multiply()
"""


def test_the_process_forks_and_ends_without_waiting_for_the_threads():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        timeout=120,
        check=False,
    )

    assert done.returncode == 0


@pytest.mark.parametrize(("vocab", "embed"), [(1, 1), (70, 43), (300, 1040)])
@pytest.mark.parametrize("tokens", [1, 4, 5, 11])
def test_the_head_is_the_embedding_turned(vocab, embed, tokens):
    x, exact = normal(tokens, embed), normal(vocab, embed, seed=2).astype(BFLOAT16)
    whole = normal(vocab, embed, seed=3)
    run = jax.jit(cpu_kernel.project_back)

    for name in here(SETS):
        library.force(name)

        assert error(np.asarray(run(x, whole)), x, whole.astype(np.float64).T) < 1e-6
        narrow = np.asarray(run(x, exact.view(np.uint16)))
        assert error(narrow, x, exact.astype(np.float64).T) < 1e-6


@pytest.mark.parametrize("count", [0, 1, 5, 7])
def test_a_whole_expert_is_its_three_products(count):
    kinds = [("int8", 96, 130, 1), ("int8", 96, 130, 2), ("int4", 130, 96, 5)]
    made = [stored(*kind, stack=(3,), seed=seed) for seed, kind in enumerate(kinds)]
    gate, up, down = (values[1] for _, values in made)
    experts = Experts(*(matrix for matrix, _ in made))
    x = normal(7, 96) / 100
    wide = x.astype(np.float64) @ gate
    gelu = wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3))) / 2
    expected = (gelu * (x.astype(np.float64) @ up)) @ down
    expected[count:] = 0
    run = jax.jit(partial(cpu_kernel.expert_block, compute=FLOAT32))

    for name in here(SETS):
        library.force(name)
        found = np.asarray(run(x, experts, np.int32(1), np.int32(count)))

        np.testing.assert_allclose(found, expected, atol=1e-6 * max(1, np.abs(expected).max()))


@pytest.mark.fused
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 6.0, 30.0, 1e6, 1e19, np.inf, -np.inf, np.nan])
def test_an_expert_activates_as_xla_does(size):
    one = Matrix(np.eye(2, dtype=np.float32)[None], None)
    x = np.array([[size, -size]], np.float32)
    experts, expected = Experts(one, one, one), jax.nn.gelu(x, approximate=True) * x

    found = cpu_kernel.expert_block(x, experts, jnp.int32(0), 1, compute=FLOAT32)

    if np.isfinite(size):
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)  # XLA: -6 gives 0
    else:
        assert not np.isfinite(found).any()
