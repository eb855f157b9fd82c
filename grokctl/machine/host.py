"""The processor: model, usable cores, instruction sets, and memory bandwidth."""

import platform
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np

from grokctl.machine.facts import Cpu
from grokctl.system import usable_cores
from grokctl.text import printable

_PROBE_BYTES: Final = 2**28
_PROBE_BYTES_A_CORE: Final = 2**24
"""More than the caches of one core, on any processor."""
_SMALLEST_PROBE: Final = 2**26
"""Less would be read from the caches."""
_MEMORY_PARTS: Final = 4
"""The probe takes at most one of this many parts of free memory."""
_ROUNDS: Final = 3
_FLAGS: Final = re.compile(
    r"amx_\w+|avx(2|512f|512_(bf16|fp16|vnni)|_vnni)?|f16c|fma|asimd|(sve)?bf16|i8mm|sve2?"
)
_MODEL: Final = ("model name", "cpu model", "cpu", "uarch")
"""Its names in `/proc/cpuinfo` by architecture; ARM only has numbers."""


def cpu(root: Path = Path("/"), *, available: int | None = None) -> Cpu:
    """Inspect the processor.

    Args:
        root: Where `proc` and `sys` are.
        available: Bytes of free memory for a measurement; None measures nothing.
    """
    fields = _cpuinfo(root)
    numbers = [fields[name] for name in ("CPU implementer", "CPU part") if name in fields]
    names = [fields.get(name, "") for name in _MODEL]
    names += [f"CPU {' '.join(numbers)}" if numbers else "", platform.processor()]
    flags = f"{fields.get('flags', '')} {fields.get('Features', '')}".split()
    return Cpu(
        model=printable(next(filter(None, names), "unknown")),
        architecture=platform.machine(),
        cores=usable_cores(root),
        flags=tuple(sorted(filter(_FLAGS.fullmatch, set(flags)))),
        bandwidth=_bandwidth_of(probe_bytes(available)),
    )


def bandwidth(*, nbytes: int = _PROBE_BYTES, rounds: int = _ROUNDS) -> float:
    """Measure the bytes a second that all cores read from memory together.

    Every core fills and reads its part of an array that is larger than the caches.

    Args:
        nbytes: Bytes of the array.
        rounds: Number of measurements; the fastest counts.
    """
    threads = usable_cores()
    parts = np.array_split(np.empty(nbytes // 8, np.int64), threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: part.fill(1), parts))
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, nbytes / (time.perf_counter() - start))
    return best


def probe_bytes(available: int | None) -> int:
    """Bytes to measure memory with; 0 where too few are free, or None are to be used."""
    room = (available or 0) // _MEMORY_PARTS
    nbytes = min(max(_PROBE_BYTES, _PROBE_BYTES_A_CORE * usable_cores()), room)
    return nbytes if nbytes >= _SMALLEST_PROBE else 0


def _bandwidth_of(nbytes: int) -> float | None:
    try:
        return bandwidth(nbytes=nbytes, rounds=2 * _ROUNDS) if nbytes else None
    except (MemoryError, RuntimeError):  # no memory, or no more threads
        return None


def _cpuinfo(root: Path) -> dict[str, str]:
    """The entries of the first core."""
    fields: dict[str, str] = {}
    with suppress(OSError):
        for line in (root / "proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    return fields
