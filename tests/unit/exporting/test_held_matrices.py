"""Matrices that pieces share are read once, whole rows at a time, and are what the source has."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, Arrays

from grokctl.checkpoint.gguf import TensorType
from grokctl.checkpoint.tensor_source import Storage
from grokctl.errors import CorruptCheckpointError, Reason, corrupt
from grokctl.exporting import held_matrices
from grokctl.exporting.held_matrices import HeldMatrices, matrix_nbytes
from grokctl.exporting.tensors import ExportTensor
from grokctl.model.precision import Precision
from grokctl.model.tensors import tensor_specs

SPECS = {spec.name: spec for spec in tensor_specs(TINY)}
QUERY = SPECS["layers.0.attention.query"]
WEIGHTS = [spec for spec in SPECS.values() if spec.is_quantized]


def stored(precision):
    groups = {
        spec.name: spec.shape[-2] // 32 if spec.is_quantized and precision.startswith("int") else 0
        for spec in SPECS.values()
    }
    return Storage(config=TINY, precision=Precision(precision), groups=groups)


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(held_matrices, "_AT_A_TIME", 1000)


def read_all(source, tensor, lead, outputs, step):
    count = tensor.shape[-2]
    with source.reading(tensor, lead, outputs) as read:
        parts = [np.array(read(low, min(low + step, count))) for low in range(0, count, step)]
    return np.concatenate(parts)


@settings(max_examples=20)
@given(
    spec=st.sampled_from(WEIGHTS),
    precision=st.sampled_from(["int8", "int4", "bf16", "float32"]),
    step=st.sampled_from([1, 16, 1000]),
    data=st.data(),
)
def test_any_columns_of_any_rows_are_those_of_the_source(spec, precision, step, data):
    source = Arrays(stored(precision))
    held = HeldMatrices(source, data.draw(st.sampled_from([0, 5000, 10**6])))
    tensor = source.storage.weight(spec)
    width = tensor.shape[-1]
    for _ in range(3):
        lead = tuple(data.draw(st.integers(0, n - 1)) for n in tensor.shape[:-2])
        low = data.draw(st.integers(0, width - 1))
        outputs = (low, data.draw(st.integers(low + 1, width)))

        found = read_all(held, tensor, lead, outputs, step)

        np.testing.assert_array_equal(found, source.arrays[tensor.key][lead][:, slice(*outputs)])


def test_pieces_of_a_matrix_read_every_row_once_and_the_next_takes_its_place():
    source = Arrays(stored("int8"))
    held = HeldMatrices(source, matrix_nbytes(source.storage))
    first, second = (source.storage.weight(spec) for spec in WEIGHTS[:2])

    for tensor in (first, first, second, first):
        lead = (0,) * (len(tensor.shape) - 2)
        for low in range(0, tensor.shape[-1], 8):
            read_all(held, tensor, lead, (low, low + 8), 32)

    rows = {first.key: 0, second.key: 0}
    for key, (*_, (low, high), outputs) in source.reads:
        assert outputs == (0, SPECS[key.removesuffix(".weight")].shape[-1])
        rows[key] += high - low
    assert rows == {first.key: 2 * first.shape[-2], second.key: second.shape[-2]}


def test_matrices_are_kept_as_long_as_there_is_room():
    source = Arrays(stored("int8"))
    tensors = [source.storage.weight(spec) for spec in WEIGHTS[:2]]
    held = HeldMatrices(source, 2 * matrix_nbytes(source.storage))

    for tensor in tensors * 3:
        read_all(held, tensor, (0,) * (len(tensor.shape) - 2), (0, 8), 32)

    rows = sum(high - low for _, (*_, (low, high), _) in source.reads)
    assert rows == sum(tensor.shape[-2] for tensor in tensors)


def test_threads_share_the_reading_and_none_sees_what_is_not_there_yet():
    source = Arrays(stored("int8"))
    tensor = source.storage.weight(SPECS["layers.0.moe.down"])
    held, barrier = HeldMatrices(source, 10**6), Barrier(4)

    def part(place):
        barrier.wait()
        return read_all(held, tensor, (1,), (8 * place, 8 * place + 8), 32)

    for _ in range(20):
        source.reads.clear()
        held = HeldMatrices(source, 10**6)
        with ThreadPoolExecutor(4) as pool:
            found = np.concatenate(list(pool.map(part, range(4))), axis=1)
        np.testing.assert_array_equal(found, source.arrays[tensor.key][1][:, :32])
        assert sum(high - low for _, (*_, (low, high), _) in source.reads) == tensor.shape[-2]


def test_damage_that_one_thread_finds_ends_those_that_wait():
    source = Arrays(stored("int8"))
    tensor = source.storage.weight(QUERY)
    held, is_read, go_on = HeldMatrices(source, 10**6), Event(), Event()
    real = source.read

    def fail(*_):
        is_read.set()
        assert go_on.wait(10)
        raise corrupt("x", Reason.ALTERED, "changed")

    source.read = fail
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read_all, held, tensor, (), (0, 8), 8)
        assert is_read.wait(10)
        source.read = real
        second = pool.submit(read_all, held, tensor, (), (8, 16), 8)
        go_on.set()
        for one in (first, second):
            with pytest.raises(CorruptCheckpointError):
                one.result(10)


def test_nobody_can_change_what_others_read():
    source = Arrays(stored("int8"))
    tensor = source.storage.weight(QUERY)

    with HeldMatrices(source, 10**6).reading(tensor, (), (0, 8)) as read:
        assert not read(0, 8).flags.writeable


@pytest.mark.parametrize(
    ("own", "kind"),
    [
        *(("int8", kind) for kind in ("Q8_0", "Q4_0", "BF16", "F32")),
        *(("int4", kind) for kind in ("Q4_0", "BF16")),
        *(("float32", kind) for kind in ("Q4_0", "BF16", "F32")),
        ("bf16", "BF16"),
    ],
)
def test_pieces_are_the_same_out_of_held_matrices(own, kind):
    target = {"F32": "float32", "BF16": "bf16", "Q8_0": "int8", "Q4_0": "int4"}[kind]
    source = Arrays(stored(own))
    held = HeldMatrices(source, 10**6)
    for spec in WEIGHTS:
        part = ExportTensor(name="x", tensor=stored(target).weight(spec), type=TensorType[kind])
        for piece in part.pieces(0, padding=0, limit=3000):
            plain, other = np.empty((2, piece.nbytes), np.uint8)
            one, two = piece.make(source, plain).squares, piece.make(held, other).squares
            assert [one.error, one.total] == pytest.approx([two.error, two.total], rel=1e-5)
            np.testing.assert_array_equal(plain, other)
