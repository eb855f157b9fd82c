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

from grokctl.checkpoint.logical import LogicalTensor, TensorSource, extent, logical_tensors
from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.errors import HardwareError
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
        """
        tensors = logical_tensors(self.source)
        cuts = {
            tensor.key: [
                tensor.slices(self.mesh, device, self.source.config)
                for device in range(self.mesh.size)
            ]
            for tensor in tensors
        }
        total = sum(
            math.prod(extent(slices)) * tensor.dtype.itemsize
            for tensor in tensors
            for slices in cuts[tensor.key]
        )
        if not self._is_mapped():
            check_memory(total, purpose="cutting this checkpoint in memory")
        arrays: dict[tuple[str, int | None], tuple[jax.Array, ...]] = {}
        observe(Started(stage=Stage.LOAD, total=total))
        with ThreadPoolExecutor(min(len(self.devices), 8)) as pool:
            for tensor in tensors:
                read = partial(self.source.read, tensor)
                local = list(pool.map(read, cuts[tensor.key]))
                for expert, own in self._experts(tensor, local):
                    arrays[tensor.key, expert] = self._groups(tensor, own)
                self.nbytes += sum(array.nbytes for array in local)
                observe(Advanced(stage=Stage.LOAD, done=self.nbytes, detail=tensor.key))
        jax.block_until_ready(list(arrays.values()))
        observe(Finished(stage=Stage.LOAD))

        def matrix(name: str, expert: int | None) -> Matrix:
            scales = arrays.get((f"{name}.scales", expert))
            return Matrix(arrays[f"{name}.weight", expert], scales[0] if scales else None)

        return build_parameters(self.source.config, self.mesh, matrix)

    def _is_mapped(self) -> bool:
        """Whether the weights stay in the page cache instead of taking memory of their own."""
        on_cpu = self.devices[0].platform == "cpu"
        is_ready = isinstance(self.source, ReadyCheckpoint) and self.source.mesh == self.mesh
        return is_ready or not on_cpu

    def _experts(
        self, tensor: LogicalTensor, local: list[NDArray[Any]]
    ) -> Iterator[tuple[int | None, list[NDArray[Any]]]]:
        """Every expert of a tensor apart: what each device holds of it."""
        if Axis.EXPERTS not in tensor.spec.axes:
            yield None, local
            return
        self.expert_nbytes += sum(array.nbytes for array in local)
        for expert in range(local[0].shape[0]):
            yield expert, [array[expert] for array in local]

    def _groups(self, tensor: LogicalTensor, local: list[NDArray[Any]]) -> tuple[jax.Array, ...]:
        """Every scale group of a weight apart; scales and float32 tensors are one array."""
        if tensor.is_scales or not tensor.groups:
            return (self._array(local),)
        return tuple(
            self._array([array[group] for array in local]) for group in range(local[0].shape[0])
        )

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
