"""What this machine has: devices for a mesh, memory, and how fast memory can be read."""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Final

import jax
import numpy as np
import psutil

from grokctl.errors import HardwareError
from grokctl.events import Noted, Observer, ignore

_PROBE_BYTES: Final = 2**28
_PROBE_ROUNDS: Final = 3


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
        read(data).block_until_ready()
        best = max(best, _PROBE_BYTES / (time.perf_counter() - start))
    return best
