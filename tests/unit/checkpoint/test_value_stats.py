"""Values of arrays in files: what no tensor may hold, and how they are spread."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokctl.checkpoint import value_stats as values
from grokctl.checkpoint.pickle_objects import ArrayRef
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.value_stats import CELLS, StoredValues, ValueStats, find_odd

SEEDS = st.integers(0, 2**32 - 1)


def store(path: Path, *arrays: np.ndarray) -> list[ArrayRef]:
    """Put arrays in a file, one after the other, at odd places."""
    file, refs = io.BytesIO(), []
    for array in arrays:
        file.write(b"odd"[: 1 + file.tell() % 2])
        refs.append(ArrayRef(offset=file.tell(), shape=array.shape, dtype=array.dtype))
        file.write(array.tobytes())
    file.write(b"the end")
    path.write_bytes(file.getvalue())
    return refs


def stats_of(stored: StoredValues) -> ValueStats:
    return sum((part.stats() for part in stored.parts()), ValueStats())


def dequantised(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """As the released code does it; both released, inputs before outputs."""
    *lead, inputs, outputs = weight.shape
    groups = scales.shape[-2]
    grouped = weight.astype(np.float64).reshape(*lead, groups, inputs // groups, outputs)
    return (grouped * scales.astype(np.float64)[..., :, None, :]).reshape(weight.shape)


def assert_stats(found: ValueStats, weight: np.ndarray, expected: np.ndarray) -> None:
    """It is what numpy says of the integers and of the dequantised values."""
    magnitudes = np.abs(weight.astype(int)).reshape(-1)
    assert found.count == found.integers == weight.size
    assert (found.minimum, found.maximum) == (expected.min(), expected.max())
    assert found.rms == pytest.approx(np.sqrt(np.mean(expected**2)), rel=1e-12)
    assert found.zeros == (weight == 0).sum()
    assert found.saturated == (magnitudes >= 127).sum()
    bounds = [*range(0, 128, 128 // CELLS), 129]  # the last one holds -128, too
    assert found.cells == tuple(np.histogram(magnitudes, bounds)[0])


# --- how values are spread


@settings(max_examples=30, deadline=None)
@given(
    lead=st.sampled_from([(), (1,), (3,)]),
    groups=st.sampled_from([1, 2, 8]),
    per_group=st.integers(1, 12),
    outputs=st.integers(1, 20),
    block=st.sampled_from([5, 64, 4096]),
    cached=st.sampled_from([16, 1024, 2**20]),
    seed=SEEDS,
)
def test_any_shape_cut_into_any_blocks_gives_numpys_numbers(
    tmp_path_factory, lead, groups, per_group, outputs, block, cached, seed
):
    rng = np.random.default_rng(seed)
    inputs = groups * per_group
    weight = rng.integers(-128, 128, (*lead, inputs, outputs), np.int8)
    scales = rng.uniform(1e-4, 1, (*lead, groups, outputs)).astype(BFLOAT16)
    path = tmp_path_factory.mktemp("values") / "file"
    refs = store(path, weight, scales)
    released = StoredValues(path=path, array=refs[0], scales=refs[1])
    content = np.frombuffer(path.read_bytes(), np.uint8)
    other = replace(released, read=lambda start, nbytes: content[start : start + nbytes])
    expected = dequantised(weight, scales)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "_BLOCK", block)
        patch.setattr(values, "_CACHED", cached)
        parts = list(released.parts())
        found = [stats_of(released), stats_of(other)]

    assert max(part.nbytes for part in parts) <= block
    assert sum(part.nbytes for part in parts) == weight.nbytes
    for spread in found:
        assert_stats(spread, weight, expected)


def test_long_sums_of_the_largest_squares_are_exact(tmp_path):
    weight = np.full((4096, 5), -128, np.int8)
    scales = np.ones((1, 5), BFLOAT16)
    refs = store(tmp_path / "file", weight, scales)

    found = stats_of(StoredValues(path=tmp_path / "file", array=refs[0], scales=refs[1]))

    assert found.squares == weight.size * 128**2


@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "experts"])
def test_packed_integers_are_looked_at_two_a_byte(tmp_path, lead):
    rng = np.random.default_rng(0)
    groups, group, outputs = 4, 6, 5
    codes = rng.integers(-7, 8, (*lead, groups * group, outputs), np.int8)
    scales = rng.uniform(0.1, 1, (*lead, groups, outputs)).astype(BFLOAT16)
    pairs = (codes + 8).astype(np.uint8)
    refs = store(tmp_path / "file", pairs[..., ::2, :] | pairs[..., 1::2, :] << 4, scales)

    found = stats_of(StoredValues(path=tmp_path / "file", array=refs[0], scales=refs[1]))

    expected = dequantised(codes, scales)
    assert (found.count, found.nonfinite) == (codes.size, 0)
    assert (found.minimum, found.maximum) == (expected.min(), expected.max())
    assert found.rms == pytest.approx(np.sqrt(np.mean(expected**2)), rel=1e-9)
    assert (found.integers, sum(found.cells)) == (0, 0)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
def test_plain_numbers_have_a_range_and_no_integers(tmp_path, dtype):
    array = np.random.default_rng(0).standard_normal((30, 7)).astype(dtype)
    (ref,) = store(tmp_path / "file", array)

    found = stats_of(StoredValues(path=tmp_path / "file", array=ref))

    wide = array.astype(np.float64)
    assert (found.minimum, found.maximum) == (wide.min(), wide.max())
    assert found.rms == pytest.approx(np.sqrt(np.mean(wide**2)), rel=1e-12)
    assert (found.integers, sum(found.cells)) == (0, 0)


def test_what_is_no_number_is_counted_and_left_out(tmp_path):
    array = np.array([3, np.nan, -4, np.inf, -np.inf, np.nan], np.float32)
    (ref,) = store(tmp_path / "file", array)

    found = stats_of(StoredValues(path=tmp_path / "file", array=ref))

    assert (found.count, found.nonfinite) == (6, 4)
    assert (found.minimum, found.maximum) == (-4, 3)
    assert found.rms == pytest.approx(np.sqrt(12.5))


def test_nothing_but_nan_has_no_range(tmp_path):
    (ref,) = store(tmp_path / "file", np.full(5, np.nan, np.float32))

    found = stats_of(StoredValues(path=tmp_path / "file", array=ref))

    assert (found.count, found.nonfinite, found.rms) == (5, 5, 0)
    assert found.minimum > found.maximum


def test_a_file_that_ends_early_is_an_error_and_no_signal(tmp_path):
    (ref,) = store(tmp_path / "file", np.ones(5000, np.float32))
    with (tmp_path / "file").open("r+b") as file:
        file.truncate(100)

    with pytest.raises(OSError, match="ends before byte 100"):
        stats_of(StoredValues(path=tmp_path / "file", array=ref))
    with pytest.raises(OSError, match="ends before byte 100"):
        find_odd(tmp_path / "file", ref)


def test_values_whose_scale_is_no_number_are_counted_and_left_out(tmp_path):
    weight = np.arange(-6, 6, dtype=np.int8).reshape(1, 3, 4)
    scales = np.ones((1, 4), BFLOAT16)
    scales[0, 1] = np.uint16(0x7F81).view(BFLOAT16)  # a signalling NaN
    refs = store(tmp_path / "file", weight, scales)

    found = stats_of(
        StoredValues(
            path=tmp_path / "file",
            array=refs[0],
            scales=refs[1],
        )
    )

    left = np.delete(weight, 1, 2).astype(float)
    assert (found.count, found.nonfinite) == (12, 12 - left.size)
    assert (found.minimum, found.maximum) == (left.min(), left.max())
    assert found.rms == pytest.approx(np.sqrt(np.mean(left**2)))
    assert sum(found.cells) == 12


# --- what is unusual in a tensor


def is_bad(array: np.ndarray, *, positive: bool) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # some NaN are signalling
        wide = array.astype(np.float64)
    smallest = 2.0**-126  # of the normal numbers
    return ~np.isfinite(wide) | (wide < smallest if positive else np.zeros_like(wide, bool))


@pytest.mark.parametrize("positive", [True, False], ids=["positive", "finite"])
def test_every_bfloat16_there_is_is_judged_as_numpy_judges_it(tmp_path, positive):
    every = np.arange(2**16, dtype=np.uint16).view(BFLOAT16)
    (ref,) = store(tmp_path / "file", every)

    found = find_odd(tmp_path / "file", ref, is_scales=positive)

    bad = is_bad(every, positive=positive)
    covered = np.zeros(every.size, bool)
    for low, high in found.ranges:
        covered[(low - ref.offset) // 2 : (high - ref.offset) // 2] = True
    assert found.count == bad.sum()
    assert found.index == (int(np.flatnonzero(bad)[0]),)
    assert (covered == bad).all()


def test_unusual_values_are_counted_by_kind(tmp_path):
    numbers = [1, 0, -0.0, 0, -2, -3, np.nan, np.inf, -np.inf, 1e-39, 5]
    (ref,) = store(tmp_path / "file", np.array(numbers).astype(BFLOAT16))

    scales = find_odd(tmp_path / "file", ref, is_scales=True)
    norm = find_odd(tmp_path / "file", ref, is_norm=True)
    plain = find_odd(tmp_path / "file", ref)

    kinds = [(odd.zeros, odd.negative, odd.nonfinite, odd.subnormal) for odd in (scales, norm)]
    assert kinds == [(3, 2, 3, 1), (3, 0, 3, 0)]
    assert (plain.nonfinite, plain.count, plain.index) == (3, 3, (6,))
    assert str(scales) == (
        "3 values not finite, 3 values of 0, 2 values below 0, 1 value subnormal"
    )


def test_what_nobody_expects_of_stored_values_is_counted(tmp_path):
    weight = np.array([[[-128, 1], [-128, 127]], [[0, 3], [4, 5]]], np.int8)
    scales = np.array([[0, 1], [-1, -0.0]]).astype(BFLOAT16)
    refs = store(tmp_path / "file", weight, scales.reshape(2, 1, 2))
    (plain,) = store(tmp_path / "norm", np.array([0, 1, -0.0], np.float32))

    found = stats_of(StoredValues(path=tmp_path / "file", array=refs[0], scales=refs[1]))
    norm = stats_of(StoredValues(path=tmp_path / "norm", array=plain))

    assert (found.lowest, found.zero_scales, found.negative_scales) == (2, 2, 1)
    assert norm.zero_values == 2


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(1,), (64,), (5, 9), (2, 3, 4), (700,)]),
    share=st.sampled_from([0, 0.01, 0.3, 1]),
    is_float32=st.booleans(),
    positive=st.booleans(),
    block=st.sampled_from([4, 20, 4096]),
    seed=SEEDS,
)
def test_bad_values_are_counted_and_located_over_any_blocks(
    tmp_path_factory, shape, share, is_float32, positive, block, seed
):
    rng = np.random.default_rng(seed)
    array = rng.uniform(1e-3, 1, shape).astype(np.float32 if is_float32 else BFLOAT16)
    hit = rng.random(shape) < share
    array[hit] = rng.choice(np.array([np.nan, np.inf, -np.inf, -1, 0], np.float32), hit.sum())
    path = tmp_path_factory.mktemp("values") / "file"
    _, ref = store(path, np.zeros(3, np.int8), array)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "_BLOCK", block)
        found = find_odd(path, ref, is_scales=positive)

    bad = is_bad(array, positive=positive)
    if not bad.any():
        assert found is None
        return
    size = array.dtype.itemsize
    places = np.flatnonzero(bad.reshape(-1)) * size + ref.offset
    assert found.count == len(places)
    assert found.index == tuple(np.argwhere(bad)[0])
    assert str(found.value) == str(float(array[found.index]))
    assert (found.ranges[0][0], found.ranges[-1][1]) == (places[0], places[-1] + size)
    assert all(any(low <= place < high for low, high in found.ranges) for place in places)
    assert all(
        a < b <= c < d for (a, b), (c, d) in zip(found.ranges, found.ranges[1:], strict=False)
    )
    if len(found.ranges) > 1:
        assert sum(high - low for low, high in found.ranges) == len(places) * size
    assert len(found.ranges) <= 16
