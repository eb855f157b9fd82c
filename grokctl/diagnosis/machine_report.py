"""All facts about a machine, without personal data, for public issues."""

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from grokctl.diagnosis.redaction import Redaction
from grokctl.machine.facts import Accelerator, Disk, Found, Machine, Memory
from grokctl.text import format_bytes, format_rate

Facts = list[tuple[str, str]]
"""Names and values."""

_VERSION: Final = re.compile(r"[0-9][\w.+!-]{0,40}")
_VERSIONS: Final = frozenset({"driver", "cuda", "grokctl", "python", "packages"})
"""Fields with versions, some of which look like addresses."""


def values(value: object, redact: Redaction, name: str = "") -> Any:
    """A value as JSON, with all of its texts redacted."""
    if is_dataclass(value):
        named = ((field.name, getattr(value, field.name)) for field in fields(value))
        return {key: values(part, redact, key) for key, part in named}
    if isinstance(value, Mapping):
        if name == "variables":
            return {redact(key): redact.variable(key, text) for key, text in value.items()}
        return {redact(key): values(part, redact, name) for key, part in value.items()}
    if isinstance(value, tuple):
        return [values(part, redact, name) for part in value]
    if isinstance(value, str | Path):  # and enumerations of texts
        text = str(value)
        return text if name in _VERSIONS and _VERSION.fullmatch(text) else redact(text)
    return value


def facts(machine: Machine, redact: Redaction) -> Iterable[tuple[str, Facts]]:
    """All facts by title, as redacted names and values."""
    software, cpu, memory, network = (
        machine.software,
        machine.cpu,
        machine.memory,
        machine.network,
    )
    yield (
        "software",
        [
            ("grokctl", software.grokctl),
            ("python", _known(software.python, redact)),
            ("system", redact(software.system)),
            *((redact(name), _known(text, redact)) for name, text in software.packages.items()),
        ],
    )
    yield "accelerators", _accelerators(machine, redact)
    yield (
        "processor",
        [
            ("model", redact(cpu.model)),
            ("architecture", redact(cpu.architecture)),
            ("cores", str(cpu.cores)),
            ("flags", redact(" ".join(cpu.flags)) or "none relevant"),
            ("reads memory at", _rate(cpu.bandwidth)),
            *_kernel(machine, redact),
            *(
                (
                    f"memory node {node.number}",
                    f"cores {node.cores}, {node.usable} usable, {_bytes(node.memory)}",
                )
                for node in machine.nodes
            ),
        ],
    )
    yield (
        "memory",
        [
            ("total", format_bytes(memory.total)),
            ("available", format_bytes(memory.available)),
            ("cgroup", _cgroup(memory)),
            ("shared memory", _bytes(memory.shm, "none")),
        ],
    )
    yield "disks", [fact for disk in machine.disks for fact in _disk(disk, redact)]
    surroundings = machine.surroundings
    yield (
        "surroundings",
        [
            ("cluster", redact(surroundings.cluster) or "none"),
            ("processes", f"{surroundings.processes}, {surroundings.local_processes} of them here"),
            *(
                (redact(name), redact.variable(name, value) or "empty")
                for name, value in surroundings.variables.items()
            ),
        ],
    )
    yield (
        "network and limits",
        [
            ("proxy", redact(network.proxy) or "none"),
            ("certificates", redact(network.certificates) or "none"),
            ("torrent port", "none" if network.port is None else str(network.port)),
            *([("error", redact(network.error))] if network.error else []),
            (
                "open files",
                f"{_count(machine.open_files)}, at most {_count(machine.open_files_most)}",
            ),
            ("address space", _bytes(machine.address_space, "no limit")),
            ("data segment", _bytes(machine.data_segment, "no limit")),
        ],
    )


def _kernel(machine: Machine, redact: Redaction) -> Facts:
    kernel = machine.kernel
    if kernel is None:
        return []
    if kernel.found is not Found.OK:
        return [("kernel", f"none: {redact(kernel.reason)}")]
    return [("kernel", f"{kernel.instruction_set}, reads weights at {_rate(kernel.rate)}")]


def _cgroup(memory: Memory) -> str:
    if memory.limit is None:
        return "no limit"
    return f"{format_bytes(memory.used)} of {format_bytes(memory.limit)} used"


def _accelerators(machine: Machine, redact: Redaction) -> Facts:
    nvml, jax = machine.nvml, machine.jax
    driver = f"{_known(nvml.driver, redact)}, CUDA {_known(nvml.cuda, redact)}"
    facts = [
        ("NVIDIA driver", driver if nvml.found is Found.OK else nvml.found.value),
        ("JAX", f"{jax.platform or jax.found} in {jax.seconds:.1f} s"),
    ]
    errors = (("driver error", nvml.error), ("JAX error", jax.error))
    facts += [(name, redact(error)) for name, error in errors if error]
    place = 0
    for device, alike in groupby(machine.accelerators):
        last = place + len(list(alike)) - 1
        name = f"device {place}" if last == place else f"device {place}-{last}"
        facts.append((name, redact(_accelerator(device))))
        place = last + 1
    return facts


def _accelerator(device: Accelerator) -> str:
    parts = [device.name, f"{_bytes(device.memory)}, {_bytes(device.free)} free"]
    if device.compute_capability:
        parts.append("compute capability {}.{}".format(*device.compute_capability))
    if device.has_nvlink is not None:
        parts.append("NVLink" if device.has_nvlink else "no NVLink")
    return ", ".join(parts)


def _disk(disk: Disk, redact: Redaction) -> Facts:
    kind = redact(disk.file_system) or "unknown file system"
    speeds = f"writes {_rate(disk.write_rate)}, reads {_rate(disk.read_rate)}"
    facts = [
        (disk.purpose, redact(str(disk.path))),
        ("", f"{kind}{', remote' if disk.is_remote else ''}"),
        ("", f"{_bytes(disk.free)} free of {_bytes(disk.total)}"),
        ("", speeds if disk.is_writable else "cannot be written"),
    ]
    return [*facts, ("", redact(disk.error))] if disk.error else facts


def _count(limit: int) -> str:
    return "no limit" if limit == sys.maxsize else f"{limit:,}"


def _known(version: str, redact: Redaction) -> str:
    return version if _VERSION.fullmatch(version) else redact(version) or "unknown"


def _bytes(count: int | None, nothing: str = "unknown") -> str:
    return nothing if count is None else format_bytes(count)


def _rate(rate: float | None) -> str:
    return "an unknown rate" if rate is None else format_rate(rate)
