"""Which tensors a file has, and where they end."""

import pytest
from models import TINY

from grokctl.checkpoint.gguf import TensorType
from grokctl.checkpoint.storage import released_storage
from grokctl.errors import InvalidValueError
from grokctl.exporting.files import ExportFile, distributed
from grokctl.exporting.tensors import ExportTensor
from grokctl.model.tensors import tensor_specs

STORAGE = released_storage(TINY)
NORM = next(spec for spec in tensor_specs(TINY) if spec.name == "final_norm")
TENSORS = [
    ExportTensor(name=name, tensor=STORAGE.weight(NORM), type=TensorType.F32) for name in "abcde"
]
SIZE = 4 * TINY.emb_size


@pytest.mark.parametrize(
    ("split", "counts"),
    [(None, [5]), (SIZE, [1] * 5), (2 * SIZE - 1, [1] * 5), (2 * SIZE, [2, 2, 1]), (9**9, [5])],
)
def test_files_are_filled_as_far_as_they_may_be(split, counts):
    found = distributed(TENSORS, lambda tensor: tensor.nbytes, split)

    assert [len(part) for part in found] == counts
    assert [tensor for part in found for tensor in part] == TENSORS


def test_a_tensor_is_never_divided():
    with pytest.raises(InvalidValueError, match="the size of a"):
        distributed(TENSORS, lambda tensor: tensor.nbytes, SIZE - 1)


def test_tensors_of_other_files_take_no_room():
    file = ExportFile(number=0, name="x", header=b"1234", sizes=(0, 10, 0, 20, 0))

    assert (file.ends, file.nbytes) == ((4, 14, 14, 34, 34), 34)
