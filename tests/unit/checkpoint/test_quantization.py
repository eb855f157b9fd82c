from math import prod

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.quantization import (
    dequantised,
    rounded,
    to_int4,
    to_int8_groups,
    unpacked,
)

GROUPS = [2, 6, 32, 62, 64, 66, 128, 200, 514, 1024]
LARGEST_CODE = 7


def random_bytes(shape, dtype, seed=0):
    """Any bits, NaN among them: what is only moved must not change."""
    count = prod(shape) * dtype.itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(count), dtype).reshape(shape)


def bits(array):
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def gaussian_integers(inputs, outputs, seed=0):
    """As a release has them: normal values, quantised by the largest magnitude of a column."""
    values = np.random.default_rng(seed).standard_normal((inputs, outputs))
    return np.rint(values / np.abs(values).max(axis=0) * 127).astype(np.int8)


# --- floats


@pytest.mark.parametrize("shape", [(5, 3), (2, 300, 7), (2, 3, 129, 2050)])
def test_dequantised_values_are_the_exact_products(shape):
    rng = np.random.default_rng(1)
    weight = rng.integers(-128, 128, shape, dtype=np.int8)
    scales = rng.uniform(-2, 2, (*shape[:-2], shape[-1])).astype(BFLOAT16)
    exact = weight.astype(np.float64) * scales.astype(np.float64)[..., None, :]
    out = np.empty(shape, np.float32)

    np.testing.assert_array_equal(dequantised(weight, scales), exact)
    np.testing.assert_array_equal(dequantised(weight, scales.astype(np.float32)), exact)
    assert dequantised(weight, scales, out=out) is out
    np.testing.assert_array_equal(out, exact)


def test_a_strided_view_dequantises_like_its_copy():
    wide = random_bytes((2, 300, 4096), np.dtype(np.int8))
    view = wide[:, ::3, 1000:3500]
    scales = np.random.default_rng(3).uniform(1, 2, (2, 4096)).astype(BFLOAT16)[:, 1000:3500]

    np.testing.assert_array_equal(dequantised(view, scales), dequantised(view.copy(), scales))


@settings(deadline=None, max_examples=200)
@given(
    values=arrays.arrays(
        np.float32,
        st.integers(1, 40),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_rounding_takes_the_nearest_bfloat16_and_of_two_the_even_one(values):
    words = values.view(np.uint32)
    even = (words + np.uint32(0x7FFF) + (words >> 16 & 1)) >> 16

    np.testing.assert_array_equal(bits(rounded(values)), even.astype(np.uint16))


@settings(deadline=None, max_examples=100)
@given(
    values=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 3).map(lambda groups: 4 * groups), st.integers(1, 5)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    )
)
@example(values=np.full((4, 1), 4.3e-44, np.float32))  # a 127th of it is nothing
def test_floats_come_back_from_int8_within_half_a_step(values):
    integers, scales = to_int8_groups(values, 4)

    assert integers.dtype == np.int8
    assert scales.shape == (values.shape[0] // 4, values.shape[1])
    assert np.abs(integers.astype(int)).max() <= 127
    steps = np.repeat(scales.astype(np.float64), 4, axis=0)
    error = np.abs(values.astype(np.float64) - integers * steps)
    tiny = np.finfo(np.float32).tiny
    assert (error <= steps * 0.5001 + tiny).all()
    np.testing.assert_array_equal(integers[steps == 0], 0)


# --- int4


def codes_of(packed):
    """Plainly: low nibbles are even inputs and high ones odd inputs."""
    codes = np.zeros((2 * len(packed), packed.shape[-1]), int)
    codes[::2] = packed & 15
    codes[1::2] = packed >> 4
    return codes - 8


def squared_errors(values, codes, steps, group):
    wide = np.repeat(steps.astype(np.float64), group, axis=0)
    errors = (values - codes * wide) ** 2
    return errors.reshape(-1, group, values.shape[-1]).sum(axis=1)


def absmax_errors(values, group):
    largest = np.abs(values.astype(int)).reshape(-1, group, values.shape[-1]).max(axis=1)
    steps = np.maximum(largest, 1) / LARGEST_CODE
    codes = np.rint(values / np.repeat(steps, group, axis=0))
    return squared_errors(values, codes, steps, group)


def assert_is_sound_int4(values, group):
    result = to_int4(values, group=group)

    codes = codes_of(result.codes)
    assert np.abs(codes).max() <= LARGEST_CODE
    shape = (-1, group, values.shape[-1])
    q, r = values.astype(int).reshape(shape), codes.reshape(shape)
    np.testing.assert_array_equal(result.qq, (q * q).sum(axis=1))
    np.testing.assert_array_equal(result.qr, (q * r).sum(axis=1))
    np.testing.assert_array_equal(result.rr, (r * r).sum(axis=1))
    fitted = (q * r).sum(axis=1) / np.maximum((r * r).sum(axis=1), 1)
    np.testing.assert_allclose(result.steps, fitted, rtol=2**-23)
    errors = squared_errors(values, codes, fitted, group)
    # an inverse is rounded by 1 in 225 at most, so that a tie is seen up to 0.03 steps away
    limit = ((0.5 + 0.03) / (0.5 - 0.03)) ** 2
    largest = absmax_errors(values, group)
    assert (errors <= largest * limit + 1e-9).all()
    return result


@settings(deadline=None, max_examples=150)
@given(data=st.data(), group=st.integers(1, 40).map(lambda half: 2 * half))
def test_int4_is_no_worse_than_by_the_largest_magnitude_and_its_sums_are_exact(data, group):
    shape = (group * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5)))
    values = data.draw(arrays.arrays(np.int8, shape))

    assert_is_sound_int4(values, group)


