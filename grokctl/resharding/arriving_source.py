"""A release whose files are still arriving, as a source of tensors that waits for them."""

from collections.abc import Callable
from pathlib import Path

from grokctl.checkpoint.pickle_objects import ArrayRef
from grokctl.checkpoint.pickle_writer import Hole
from grokctl.checkpoint.release import Release
from grokctl.checkpoint.release_files import released_payloads
from grokctl.checkpoint.stored_tensor import StoredTensor
from grokctl.checkpoint.structure import locate
from grokctl.checkpoint.tensor_source import ReleaseSource
from grokctl.model.config import GrokConfig
from grokctl.model.tensors import tensor_specs
from grokctl.paths import CKPT


class OtherScalesError(Exception):
    """A tensor has another number of scale groups than those of Grok-1."""


def expected_release(root: Path, config: GrokConfig) -> Release:
    """A release as it will be: where the arrays are in their files is not known yet."""
    tensors = []
    for spec in tensor_specs(config):
        weight, scales = released_payloads(spec)
        tensors.append(
            StoredTensor(
                spec=spec,
                path=root / CKPT / spec.file,
                weight=_nowhere(weight),
                scales=None if scales is None else _nowhere(scales),
            )
        )
    return Release(root=root, config=config, tensors=tuple(tensors))


def _nowhere(hole: Hole) -> ArrayRef:
    return ArrayRef(offset=0, shape=hole.shape, dtype=hole.dtype)


class ArrivingSource(ReleaseSource):
    """Reads a file once it is proven, and its structure is sound."""

    def __init__(self, release: Release, await_proof: Callable[[str], None]) -> None:
        """Wait for nothing yet.

        Args:
            release: From `expected_release`.
            await_proof: Returns once a file, by its path in the release, is proven.
        """
        super().__init__(release)
        self._await_proof = await_proof
        self._located: dict[str, StoredTensor] = {}

    def stored(self, name: str) -> StoredTensor:
        """A parameter, by its name; waits for its file.

        Raises:
            OtherScalesError: It has another number of scale groups than was planned for.
            CorruptCheckpointError: It does not have the structure of its tensor.
        """
        found = self._located.get(name)
        if found is None:
            spec = super().stored(name).spec
            self._await_proof(f"{CKPT}/{spec.file}")
            found = locate(self.release.root, spec)
            if found.scales is not None and found.scales.shape != spec.scales_shape:
                raise OtherScalesError(name)
            self._located[name] = found
        return found
