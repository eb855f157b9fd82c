"""What this machine has: devices for a mesh, memory, and how fast memory can be read."""

import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Final, Protocol

import jax
import numpy as np
import psutil

from grokctl.errors import HardwareError
from grokctl.events import Noted, Observer, ignore
from grokctl.machine.facts import Accelerator
from grokctl.machine.host import bandwidth, cpu
from grokctl.machine.memory import memory
from grokctl.model.placement import MESH_SIZES
from grokctl.model.precision import Precision
from grokctl.model.sizing import MEMORY_SHARE, SHARE_VARIABLES, Needs, told_share

_PROBE_BYTES: Final = 2**28
_PROBE_ROUNDS: Final = 3
_PROBE_CALLS: Final = 16
"""Reads that an accelerator is asked for at a time: asking takes as long as one does."""
_SHORTEST_CONTEXT: Final = 128
"""Tokens; a cache with less room helps nobody."""


def find_devices(count: int, *, processes: int = 1, observe: Observer = ignore) -> list[jax.Device]:
    """The devices for a mesh: this machine's accelerators, or else virtual CPU devices.

    Must run before anything else touches JAX, because the number of CPU devices is fixed then.

    Args:
        count: How many devices the mesh has.
        processes: How many have equally many of them each: with several, in the order of
            processes, and all of one kind, because nothing stands in for what one of them lacks.
        observe: Told when virtual devices stand in for missing ones.

    Raises:
        HardwareError: JAX was already started with fewer CPU devices, or a process has too few.
    """
    own = count // processes
    try:
        if jax.config.jax_num_cpu_devices < own:  # type: ignore[attr-defined]  # it is there
            jax.config.update("jax_num_cpu_devices", own)
    except RuntimeError:
        pass  # JAX is running: what it has must do
    with _claiming_memory():
        found = jax.devices()
    if processes > 1:
        return _of_each(found, own, processes)
    if found[0].platform != "cpu":
        if len(found) >= count:
            return found[:count]
        there = f"{len(found)} {found[0].device_kind}"
        observe(Noted(message=f"{there} for a mesh of {count}: runs on virtual CPU devices"))
    elif count > 1:
        cores = psutil.cpu_count(logical=True)
        observe(Noted(message=f"runs on {count} virtual CPU devices over {cores} cores"))
    cpus = jax.devices("cpu")
    if len(cpus) < count:
        raise HardwareError(
            f"JAX runs with {len(cpus)} CPU devices, the mesh needs {count}",
            f"JAX_NUM_CPU_DEVICES={count} grokctl run …",
        )
    return cpus[:count]


def _of_each(found: Sequence[jax.Device], own: int, processes: int) -> list[jax.Device]:
    """So many devices of every process; their numbers say nothing of whose they are.

    Raises:
        HardwareError: One has fewer.
    """
    chosen = []
    for rank in range(processes):
        theirs = [device for device in found if device.process_index == rank]
        if len(theirs) < own:
            raise HardwareError(
                f"rank {rank}: has {len(theirs)} devices, the mesh needs {own} of each of "
                f"{processes} processes"
            )
        chosen += sorted(theirs, key=lambda device: device.id)[:own]
    return chosen


