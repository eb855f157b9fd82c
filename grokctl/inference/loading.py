"""Weights from a checkpoint onto devices."""

import mmap
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from queue import SimpleQueue
from threading import Event as Signal
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from grokctl.checkpoint.layout import DeviceTensor, DeviceWeights, device_weights
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.checkpoint.tensor_source import LogicalTensor, Slices, TensorSource, extent
from grokctl.errors import HardwareError, PlacementError
from grokctl.events import Advanced, Finished, Observer, Stage, Started
from grokctl.inference.memory_check import check_memory, note_paging
from grokctl.model.axes import EXPERT_AXIS, MODEL_AXIS
from grokctl.model.config import GrokConfig
from grokctl.model.parameters import Matrix, Parameters, build_parameters
from grokctl.model.placement import MeshShape

_Arrived = tuple[str, int]
"""A tensor's name, and its bytes on a device."""
_Parts = dict[str, list[jax.Array]]
"""Each device's array, by the name of the tensor."""
_READERS: Final = 8
"""Threads that read files at the same time, or one for each device, if there are more."""
_PART: Final = 2**24
"""Fewest bytes of a tensor that a thread reads."""


class Loader:
    """Cuts tensors for every device and hands them over; one global array for each tensor."""

    def __init__(
        self,
        source: TensorSource,
        mesh: MeshShape,
        devices: Sequence[jax.Device],
        *,
        is_streamed: bool | None = None,
    ) -> None:
        """Prepare to load.

        Args:
            source: The checkpoint.
            mesh: Decides each device's slices.
            devices: In the order of the mesh.
            is_streamed: Whether files are read, those cut for this mesh from beginning to end
                through two buffers, instead of taking their mapped pages as arrays. By default for
                accelerators, to which mapped pages travel slowly.

        Raises:
            PlacementError: The mesh cannot hold the model, or would cut int4 groups.
        """
        self.mesh = mesh
        self.devices = list(devices)
        own = jax.process_index()
        self.local = [n for n, each in enumerate(self.devices) if each.process_index == own]
        """Numbers of this process's devices; all, in a run of one process."""
        is_accelerated = self.devices[0].platform != "cpu"
        self._is_accelerated = is_accelerated
        self._is_streamed = is_accelerated if is_streamed is None else is_streamed
        if self._is_streamed and isinstance(source, ReadyCheckpoint):
            source = replace(source, is_streamed=True)  # for parts of files as well
        self.source = source
        grid = np.array(self.devices).reshape(mesh.expert, mesh.model)
        self.jax_mesh = Mesh(
            grid, (EXPERT_AXIS, MODEL_AXIS), axis_types=(AxisType.Auto, AxisType.Auto)
        )
        # Every leaf has a leading device axis: devices may hold equal slices (shared key heads,
        # shared scale rows), which no sharding of the logical tensor expresses.
        self.per_device = PartitionSpec((EXPERT_AXIS, MODEL_AXIS))
        self.sharding = NamedSharding(self.jax_mesh, self.per_device)
        self._zeros = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=self.sharding)
        shares = _shares(source, mesh)
        self.weights = max(share.nbytes for share in shares)
        """Bytes on the device with the most."""
        self.nbytes = sum(share.nbytes for share in shares)
        self.local_nbytes = sum(shares[number].nbytes for number in self.local)
        """Bytes on the devices of this process."""
        self.expert_nbytes = sum(share.experts for share in shares)
        self.bytes_per_token = sum(share.read for share in shares)
        """Weights that decoding one token reads, on all devices together."""

    @property
    def local_devices(self) -> list[jax.Device]:
        """The devices of this process."""
        return [self.devices[number] for number in self.local]

    @property
    def is_shared(self) -> bool:
        """Whether other processes have some of the devices."""
        return len(self.local) < len(self.devices)

    def load(self, observe: Observer, *, beside: int = 0) -> Parameters:
        """Hand every tensor to every device of this process.

        Args:
            observe: Receives progress in bytes.
            beside: Bytes of main memory for cache and workspace, on a CPU.

        Raises:
            HardwareError: Main memory is too small.
            UsageError: The checkpoint is only one host's part.
            CorruptCheckpointError: A file differs from the manifest.
        """
        own = self._own_files()
        if own is not None and self.is_shared:
            self.source = own = own.part(self.local)
        elif isinstance(self.source, ReadyCheckpoint):
            self.source.check_whole()
        cuts = self._cuts()
        if own is not None and self._is_streamed:
            buffers = sum(2 * _largest(own, device) for device in self.local)
            check_memory(buffers, purpose="reading this checkpoint")
        elif own is not None and own.is_mapped and not self._is_accelerated:
            note_paging(self.local_nbytes + beside, observe=observe)
        elif not self._is_accelerated:
            check_memory(self.local_nbytes + beside, purpose="cutting this checkpoint in memory")

        observe(Started(stage=Stage.LOAD, total=self.local_nbytes))
        if own is not None and self._is_streamed:
            parts = self._stream(own, observe)
        else:
            parts = self._cut(cuts, observe)
        arrays = {key: self.global_array(local) for key, local in parts.items()}
        observe(Finished(stage=Stage.LOAD))
        return tree(self.source.config, arrays)

    def _cuts(self) -> dict[str, list[Slices]]:
        """Slices of each tensor for the devices of this process."""
        return {
            tensor.key: [
                tensor.slices(self.mesh, device, self.source.config) for device in self.local
            ]
            for tensor in self.source.storage.tensors
        }

    def _own_files(self) -> ReadyCheckpoint | None:
        """The source, if it was cut for this mesh: then a file is its device's weights."""
        if isinstance(self.source, ReadyCheckpoint) and self.source.mesh == self.mesh:
            return self.source
        return None

    def _stream(self, source: ReadyCheckpoint, observe: Observer) -> _Parts:
        """Load the file of each device in a thread of its own."""
        arrived: SimpleQueue[_Arrived | None] = SimpleQueue()
        stop = Signal()
        readers = max(1, _READERS // len(self.local))
        with (
            ThreadPoolExecutor(len(self.local)) as pool,
            ThreadPoolExecutor(len(self.local) * readers) as reading,
        ):
            jobs = []
            for number in self.local:
                device = self.devices[number]
                file = _File(source, number, reading, readers)
                job = pool.submit(_read_file, file, device, arrived.put, stop)
                job.add_done_callback(lambda _: arrived.put(None))
                jobs.append(job)
            try:
                _follow(jobs, arrived, observe)
            finally:
                stop.set()
            files = [job.result() for job in jobs]
        return {key: [file[key] for file in files] for key in files[0]}

    def _cut(self, cuts: dict[str, list[Slices]], observe: Observer) -> _Parts:
        """Load one tensor after the other, each device's part in a thread of its own."""
        parts, done = {}, 0
        with ThreadPoolExecutor(min(len(self.local), 8)) as pool:
            for tensor in self.source.storage.tensors:
                hand_over = partial(self._hand_over, tensor)
                local = list(pool.map(hand_over, cuts[tensor.key], self.local_devices))
                parts[tensor.key] = local
                done += sum(array.nbytes for array in local)
                observe(Advanced(stage=Stage.LOAD, done=done, detail=tensor.key))
        return parts

    def _hand_over(self, tensor: LogicalTensor, slices: Slices, device: jax.Device) -> jax.Array:
        local = _storable(self.source.read(tensor, slices))
        array: jax.Array = jax.device_put(local[None], device)
        return array.block_until_ready()  # only one tensor waits in memory

    def global_array(self, parts: list[jax.Array]) -> jax.Array:
        """One array of the parts that the devices of this process have."""
        shape = (len(self.devices), *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self.sharding, parts)

    def zeros(self, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        """An array of zeros on every device."""
        # on the device: a program cannot take over an array from the host, and would copy it
        zeros: jax.Array = self._zeros((len(self.devices), *shape), dtype)
        return zeros

    def absent(self, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        """Shape and type of an array on every device, to compile programs without arrays."""
        shape = (len(self.devices), *shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding)

    def absent_parameters(self) -> Parameters:
        """Shapes and types of the parameters; no file is read."""
        storage, arrays = self.source.storage, {}
        for tensor in storage.tensors:
            shape = extent(tensor.slices(self.mesh, 0, storage.config))
            arrays[tensor.key] = self.absent(shape, stored_type(tensor.dtype))
        return tree(storage.config, arrays)


def _shares(source: TensorSource, mesh: MeshShape) -> tuple[DeviceWeights, ...]:
    """Each device's share of the weights.

    Raises:
        PlacementError: The mesh would cut int4 groups; the hint is a mesh that does not.
    """
    try:
        return device_weights(source.storage, mesh)
    except PlacementError as error:
        if not isinstance(source, ReadyCheckpoint):
            raise
        raise PlacementError(str(error), f"--mesh {source.mesh}") from error


@dataclass(frozen=True, slots=True)
class _File:
    """A device's file of a checkpoint that was cut for the mesh, and who reads it."""

    source: ReadyCheckpoint
    number: int
    """The device's number in the mesh."""
    pool: Executor
    readers: int
    """Threads that read parts of a large tensor at the same time: one does not keep a fast disk
    busy."""

    @property
    def tensors(self) -> Sequence[DeviceTensor]:
        return self.source.layouts[self.number].tensors

    def read_into(self, memory: NDArray[np.uint8], offset: int) -> None:
        """Fill memory with bytes of the file.

        Raises:
            CorruptCheckpointError: The file differs from the manifest.
        """
        is_plain = self.source.manifest.record_of(self.number).frames is None
        readers = min(self.readers, len(memory) // _PART) if is_plain else 1
        size = -(-len(memory) // max(1, readers))
        starts = range(0, len(memory), size) if readers > 1 else range(1)
        jobs = [
            self.pool.submit(
                self.source.read_into, memory[start : start + size], self.number, offset + start
            )
            for start in starts[1:]
        ]
        try:
            self.source.read_into(memory[:size], self.number, offset)
        finally:
            wait(jobs)
        for job in jobs:
            job.result()


def _read_file(
    file: _File,
    device: jax.Device,
    tell: Callable[[_Arrived], None],
    stop: Signal,
) -> dict[str, jax.Array]:
    """Hand a device its file: one tensor is read while the one before travels.

    Args:
        file: The file.
        device: Receives the tensors.
        tell: Called for every tensor that has been read.
        stop: Ends this before the next tensor.

    Raises:
        CorruptCheckpointError: The file differs from the manifest.
    """
    size = _largest(file.source, file.number)
    buffers = cycle([np.frombuffer(mmap.mmap(-1, size), np.uint8) for _ in range(2)])
    travelling: deque[jax.Array] = deque()
    arrays = {}
    following = [*file.tensors[1:], None]
    for entry, after, buffer in zip(file.tensors, following, buffers, strict=False):
        if stop.is_set():
            break
        if len(travelling) == 2:  # noqa: PLR2004 # as many as there are buffers
            travelling.popleft().block_until_ready()
        memory = buffer[: entry.nbytes]
        if after is not None:
            file.source.expect(file.number, after.offset, after.nbytes)
        file.read_into(memory, entry.offset)
        local = _storable(memory.view(entry.tensor.dtype).reshape(1, *extent(entry.slices)))
        if device.platform == "cpu":
            local = local.copy()  # JAX keeps aligned memory as it is, whatever may_alias says
        array = jax.device_put(local, device, may_alias=False)
        arrays[entry.tensor.key] = array
        travelling.append(array)
        tell((entry.tensor.key, entry.nbytes))
    jax.block_until_ready(list(travelling))
    return arrays


def _follow(
    jobs: list[Future[dict[str, jax.Array]]],
    arrived: "SimpleQueue[_Arrived | None]",
    observe: Observer,
) -> None:
    """Report the progress of jobs until all have ended or one has failed."""
    done, running = 0, len(jobs)
    while running:
        news = arrived.get()
        if news is not None:
            done += news[1]
            observe(Advanced(stage=Stage.LOAD, done=done, detail=news[0]))
            continue
        running -= 1
        if any(job.done() and job.exception() is not None for job in jobs):
            return


def _largest(source: ReadyCheckpoint, device: int) -> int:
    """Bytes of the largest tensor in a device's file."""
    return max(entry.nbytes for entry in source.layouts[device].tensors)


def _storable(array: NDArray[Any]) -> NDArray[Any]:
    """The same bytes, with the type that `Matrix` stores."""
    return array.view(stored_type(array.dtype))


def stored_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type that `Matrix` stores instead of another."""
    return np.dtype(np.uint16) if dtype == BFLOAT16 else dtype


def tree(config: GrokConfig, arrays: Mapping[str, Any], *, has_experts: bool = True) -> Parameters:
    """The parameters of arrays by the keys of their tensors."""
    return build_parameters(config, matrix_in(arrays), has_experts=has_experts)


def matrix_in(arrays: Mapping[str, Any]) -> Callable[[str], Matrix]:
    """What looks a parameter up among arrays by the keys of their tensors."""
    return lambda name: Matrix(arrays[f"{name}.weight"], arrays.get(f"{name}.scales"))


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
