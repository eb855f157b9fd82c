"""Facts about a machine; unknown ones are None, with the reason."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

FAST_BFLOAT16: Final = frozenset({"amx_bf16", "avx512_bf16", "bf16", "svebf16"})
"""Instruction sets that multiply bfloat16 and sum in float32; the last two are ARM's."""


class Found(StrEnum):
    """How a probe ended."""

    OK = "ok"
    ABSENT = "absent"
    """The driver or library is not installed."""
    FAILED = "failed"
    SILENT = "silent"
    """It timed out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One accelerator, by its driver or by JAX."""

    name: str
    """Such as `NVIDIA H100 80GB HBM3`, or JAX's device kind."""
    platform: str
    """`gpu` or `tpu`."""
    memory: int | None
    """Total bytes."""
    free: int | None = None
    """Free bytes."""
    compute_capability: tuple[int, int] | None = None
    """Of an NVIDIA GPU."""
    driver: str = ""
    has_nvlink: bool | None = None
    """Whether it has an active link that is faster than PCIe; None if unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvml:
    """The report of the NVIDIA driver."""

    found: Found
    error: str = ""
    driver: str = ""
    cuda: str = ""
    """The newest CUDA version that the driver supports, such as `12.8`."""
    gpus: tuple[Accelerator, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JaxReport:
    """The report of JAX in a process of its own."""

    found: Found
    error: str = ""
    """One line: why it did not start, or the last line that it printed to stderr."""
    platform: str = ""
    """`cpu`, `gpu` or `tpu`."""
    accelerators: tuple[Accelerator, ...] = ()
    """Empty for a CPU."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The processor."""

    model: str
    architecture: str
    """Such as `x86_64`."""
    cores: int
    """Usable by this process, after affinity and cgroup quota; at least 1."""
    flags: tuple[str, ...]
    """Relevant instruction sets, such as `avx2`, `avx512f`, `amx_bf16`, `sve`."""
    bandwidth: float | None
    """Measured bytes a second that all cores read from memory together."""

    @property
    def has_fast_bfloat16(self) -> bool:
        """Whether it multiplies bfloat16 by itself: by a matrix unit (AMX) or by dot products."""
        return not FAST_BFLOAT16.isdisjoint(self.flags)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    """The native kernel of the CPU."""

    found: Found
    reason: str = ""
    """Why it is not there."""
    fix: str = ""
    """A command that would help; empty if none would."""
    instruction_set: str = ""
    """Such as `avx512vnni`."""
    rate: float | None = None
    """Measured bytes a second of weights that one token reads with all cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A part of the memory, and the cores next to it (NUMA)."""

    number: int
    cores: str
    """A list of all cores, such as `0-31,64-95`."""
    usable: int
    """Cores that this process may use."""
    memory: int | None
    """Bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Main memory, bytes."""

    total: int
    available: int
    limit: int | None
    """The limit of the cgroup, if it is less than the total."""
    used: int = 0
    """Used by the cgroup, if there is a limit; without memory that the kernel can reclaim."""
    shm: int | None = None
    """Size of /dev/shm; None if it does not exist."""

    @property
    def usable(self) -> int:
        """Memory that this process can still allocate."""
        if self.limit is None:
            return self.available
        return max(0, min(self.available, self.limit - self.used))


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The file system of a folder, which need not exist yet."""

    purpose: str
    """`home` or `destination`."""
    path: Path
    """The folder as the user named it."""
    total: int | None = None
    free: int | None = None
    """Free for this user."""
    file_system: str = ""
    """Linux's name of its type; empty if unknown."""
    is_remote: bool = False
    """Whether it is on a network, or uses FUSE."""
    device: int | None = None
    """Number of the device, the same for all folders on it."""
    is_writable: bool = False
    write_rate: float | None = None
    """Bytes a second, synced; None if not measured."""
    read_rate: float | None = None
    """Bytes a second, not from the page cache."""
    lacks: tuple[str, ...] = ()
    """Operations that its file system refuses, such as `locks`."""
    error: str = ""
    """Why it cannot be used, or was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """Versions."""

    grokctl: str
    python: str
    system: str
    """Such as `Linux 6.8.0, glibc 2.39`."""
    packages: Mapping[str, str]
    """Relevant packages by distribution name, such as `jax`, `jaxlib`, `jax-cuda12-plugin`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """The launcher of this process, and its environment variables."""

    cluster: str
    """`Slurm`, `Open MPI`, `Kubernetes`, `Cloud TPU`, or empty."""
    processes: int
    """Processes of this job on all hosts; 1 without a job."""
    local_processes: int
    """Processes of this job on this host."""
    variables: Mapping[str, str]
    """Environment variables that affect JAX, XLA, CUDA, libtorrent or grokctl."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The network of a download."""

    proxy: str
    """From the environment, without user name and password; empty without a proxy."""
    certificates: str
    """The bundle of certificate authorities."""
    has_certificates: bool
    port: int | None
    """A port that a torrent session can bind, TCP and UDP; None if there is none."""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """All facts about a machine."""

    nvml: Nvml
    jax: JaxReport
    cpu: Cpu
    memory: Memory
    disks: tuple[Disk, ...]
    """Home first."""
    software: Software
    surroundings: Surroundings
    network: Network
    open_files: int
    """Soft limit of open files of this process."""
    open_files_most: int
    """Hard limit of open files."""
    address_space: int | None = None
    """Bytes of address space; None without a limit."""
    data_segment: int | None = None
    """Bytes of memory that is no file's; None without a limit."""
    threads: int | None = None
    """Threads that could be started, of as many as a run needs; None if not tried."""
    thread_limits: tuple[str, ...] = ()
    """What limits them, in words."""
    locked_memory: int | None = None
    """Bytes of memory that may be locked; None without a limit."""
    kernel: KernelReport | None = None
    """None if it was not looked for: accelerators do not need it."""
    nodes: tuple[Node, ...] = ()
    """Of the memory; empty if unknown."""

    @property
    def accelerators(self) -> tuple[Accelerator, ...]:
        """The accelerators that JAX can use; with the driver's facts, if it reports as many."""
        gpus = self.nvml.gpus
        if self.jax.platform == "gpu" and len(gpus) == len(self.jax.accelerators):
            return gpus
        return self.jax.accelerators