def accelerators(processes: int = 1) -> tuple[Accelerator, ...]:
    """What JAX computes on by default, as far as it is of one kind; nothing if that is the CPU.

    Of several processes, what this one has.

    Starts JAX, with as many CPU devices as any mesh has unless somebody said how many: which mesh
    it will be is often chosen from what is found here, and devices that nobody uses cost nothing.

    Raises:
        HardwareError: JAX does not start.
    """
    with suppress(RuntimeError):  # JAX is running
        if jax.config.jax_num_cpu_devices < 1:  # type: ignore[attr-defined]  # it is there
            jax.config.update("jax_num_cpu_devices", max(MESH_SIZES) // processes)
    try:
        with _claiming_memory():
            found = jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where there is no such plugin
        platforms = jax.config.jax_platforms  # type: ignore[attr-defined]  # it is there
        why = str(error).partition("\n")[0][:200] or f"nothing to compute on in {platforms!r}"
        raise HardwareError(f"JAX does not start: {why}", "grokctl doctor") from error
    if found[0].platform == "cpu":
        return ()
    if processes > 1:  # others do not say what memory they have
        found = jax.local_devices()
    alike = takewhile(lambda device: device.device_kind == found[0].device_kind, found)
    return tuple(map(_accelerator, alike))


def _accelerator(device: jax.Device) -> Accelerator:
    """What a device says of itself: its memory is what JAX may take of it."""
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    capability = getattr(device, "compute_capability", "")
    return Accelerator(
        name=device.device_kind,
        platform=device.platform,
        memory=limit,
        free=None if limit is None else limit - stats.get("bytes_in_use", 0),
        compute_capability=_version(str(capability)),
    )


def _version(text: str) -> tuple[int, int] | None:
    """`9.0` as numbers; None for what is no such version, such as `gfx942`."""
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def use_compilation_cache(folder: Path, *, observe: Observer = ignore) -> None:
    """Keep compiled programs under `folder`, apart for each jaxlib and platform.

    Args:
        folder: Made if it is not there; where it cannot be written, nothing is kept.
        observe: Told so.
    """
    kept = folder / f"{version('jaxlib')}-{jax.default_backend()}"
    try:
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=kept):
            pass
    except OSError as error:
        observe(Noted(message=f"{kept}: compiled programs cannot be kept ({error.strerror})"))
        return
    jax.config.update("jax_compilation_cache_dir", str(kept))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@contextmanager
