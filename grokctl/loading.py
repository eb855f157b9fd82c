"""Weights from a checkpoint onto devices."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from grokctl.checkpoint.logical import Slices, TensorSource, extent
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.errors import HardwareError, PlacementError
from grokctl.events import Advanced, Finished, Observer, Stage, Started
from grokctl.hardware import check_memory
from grokctl.model.forward import EXPERT_AXIS, MODEL_AXIS
from grokctl.model.parameters import Matrix, Parameters, build_parameters
from grokctl.model.placement import MeshShape
from grokctl.model.tensors import Axis


class Loader:
    """Cuts tensors for every device and hands them over; one global array a tensor."""

    def __init__(
        self, source: TensorSource, mesh: MeshShape, devices: Sequence[jax.Device]
    ) -> None:
        self.source = source
        self.mesh = mesh
        self.devices = list(devices)
        grid = np.array(self.devices).reshape(mesh.expert, mesh.model)
        self.jax_mesh = Mesh(
            grid, (EXPERT_AXIS, MODEL_AXIS), axis_types=(AxisType.Auto, AxisType.Auto)
        )
        # Every leaf has a leading device axis: devices may hold equal slices (shared key heads,
        # shared scale rows), which no sharding of the logical tensor expresses.
        self.per_device = PartitionSpec((EXPERT_AXIS, MODEL_AXIS))
        self.sharding = NamedSharding(self.jax_mesh, self.per_device)
        self.nbytes = 0
        self.expert_nbytes = 0

    def load(self, observe: Observer) -> Parameters:
        """Hand every tensor to every device.

        Raises:
            HardwareError: There is not enough memory.
            UsageError: The checkpoint is only one host's part.
            PlacementError: The mesh would cut int4 groups.
        """
        if isinstance(self.source, ReadyCheckpoint):
            self.source.check_whole()
        tensors = self.source.storage.tensors
        cuts = self._cuts()
        total = sum(
            math.prod(extent(slices)) * tensor.dtype.itemsize
            for tensor in tensors
            for slices in cuts[tensor.key]
        )
        if not self._is_mapped():
            check_memory(total, purpose="cutting this checkpoint in memory")
        arrays: dict[str, jax.Array] = {}
        observe(Started(stage=Stage.LOAD, total=total))
        with ThreadPoolExecutor(min(len(self.devices), 8)) as pool:
            for tensor in tensors:
                read = partial(self.source.read, tensor)
                local = list(pool.map(read, cuts[tensor.key]))
                arrays[tensor.key] = self._array([_storable(array) for array in local])
                nbytes = sum(array.nbytes for array in local)
                self.nbytes += nbytes
                if Axis.EXPERTS in tensor.spec.axes:
                    self.expert_nbytes += nbytes
                observe(Advanced(stage=Stage.LOAD, done=self.nbytes, detail=tensor.key))
        jax.block_until_ready(list(arrays.values()))
        observe(Finished(stage=Stage.LOAD))

        return build_parameters(
            self.source.config,
            lambda name: Matrix(arrays[f"{name}.weight"], arrays.get(f"{name}.scales")),
        )

    def _cuts(self) -> dict[str, list[Slices]]:
        """What each device gets of each tensor.

        Raises:
            PlacementError: The mesh would cut int4 groups.
        """
        try:
            return {
                tensor.key: [
                    tensor.slices(self.mesh, device, self.source.config)
                    for device in range(self.mesh.size)
                ]
                for tensor in self.source.storage.tensors
            }
        except PlacementError as error:
            if not isinstance(self.source, ReadyCheckpoint):
                raise
            raise PlacementError(str(error), f"--mesh {self.source.mesh}") from error

    def _is_mapped(self) -> bool:
        """Whether the weights stay in the page cache instead of taking memory of their own."""
        if self.devices[0].platform != "cpu":
            return True
        if not isinstance(self.source, ReadyCheckpoint):
            return False
        return self.source.is_mapped and self.source.mesh == self.mesh

    def _array(self, local: list[NDArray[Any]]) -> jax.Array:
        parts = [
            jax.device_put(array[None], device)
            for array, device in zip(local, self.devices, strict=True)
        ]
        shape = (len(parts), *local[0].shape)
        return jax.make_array_from_single_device_arrays(shape, self.sharding, parts)

    def zeros(self, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        """An array of zeros on every device."""
        return self._array([np.zeros(shape, dtype) for _ in self.devices])

    def bytes_per_token(self) -> int:
        """Weights that decoding one token reads, on all devices together."""
        config = self.source.config
        experts = self.expert_nbytes * config.num_selected_experts // config.num_experts
        return self.nbytes - self.expert_nbytes + experts


def _storable(array: NDArray[Any]) -> NDArray[Any]:
    """The same bytes as `Matrix` has them."""
    return array.view(np.uint16) if array.dtype == BFLOAT16 else array


@contextmanager
def out_of_memory() -> Iterator[None]:
    """Translate XLA's out-of-memory error."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0]
        raise HardwareError(
            f"device memory is full ({first})", "a larger mesh, or a shorter --context"
        ) from error
