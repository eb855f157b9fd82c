"""What this machine has: devices for a mesh, memory, and how fast memory can be read."""

import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Final, Protocol

import jax
import numpy as np
import psutil

from grokctl.errors import HardwareError
from grokctl.events import Noted, Observer, ignore
from grokctl.model.placement import MESH_SIZES

_PROBE_BYTES: Final = 2**28
_PROBE_ROUNDS: Final = 3
_PROBE_CALLS: Final = 16
"""Reads that an accelerator is asked for at a time: asking takes as long as one does."""
_SHARE: Final = "XLA_CLIENT_MEM_FRACTION"
_SHORTEST_CONTEXT: Final = 128
"""Tokens; a cache with less room helps nobody."""


def find_devices(count: int, *, observe: Observer = ignore) -> list[jax.Device]:
    """The devices for a mesh: this machine's accelerators, or else virtual CPU devices.

    Must run before anything else touches JAX, because the number of CPU devices is fixed then.

    Args:
        count: How many devices the mesh has.
        observe: Told when virtual devices stand in for missing ones.

    Raises:
        HardwareError: JAX was already started with fewer CPU devices.
    """
    try:
        if jax.config.jax_num_cpu_devices < count:  # type: ignore[attr-defined]  # it is there
            jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # JAX is running: what it has must do
    found = jax.devices()
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


def check_memory(needed: int, *, purpose: str) -> None:
    """Refuse what cannot fit before the kernel has to kill it.

    Args:
        needed: Bytes of main memory.
        purpose: What they are for, for the error.

    Raises:
        HardwareError: Less is available.
    """
    available = psutil.virtual_memory().available
    if needed > available:
        raise HardwareError(
            f"{purpose} takes {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free"
        )


def note_paging(needed: int, *, observe: Observer) -> None:
    """Say so where mapped weights do not all fit into memory.

    Args:
        needed: Bytes of weights.
        observe: Told.
    """
    available = psutil.virtual_memory().available
    if needed > available:
        sizes = f"{needed / 1e9:.1f} GB of weights, {available / 1e9:.1f} GB of free memory"
        observe(Noted(message=f"{sizes}: every token reads what does not fit from the disk"))


class DeviceMemory(Protocol):
    """What is asked of a device: `jax.Device` has it."""

    platform: str

    def memory_stats(self) -> Mapping[str, int] | None:
        """Bytes by name, such as `bytes_limit`, where the platform counts them."""
        ...


def check_device_memory(
    devices: Sequence[DeviceMemory],
    weights: Sequence[int],
    *,
    cache_nbytes: int = 0,
    context: int = 0,
) -> None:
    """Refuse what the devices cannot hold before any of it is read.

    Args:
        devices: Those that do not count their memory, such as CPUs, are taken to have enough.
        weights: Bytes of weights for each.
        cache_nbytes: Bytes of key-value cache for each.
        context: Tokens that the cache is for.

    Raises:
        HardwareError: One has less than that.
    """
    what = f"weights and the cache of {context} tokens" if cache_nbytes else "weights"
    for device, nbytes in zip(devices, weights, strict=True):
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            continue
        free, needed = stats["bytes_limit"] - stats.get("bytes_in_use", 0), nbytes + cache_nbytes
        if needed <= free:
            continue
        fitting = context * (free - nbytes) // max(1, cache_nbytes)
        sizes = [size for size in MESH_SIZES if size > len(devices)]
        larger = [size for size in sizes if nbytes * len(devices) // size + cache_nbytes <= free]
        if needed - free < _unclaimed(device, stats["bytes_limit"]):
            hint = f"{_SHARE}=0.95 grokctl run …"
        elif fitting >= _SHORTEST_CONTEXT:
            hint = f"--context {fitting}"
        else:
            hint = f"--devices {larger[0]}" if larger else "grokctl reshard --precision int4"
        raise HardwareError(
            f"{what} take {needed / 1e9:.1f} GB on each device, {device} has {free / 1e9:.1f} GB"
            " free",
            hint,
        )


def _unclaimed(device: DeviceMemory, limit: int) -> float:
    """Bytes of a GPU that JAX leaves alone, unless it was told how much to take: a quarter."""
    told = {_SHARE, "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys()
    return 0 if told or device.platform != "gpu" else limit * (0.95 / 0.75 - 1)


def has_fast_bfloat16() -> bool:
    """Whether this CPU has a matrix unit for bfloat16 (AMX): three times as fast as in float32."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def memory_bandwidth(devices: list[jax.Device]) -> float:
    """Bytes a second that can be read from the memory of all devices together, measured now.

    A quarter of a second on the CPU: every core reads a part of an array that no cache holds.
    """
    if devices[0].platform != "cpu":
        return sum(map(_device_bandwidth, devices))
    threads = psutil.cpu_count(logical=True) or 1
    parts = np.array_split(np.ones(_PROBE_BYTES // 8, np.int64), threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_PROBE_ROUNDS):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, _PROBE_BYTES / (time.perf_counter() - start))
    return best


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
