"""Turning and regrouping: nothing but places of values change."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokctl.checkpoint.blocks import BLOCK, Q8_0, from_q4_0, to_q4_0, turn, turned_back


@given(
    st.integers(1, 300), st.integers(1, 600), st.sampled_from(["i1", "<u2", "<f4"]), st.booleans()
)
def test_a_matrix_of_any_size_is_turned(rows, columns, dtype, is_part):
    wide = np.random.default_rng(0).integers(0, 100, (rows, columns + 3)).astype(dtype)
    matrix = wide[:, 3:] if is_part else np.ascontiguousarray(wide[:, 3:])
    out = np.empty((columns, rows), dtype)

    turn(matrix, out)

    np.testing.assert_array_equal(out, matrix.T)
    np.testing.assert_array_equal(turned_back(out), matrix)


@pytest.mark.parametrize("outputs", [8, 12, 1])
def test_a_matrix_is_turned_into_the_codes_of_blocks(outputs):
    codes = np.random.default_rng(1).integers(-128, 128, (3 * BLOCK, outputs), dtype=np.int8)
    out = np.zeros((outputs, 3), Q8_0)

    turn(codes, out["codes"])

    np.testing.assert_array_equal(out["codes"].reshape(outputs, -1), codes.T)
    assert not out["scale"].any()


def test_nibbles_are_where_ggml_has_them():
    inputs = np.arange(2 * BLOCK, dtype=np.uint8)[:, None] % 16
    codes = inputs[::2] | inputs[1::2] << 4

    blocks = to_q4_0(codes)[:, 0].reshape(2, BLOCK // 2)

    for block, own in zip(blocks, inputs[:, 0].reshape(2, BLOCK), strict=True):
        np.testing.assert_array_equal(block & 15, own[: BLOCK // 2])
        np.testing.assert_array_equal(block >> 4, own[BLOCK // 2 :])


@given(st.integers(1, 4), st.integers(1, 9), st.randoms(use_true_random=False))
def test_nibbles_come_back(blocks, outputs, random):
    codes = np.frombuffer(random.randbytes(16 * blocks * outputs), np.uint8).reshape(-1, outputs)

    np.testing.assert_array_equal(from_q4_0(to_q4_0(codes)), codes)
