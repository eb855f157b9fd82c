"""GGUF headers: what is written is read, and a stranger's bytes end in a sentence."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokctl.checkpoint.gguf import (
    ALIGNMENT,
    GgufTensor,
    TensorType,
    gguf_header,
    read_gguf,
)
from grokctl.errors import CorruptCheckpointError, Reason

METADATA = {
    "general.architecture": "grok",
    "a.u32": np.uint32(7),
    "a.u16": np.uint16(3),
    "a.i32": np.int32(-7),
    "a.f32": np.float32(0.1),
    "a.bool": np.bool_(True),
    "a.texts": ("", "é", "▁a"),
    "a.floats": np.array([1, -2.5], "<f4"),
    "a.empty": np.array([], "<i4"),
}
TENSORS = (
    GgufTensor("one", TensorType.F32, (3,)),
    GgufTensor("two", TensorType.Q8_0, (2, 5, 64)),
    GgufTensor("three", TensorType.BF16, (1, 1)),
)


def written(path, metadata=METADATA, tensors=TENSORS, data=None):
    if data is None:
        data = bytes(sum(tensor.padded_nbytes for tensor in tensors))
    path.write_bytes(gguf_header(metadata, tensors) + data)
    return path


def test_what_is_written_is_read(tmp_path):
    found = read_gguf(written(tmp_path / "x.gguf"))

    assert found.tensors == TENSORS
    assert found.metadata.keys() == METADATA.keys()
    for key, value in METADATA.items():
        other = found.metadata[key]
        assert getattr(other, "dtype", type(other)) == getattr(value, "dtype", type(value)), key
        np.testing.assert_array_equal(other, value)
    header = len(gguf_header(METADATA, TENSORS))
    assert found.offsets == (header, header + 32, header + 32 + 704)
    assert found.nbytes == (tmp_path / "x.gguf").stat().st_size


def test_the_bytes_are_those_of_the_format():
    data = gguf_header({"k": np.uint32(5)}, [GgufTensor("t", TensorType.Q8_0, (2, 32))])

    expected = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    expected += struct.pack("<Q", 1) + b"k" + struct.pack("<II", 4, 5)
    expected += struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 32, 2, 8, 0)
    assert data == expected.ljust(ALIGNMENT * 3, b"\0")


def refusal(path) -> str:
    with pytest.raises(CorruptCheckpointError) as caught:
        read_gguf(path)
    (damage,) = caught.value.damage
    assert (damage.file, damage.reason) == (path.name, Reason.MALFORMED)
    return damage.detail


def edited(tmp_path, old: bytes, new: bytes, *, count=1):
    path = written(tmp_path / "x.gguf")
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, count))
    return path


def test_a_file_of_another_kind_is_refused(tmp_path):
    assert "at its beginning" in refusal(edited(tmp_path, b"GGUF", b"PK\3\4"))


def test_another_version_is_refused(tmp_path):
    old, new = (b"GGUF" + struct.pack("<I", version) for version in (3, 2))
    assert refusal(edited(tmp_path, old, new)) == "expected GGUF version 3, found 2"


@pytest.mark.parametrize("size", [2**63, 2**40, 10**8])
@pytest.mark.parametrize("place", [8, 16, 24])
def test_sizes_that_no_file_has_cost_nothing(tmp_path, size, place):
    path = written(tmp_path / "x.gguf")
    data = bytearray(path.read_bytes())
    data[place : place + 8] = struct.pack("<Q", size)
    path.write_bytes(data)

    assert refusal(path)


def test_an_array_of_so_many_texts_is_refused(tmp_path):
    old = struct.pack("<IIQ", 9, 8, 3)
    assert "texts" in refusal(edited(tmp_path, old, struct.pack("<IIQ", 9, 8, 2**21)))


def test_nested_arrays_are_refused(tmp_path):
    old = struct.pack("<IIQ", 9, 6, 2)
    assert "type 9" in refusal(edited(tmp_path, old, struct.pack("<IIQ", 9, 9, 2)))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    assert "UTF-8" in refusal(edited(tmp_path, "é".encode(), b"\xff\xff"))


def test_a_boolean_is_0_or_1(tmp_path):
    old = b"a.bool" + struct.pack("<I", 7)
    assert "boolean" in refusal(edited(tmp_path, old + b"\1", old + b"\2"))


def test_two_values_or_tensors_of_one_name_are_refused(tmp_path):
    assert "twice" in refusal(edited(tmp_path, b"a.u16", b"a.u32"))
    assert "twice" in refusal(edited(tmp_path, b"two", b"one"))


@pytest.mark.parametrize("number", [1, 9, 12, 29, 31, 2**31])
def test_types_of_tensors_that_we_do_not_write_are_refused(tmp_path, number):
    old, new = (b"one" + struct.pack("<IQI", 1, 3, kind) for kind in (0, number))
    assert f"found type {number}" in refusal(edited(tmp_path, old, new))


def test_blocks_do_not_cross_rows(tmp_path):
    old = struct.pack("<IQQQ", 3, 64, 5, 2)
    assert "shape" in refusal(edited(tmp_path, old, struct.pack("<IQQQ", 3, 16, 20, 2)))


@pytest.mark.parametrize("axes", [0, 5, 2**31])
def test_a_tensor_has_one_to_four_axes(tmp_path, axes):
    old = struct.pack("<IQQQ", 3, 64, 5, 2)
    assert "axes" in refusal(edited(tmp_path, old, struct.pack("<IQQQ", axes, 64, 5, 2)))


def test_tensors_follow_each_other_without_holes(tmp_path):
    old = struct.pack("<IQ", TensorType.Q8_0, 32)
    new = struct.pack("<IQ", TensorType.Q8_0, 64)
    assert refusal(edited(tmp_path, old, new)) == "two: expected offset 32, found 64"


@pytest.mark.parametrize("change", [-1, 1, -40])
def test_the_data_end_where_the_file_ends(tmp_path, change):
    path = written(tmp_path / "x.gguf")
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))

    assert "bytes, found" in refusal(path)


@pytest.mark.parametrize("value", [np.uint32(64), "32", np.array([32, 32], "<u4"), ("a",)])
def test_another_alignment_is_refused(tmp_path, value):
    metadata = {"general.alignment": value}
    assert "alignment" in refusal(written(tmp_path / "x.gguf", metadata))


@given(st.data())
def test_any_damage_to_a_header_ends_in_a_sentence(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "x.gguf"
    content = bytearray(gguf_header(METADATA, TENSORS))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])

    with pytest.raises(CorruptCheckpointError):
        read_gguf(path)
