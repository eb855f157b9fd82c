"""One parameter of a release and its file, read as mapped views."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.pickle_objects import ArrayRef
from grokctl.checkpoint.release_files import map_file
from grokctl.checkpoint.rows import Rows, opened
from grokctl.errors import GrokctlError, Reason, corrupt
from grokctl.model.tensors import TensorSpec
from grokctl.os_errors import is_absence, located, refusal
from grokctl.paths import CKPT


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One parameter and its file; holds no data and no open file."""

    spec: TensorSpec
    path: Path
    weight: ArrayRef
    """float32 or int8 `(*lead, inputs, outputs)`."""
    scales: ArrayRef | None
    """bfloat16 `(*lead, groups, outputs)`."""

    def map(self) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Map the file and return its weight and scales as read-only views.

        Nothing is copied, and pages are read on first use; the mapping lives as long as the views.
        Payloads begin at odd offsets, so the views may be unaligned.
        """
        name = f"{CKPT}/{self.spec.file}"
        try:
            mapped = map_file(self.path)
            weight = _view(mapped, self.weight)
            return weight, None if self.scales is None else _view(mapped, self.scales)
        except OSError as error:
            raise self._changed(error) from error
        except ValueError as error:
            raise corrupt(name, Reason.ALTERED, "changed since it was opened") from error

    @contextmanager
    def opened(self) -> Iterator[Rows]:
        """Open the file to read rows of its weight; all axes except the last are one.

        Raises:
            CorruptCheckpointError: The file changed since it was scanned.
        """
        try:
            with opened(self.path, self.weight) as rows:
                yield rows
        except OSError as error:
            raise self._changed(error) from error

    def _changed(self, error: OSError) -> GrokctlError:
        """The file that was scanned is gone or short now, or the machine refuses to read it."""
        if not is_absence(error):
            return refusal(located(error, self.path))
        name = f"{CKPT}/{self.spec.file}"
        return corrupt(name, Reason.ALTERED, "changed since it was opened")


def _view(mapped: mmap.mmap, ref: ArrayRef) -> NDArray[Any]:
    count = ref.nbytes // ref.dtype.itemsize
    flat: NDArray[Any] = np.frombuffer(mapped, dtype=ref.dtype, count=count, offset=ref.offset)
    return flat.reshape(ref.shape)