def compiling(observe: Observer) -> Iterator[None]:
    """Compile in here, and throw away the kept programs if one of them cannot be read.

    JAX only warns, and never replaces what a full disk or a crash cut short.

    Args:
        observe: Told so.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    is_broken = False
    for warning in caught:
        if "persistent compilation cache" in str(warning.message):
            is_broken = True
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # it is there
    if is_broken and folder:
        observe(Noted(message=f"{folder}: holds damaged programs, so all are compiled again"))
        with suppress(OSError):
            for kept in Path(folder).glob("jit_*"):
                kept.unlink()


def check_memory(needed: int, *, purpose: str, hint: str | None = None) -> None:
    """Refuse what cannot fit before the kernel has to kill it.

    Args:
        needed: Bytes of main memory.
        purpose: What they are for, for the error.
        hint: What to do then.

    Raises:
        HardwareError: Less is available.
    """
    usable = memory().usable
    if needed > usable:
        raise HardwareError(
            f"{purpose} takes {needed / 1e9:.1f} GB of memory, {usable / 1e9:.1f} GB are free", hint
        )


def note_paging(needed: int, *, observe: Observer) -> None:
    """Say so where mapped weights do not all fit into memory.

    Args:
        needed: Bytes of weights, and of what must lie beside them.
        observe: Told.
    """
    usable = memory().usable
    if needed > usable:
        sizes = f"{needed / 1e9:.1f} GB of weights, {usable / 1e9:.1f} GB of free memory"
        observe(Noted(message=f"{sizes}: every token reads what does not fit from the disk"))


class DeviceMemory(Protocol):
    """What is asked of a device: `jax.Device` has it."""

    platform: str

    def memory_stats(self) -> Mapping[str, int] | None:
        """Bytes by name, such as `bytes_limit`, where the platform counts them."""
        ...


def check_room(
    devices: Sequence[DeviceMemory],
    needed: Needs,
    *,
    context: int,
    precision: Precision = Precision.INT8,
    size: int | None = None,
) -> None:
    """Refuse what does not fit before any of it is read.

    Args:
        devices: Of the mesh, as far as they are this process's. Accelerators that do not count
            their memory are taken to have enough.
        needed: By each of them. Weights of a CPU are looked at when it is known whether they are
            mapped.
        context: Tokens that the cache is for.
        precision: Of the weights, for the hint.
        size: Devices of the mesh, if not all are this process's.

    Raises:
        HardwareError: One has less than that.
    """
    if devices[0].platform == "cpu":
        _check_main_memory(len(devices), needed, context=context)
        return
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            continue
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
        if needed.total > free:
            if needed.total - free < _unclaimed(device, stats["bytes_limit"]):
                hint = f"{_share_variable()}={MEMORY_SHARE} grokctl run …"
            else:
                count = size or len(devices)
                hint = _less(count, needed, context=context, free=free, precision=precision)
            raise HardwareError(
                f"{needed} take {needed.total / 1e9:.1f} GB on each device, {device} has "
                f"{free / 1e9:.1f} GB free",
                hint,
            )


def _check_main_memory(devices: int, needed: Needs, *, context: int) -> None:
    """Virtual devices share it, and nothing of this is mapped."""
    cache, workspace = needed.cache * devices, needed.workspace * devices
    fitting = _fitting(context, cache=cache, free=memory().usable - workspace)
    check_memory(
        cache + workspace,
        purpose=f"a context of {context} tokens (cache {cache / 1e9:.1f} GB, workspace "
        f"{workspace / 1e9:.1f} GB)",
        hint=f"--context {fitting}" if fitting else None,
    )


def _less(devices: int, needed: Needs, *, context: int, free: int, precision: Precision) -> str:
    """How to need less on each device, what costs least first."""
    beside = needed.cache + needed.workspace
    fitting = _fitting(context, cache=needed.cache, free=free - needed.weights - needed.workspace)
    if fitting:
        return f"--context {fitting}"
    larger = (size for size in MESH_SIZES if size > devices)
    for size in larger:
        if needed.weights * devices // size + beside <= free:
            return f"--devices {size}"
    return "grokctl doctor" if precision is Precision.INT4 else "grokctl reshard --precision int4"


def _fitting(context: int, *, cache: int, free: int) -> int:
    """Tokens of context for which there is room; 0 if that is too few to help anybody."""
    tokens = context * free // cache if cache else 0
    return tokens if tokens >= _SHORTEST_CONTEXT else 0


def _unclaimed(device: DeviceMemory, limit: int) -> int:
    """Bytes of a GPU that JAX leaves alone because it was told to take so little."""
    told = told_share(os.environ) or MEMORY_SHARE
    return max(0, int(limit * (MEMORY_SHARE / told - 1))) if device.platform == "gpu" else 0


@contextmanager
def _claiming_memory() -> Iterator[None]:
    """Have JAX take as much of a GPU as a run may, unless somebody said how much.

    The environment is read when JAX starts (`generate_pjrt_gpu_plugin_options` in
    `jaxlib/xla_client.py`), and limits what arrays can take even where nothing is taken beforehand.
    """
    name = SHARE_VARIABLES[0]
    if any(os.environ.get(told) for told in SHARE_VARIABLES):
        yield
        return
    os.environ[name] = str(MEMORY_SHARE)
    try:
        yield
    finally:
        del os.environ[name]


def _share_variable() -> str:
    """What to set: JAX refuses to start with both."""
    return next((name for name in SHARE_VARIABLES if os.environ.get(name)), SHARE_VARIABLES[0])


def has_fast_bfloat16() -> bool:
    """Whether this CPU has a matrix unit for bfloat16 (AMX): three times as fast as in float32."""
    return cpu().has_fast_bfloat16


def memory_bandwidth(devices: list[jax.Device]) -> float:
    """Bytes a second that can be read from the memory of all devices together, measured now.

    A quarter of a second on the CPU: every core reads a part of an array that no cache holds.
    Other processes are taken to have memory as fast as this one's.
    """
    if devices[0].platform == "cpu":
        return bandwidth() * len({device.process_index for device in devices})
    here = [device for device in devices if device.process_index == jax.process_index()]
    return sum(map(_device_bandwidth, here)) * len(devices) / len(here)


def _device_bandwidth(device: jax.Device) -> float:
    data = jax.device_put(np.ones(_PROBE_BYTES // 4, np.float32), device)
    read = jax.jit(lambda x: x.max())
    read(data).block_until_ready()
    best = 0.0
    for _ in range(_PROBE_ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready([read(data) for _ in range(_PROBE_CALLS)])
        best = max(best, _PROBE_CALLS * _PROBE_BYTES / (time.perf_counter() - start))
    return best
