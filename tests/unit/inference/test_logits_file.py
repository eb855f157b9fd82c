"""Logits are written whole, or not at all."""

import numpy as np
import pytest

from grokctl.errors import UsageError
from grokctl.inference.logits_file import logits_file

SHAPE = (3, 5)


def test_a_file_gets_its_name_when_it_is_complete(tmp_path):
    path = tmp_path / "logits.npy"

    with logits_file(path, SHAPE) as out:
        out[:] = np.arange(15).reshape(SHAPE)
        assert not path.exists()

    assert np.array_equal(np.load(path), np.arange(15, dtype=np.float32).reshape(SHAPE))
    assert [file.name for file in tmp_path.iterdir()] == ["logits.npy"]


def test_a_failure_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "logits.npy"
    path.write_bytes(b"earlier")

    with pytest.raises(ZeroDivisionError), logits_file(path, SHAPE):
        raise ZeroDivisionError

    assert path.read_bytes() == b"earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["logits.npy"]


def test_without_a_path_there_is_no_array():
    with logits_file(None, SHAPE) as out:
        assert out is None


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is a folder") as caught, logits_file(tmp_path, SHAPE):
        pass

    assert caught.value.hint == "--logits logits.npy"
