"""Weights of a run whose experts do not all fit: those that every token reads, and some experts."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import jax

from grokctl.checkpoint.layout import DeviceTensor
from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.checkpoint.tensor_source import extent
from grokctl.errors import HardwareError
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started
from grokctl.inference.expert_buffers import Buffer, Part
from grokctl.inference.expert_reader import ExpertReader, Reading
from grokctl.inference.expert_stream import ExpertFile, ExpertStream
from grokctl.inference.loading import Loader, matrix_in, stored_type, tree
from grokctl.inference.plan import EngineOptions
from grokctl.machine.memory import limited, memory
from grokctl.model.parameters import Experts, Parameters, build_experts
from grokctl.model.sizing import Needs
from grokctl.model.tensors import Axis
from grokctl.planning.residence import Residence, place

_AT_A_TIME: Final = 4
"""Arrays, or experts, that are read at the same time while weights are loaded."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The weights of a run."""

    parameters: Parameters
    """Without experts, if these are streamed."""
    stream: ExpertStream | None = None
    """The way in for experts, if memory does not hold all."""


def residence_of(loader: Loader, needed: Needs, options: EngineOptions) -> Residence | None:
    """Which experts stay in memory; None if all weights do, or lie where nothing is streamed from.

    Args:
        loader: Of the run.
        needed: What a device of it needs.
        options: Of the run.

    Raises:
        HardwareError: Memory is too small even for a run that streams experts.
    """
    if not is_streamable(loader):
        return None
    residence = place(
        loader.source.config,
        needed,
        experts=loader.expert_nbytes,
        memory=limited(memory().usable, options.max_memory),
        counts=options.counts,
    )
    if residence is not None and residence.missing:
        raise HardwareError(f"this checkpoint takes {residence.shortage}", "grokctl doctor")
    return residence


def is_streamable(loader: Loader) -> bool:
    """Whether experts can be read from a file: of one device, a CPU's, and not compressed."""
    source = loader.source
    return (
        [device.platform for device in loader.devices] == ["cpu"]
        and isinstance(source, ReadyCheckpoint)
        and source.mesh == loader.mesh
        and source.is_mapped
    )


def note_mapped(loader: Loader, options: EngineOptions, *, observe: Observer) -> None:
    """Note that `--max-memory` limits nothing where the files of several devices are mapped."""
    is_cpu = loader.devices[0].platform == "cpu"
    if is_cpu and options.max_memory is not None and len(loader.devices) > 1:
        what = f"has no effect on the {len(loader.devices)} devices of {loader.mesh}"
        why = "experts are streamed for one device (grokctl reshard --devices 1)"
        observe(Noted(message=f"--max-memory: {what}: {why}"))


def load_streamed(loader: Loader, residence: Residence, *, observe: Observer) -> Loaded:
    """Read what stays in memory, and take memory for what passes through.

    Args:
        loader: Of the run; `is_streamable`.
        residence: Which experts stay.
        observe: Receives progress in bytes.

    Raises:
        CorruptCheckpointError: The file differs from the manifest.
        HardwareError: The disk fails.
    """
    source = loader.source
    assert isinstance(source, ReadyCheckpoint)
    source.check_header(0)
    with source.blaming(0):
        reader = ExpertReader(source.root / source.manifest.record_of(0).name)
    weights = _Weights(loader, source)
    file = ExpertFile(source, reader, weights.expert, weights.experts_of)
    staying = residence.kept
    total = residence.dense + len(staying) * residence.expert_nbytes
    observe(Started(stage=Stage.LOAD, total=total))
    began = time.perf_counter()
    done = 0

    def read(wanted: Sequence[Sequence[Part]]) -> Iterator[Buffer]:
        """Read each of several groups of parts into a buffer of its own, in order."""
        nonlocal done
        under_way: deque[tuple[Buffer, Reading]] = deque()
        to_ask = deque(wanted)
        for parts in wanted:
            while to_ask and len(under_way) < _AT_A_TIME:
                buffer = Buffer(to_ask[0])
                under_way.append((buffer, file.ask(buffer, to_ask.popleft())))
            buffer, reading = under_way.popleft()
            file.wait(reading)
            done += sum(part.nbytes for part in parts)
            observe(Advanced(stage=Stage.LOAD, done=done, detail=parts[0].key))
            yield buffer

    dense = [(part,) for part in weights.dense]
    arrays = {
        parts[0].key: weights.array(buffer, parts)[0]
        for parts, buffer in zip(dense, read(dense), strict=True)
    }
    experts = [weights.expert(*key) for key in staying]
    pinned = {
        key: weights.experts_of(buffer, parts)
        for key, parts, buffer in zip(staying, experts, read(experts), strict=True)
    }
    seconds = time.perf_counter() - began
    buffers = [Buffer(weights.expert(0, 0)) for _ in range(residence.transient)]
    observe(Finished(stage=Stage.LOAD))
    stream = ExpertStream(
        file,
        residence,
        pinned=pinned,
        buffers=buffers,
        load_rate=reader.nbytes / seconds,
        observe=observe,
    )
    observe(Noted(message=stream.words))
    return Loaded(tree(residence.config, arrays, has_experts=False), stream)


class _Weights:
    """Where the only device file of a checkpoint has what, and what it becomes on the device."""

    def __init__(self, loader: Loader, source: ReadyCheckpoint) -> None:
        self._loader = loader
        layers: dict[int, list[DeviceTensor]] = {}
        dense = []
        for entry in source.layouts[0].tensors:
            spec = entry.tensor.spec
            if Axis.EXPERTS in spec.axes and spec.layer is not None:
                layers.setdefault(spec.layer, []).append(entry)
            else:
                dense.append(entry)
        self.dense = [_part(entry, entry.offset, extent(entry.slices)) for entry in dense]
        """Weights that every token reads."""
        # by name, so that the sizes of all experts are in the same order
        self._layers = {
            layer: sorted(entries, key=lambda entry: entry.tensor.key)
            for layer, entries in layers.items()
        }

    def expert(self, layer: int, number: int) -> list[Part]:
        """The arrays of one expert, each a stack of one."""
        parts = []
        for entry in self._layers[layer]:
            offset, _ = entry.one_of(number)
            parts.append(_part(entry, offset, (1, *extent(entry.slices)[1:])))
        return parts

    def array(self, buffer: Buffer, parts: Sequence[Part]) -> list[jax.Array]:
        """What lies in a buffer, as arrays of the device."""
        (device,) = self._loader.local_devices
        views = buffer.arrays(parts)
        return [self._loader.global_array([jax.device_put(view, device)]) for view in views]

    def experts_of(self, buffer: Buffer, parts: Sequence[Part]) -> Experts:
        """The expert that lies in a buffer."""
        keys = [part.key for part in parts]
        arrays = dict(zip(keys, self.array(buffer, parts), strict=True))
        prefix, _, _ = keys[0].partition(".moe.")
        return build_experts(prefix, matrix_in(arrays))


def _part(entry: DeviceTensor, offset: int, shape: tuple[int, ...]) -> Part:
    """A part of the file; its array has an axis of devices before the others."""
    dtype = stored_type(entry.tensor.dtype)
    return Part(key=entry.tensor.key, offset=offset, shape=(1, *shape), dtype=dtype)