@pytest.mark.parametrize("group", GROUPS)
def test_int4_of_every_group_size(group):
    values = gaussian_integers(3 * group, 1030, seed=group)

    result = assert_is_sound_int4(values, group)

    fitted = result.qr.astype(np.float64) / np.maximum(result.rr, 1)
    errors = squared_errors(values, codes_of(result.codes), fitted, group)
    assert errors.sum() < absmax_errors(values, group).sum()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("extreme", [-128, 127])
def test_the_largest_integers_overflow_nothing(group, extreme):
    assert_is_sound_int4(np.full((2 * group, 3), extreme, np.int8), group)


def test_ramps_to_every_largest_magnitude_are_quantised_soundly():
    largest = np.arange(1, 129)
    values = np.zeros((256, 128), np.int8)  # column m - 1 holds -m .. m - 1
    for column, magnitude in enumerate(largest):
        values[: 2 * magnitude, column] = np.arange(-magnitude, magnitude)

    assert_is_sound_int4(values, 256)
    assert_is_sound_int4(-np.maximum(values, -127), 256)


@pytest.mark.parametrize("group", GROUPS)
def test_groups_of_zeros_have_step_zero_and_code_zero(group):
    values = np.zeros((2 * group, 4), np.int8)
    values[:group, 1] = 5

    result = assert_is_sound_int4(values, group)

    assert not result.steps[:, 0].any()
    assert not codes_of(result.codes)[:, 0].any()
    assert result.steps[0, 1] == pytest.approx(5 / LARGEST_CODE)


def test_a_strided_view_becomes_the_int4_of_its_copy():
    wide = gaussian_integers(384, 4096)
    view = wide[::2, 700:3001]

    result, copied = to_int4(view, group=64), to_int4(view.copy(), group=64)

    np.testing.assert_array_equal(result.codes, copied.codes)
    np.testing.assert_array_equal(result.steps, copied.steps)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_on_normal_values_int4_is_close_to_the_best_of_a_fine_search(group):
    values = gaussian_integers(1024, 64)
    result = to_int4(values, group=group)
    groups = values.reshape(-1, group, 64).astype(np.float64)
    largest = np.abs(groups).max(axis=1, keepdims=True)
    best = np.full(result.steps.shape, np.inf)
    for factor in np.linspace(0.5, 1.1, 61):
        codes = np.rint(groups / (largest * factor / LARGEST_CODE)).clip(-7, 7)
        steps = (groups * codes).sum(axis=1) / (codes * codes).sum(axis=1)
        best = np.minimum(best, ((groups - codes * steps[:, None]) ** 2).sum(axis=1))

    error = (result.qq - result.qr.astype(np.float64) ** 2 / result.rr).sum()

    assert error < absmax_errors(values, group).sum() * 0.91
    assert error < best.sum() * 1.08


def test_the_sums_give_the_error_of_any_stored_step():
    values = gaussian_integers(256, 40)
    scales = np.random.default_rng(5).uniform(0.5, 2, 40)
    result = to_int4(values, group=64)
    stored = (result.steps * scales).astype(BFLOAT16).astype(np.float64)
    weights = values * scales
    restored = codes_of(result.codes) * np.repeat(stored, 64, axis=0)

    qq, qr, rr = (sums.astype(np.float64) for sums in (result.qq, result.qr, result.rr))
    error = qq * scales**2 - 2 * qr * scales * stored + rr * stored**2

    assert error.sum() == pytest.approx(((weights - restored) ** 2).sum(), rel=1e-9)


# --- unpacking


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (16, 5), (700, 512)])
def test_every_byte_unpacks_to_two_integers(shape):
    codes = random_bytes(shape, np.dtype(np.uint8))

    values = unpacked(codes)

    assert values.dtype == np.int8
    np.testing.assert_array_equal(values, codes_of(codes))


@pytest.mark.parametrize("group", GROUPS)
def test_what_int4_packs_unpacks_to_the_nearest_codes(group):
    values = gaussian_integers(2 * group, 9)
    result = to_int4(values, group=group)

    steps = np.repeat(result.steps.astype(np.float64), group, axis=0)
    nearest = np.rint(values / steps).clip(-LARGEST_CODE, LARGEST_CODE)

    # codes were rounded before their step was fitted, so a few lie on the other side of a half
    assert np.abs(unpacked(result.codes) - nearest).max() <= 1
    assert (unpacked(result.codes) != nearest).mean() < 0.1
