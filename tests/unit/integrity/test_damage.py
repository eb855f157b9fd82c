from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokctl.checkpoint import pickle_writer
from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.release_files import file_nbytes, released_payloads, scan_file
from grokctl.integrity.damage import known_bytes, merged
from grokctl.model.config import GROK_1
from grokctl.model.tensors import tensor_specs

SMALL = replace(MINIATURE, num_layers=1, vocab_size=512, emb_size=64, num_q_heads=4, num_kv_heads=2)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("release") / "small"
    write_miniature(root, SMALL, tokenizer=False)
    return root


@pytest.mark.parametrize("spec", tensor_specs(SMALL), ids=lambda spec: spec.name)
def test_the_known_bytes_of_a_file_are_all_that_is_no_array(release, spec):
    name = f"ckpt-0/{spec.file}"
    content = (release / name).read_bytes()
    tensor = scan_file(release, name)

    known = known_bytes(spec, len(content))

    assert all(content[offset : offset + len(data)] == data for offset, data in known)
    arrays = [ref for ref in (tensor.weight, tensor.scales) if ref is not None]
    parts = [(offset, offset + len(data)) for offset, data in known]
    parts += [(ref.offset, ref.offset + ref.nbytes) for ref in arrays]
    assert list(merged(sorted(parts))) == [(0, len(content))]
    assert sum(high - low for low, high in parts) == len(content)


@pytest.mark.parametrize("groups", [1, 2, 8, 16, 32])
def test_the_number_of_scale_groups_is_told_by_the_size(tmp_path, groups):
    spec = next(spec for spec in tensor_specs(SMALL) if spec.is_quantized)
    *lead, inputs, outputs = spec.shape
    assert inputs % groups == 0
    path = tmp_path / "tensor"
    weight = np.ones(spec.shape, np.int8)
    scales = np.ones((*lead, groups, outputs), ml_dtypes.bfloat16)
    with path.open("wb") as file:
        pickle_writer.write(file, weight, scales)
    content = path.read_bytes()

    known = known_bytes(spec, len(content))

    assert known
    assert all(content[offset : offset + len(data)] == data for offset, data in known)
    assert content[-1:] == known[-1][1][-1:]


def test_a_size_that_no_file_of_a_tensor_has_tells_nothing():
    for spec in tensor_specs(SMALL):
        assert known_bytes(spec, file_nbytes(spec) + 1) == ()
        assert known_bytes(spec, 1) == ()


def test_the_structure_of_grok_1_is_a_few_hundred_bytes_a_file():
    for spec in tensor_specs(GROK_1)[:14]:
        size = file_nbytes(spec)
        payload = sum(
            np.prod(hole.shape) * hole.dtype.itemsize
            for hole in released_payloads(spec)
            if hole is not None
        )

        known = known_bytes(spec, size)

        assert sum(len(data) for _, data in known) == size - payload < 1000


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=20))
def test_merged_ranges_cover_the_same_and_do_not_touch(parts):
    ranges = sorted((low, low + length) for low, length in parts)

    joined = list(merged(ranges))

    assert {n for low, high in joined for n in range(low, high)} == {
        n for low, high in ranges for n in range(low, high)
    }
    assert all(a[1] < b[0] for a, b in pairwise(joined))
