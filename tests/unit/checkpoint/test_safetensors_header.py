"""Headers of safetensors files: what the reference library writes is read, damage is a sentence."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from grokctl.checkpoint.safetensors_header import HeaderTensor, read_safetensors
from grokctl.errors import CorruptCheckpointError


def written(path):
    arrays = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.int8)}
    save_file(arrays, path, metadata={"format": "pt"})
    return path


def test_a_file_of_the_reference_library_is_read(tmp_path):
    found = read_safetensors(written(tmp_path / "x.safetensors"))

    assert set(found) == {HeaderTensor("a", "F32", (2, 3), 24), HeaderTensor("b", "I8", (5,), 5)}


def with_header(path, values) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    "values",
    [
        b"",
        b"[]",
        b"[" * 10**5,
        b"\xff",
        {"a": {}},
        {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}},
        {"a": {"dtype": "F32", "shape": [29], "data_offsets": [0, 29]}},
        {"a": {"dtype": "X", "shape": [29], "data_offsets": [0, 29]}},
        {"a": {"dtype": "I8", "shape": [-29], "data_offsets": [0, 29]}},
        {"a": {"dtype": "I8", "shape": [1] * 9 + [29], "data_offsets": [0, 29]}},
        {"a": {"dtype": "I8", "shape": [28], "data_offsets": [1, 29]}},
        {"a": {"dtype": "I8", "shape": [29], "data_offsets": [0, 29.0]}},
    ],
)
def test_other_headers_are_refused(tmp_path, values):
    path = written(tmp_path / "x.safetensors")
    with_header(path, values)

    with pytest.raises(CorruptCheckpointError, match=r"x\.safetensors"):
        read_safetensors(path)


@pytest.mark.parametrize("length", [2**63, 2**30, 10**4])
def test_a_header_longer_than_the_file_costs_nothing(tmp_path, length):
    path = written(tmp_path / "x.safetensors")
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])

    with pytest.raises(CorruptCheckpointError, match="no safetensors file"):
        read_safetensors(path)


@given(st.data())
def test_any_damage_to_a_header_ends_in_a_sentence_or_in_tensors(tmp_path_factory, data):
    path = written(tmp_path_factory.mktemp("damaged") / "x.safetensors")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 30))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)

    try:
        found = read_safetensors(path)
    except CorruptCheckpointError:
        return
    assert sum(tensor.nbytes for tensor in found) == 29
