"""What was found out about a machine; what could not be found out is None, and says why."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Found(StrEnum):
    """How a probe ended."""

    OK = "ok"
    ABSENT = "absent"
    """What it asks is not there."""
    FAILED = "failed"
    SILENT = "silent"
    """It did not answer in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One accelerator, as its driver or JAX tells of it."""

    name: str
    """Such as `NVIDIA H100 80GB HBM3`, or JAX's kind of device."""
    platform: str
    """`gpu` or `tpu`."""
    memory: int | None
    """Bytes that it has, whoever uses them."""
    free: int | None = None
    """Bytes that nobody uses."""
    compute_capability: tuple[int, int] | None = None
    """Of an NVIDIA GPU."""
    driver: str = ""
    has_nvlink: bool | None = None
    """Whether it has an active link that is faster than PCIe; None where nobody says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvml:
    """What the NVIDIA driver says."""

    found: Found
    error: str = ""
    driver: str = ""
    cuda: str = ""
    """Newest CUDA version that the driver runs, such as `12.8`."""
    gpus: tuple[Accelerator, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JaxReport:
    """What JAX says in a process of its own."""

    found: Found
    error: str = ""
    """Why it did not start, one line; where it did, what it complained of last."""
    platform: str = ""
    """`cpu`, `gpu` or `tpu`."""
    accelerators: tuple[Accelerator, ...] = ()
    """None for a CPU."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The processor."""

    model: str
    architecture: str
    """Such as `x86_64`."""
    cores: int
    """That this process may use, after affinity and cgroup quota; at least 1."""
    flags: tuple[str, ...]
    """Of those that matter here, such as `avx2`, `avx512f`, `amx_bf16`, `sve`."""
    bandwidth: float | None
    """Bytes a second that all cores read from memory together, measured in half a second."""

    @property
    def has_fast_bfloat16(self) -> bool:
        """Whether it has a matrix unit for bfloat16."""
        return "amx_bf16" in self.flags


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Main memory, bytes."""

    total: int
    available: int
    limit: int | None
    """What the cgroup allows, if that is less than the total."""
    used: int = 0
    """By the cgroup, where there is a limit; without what the kernel can take back."""
    shm: int | None = None
    """Size of /dev/shm; None where there is none."""

    @property
    def usable(self) -> int:
        """What this process can still take."""
        if self.limit is None:
            return self.available
        return max(0, min(self.available, self.limit - self.used))


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The file system that a folder lies on, or will lie on."""

    purpose: str
    """`home` or `destination`."""
    path: Path
    """The folder as it was named; need not exist."""
    total: int | None = None
    free: int | None = None
    """For us."""
    file_system: str = ""
    """Type, as Linux calls it; empty where that cannot be known."""
    is_remote: bool = False
    """Reached over a network, or through FUSE."""
    device: int | None = None
    """Number of the device, which all folders on it share."""
    is_writable: bool = False
    write_rate: float | None = None
    """Bytes a second, synced; None where it was not tried."""
    read_rate: float | None = None
    """Bytes a second, not from memory."""
    error: str = ""
    """Why it cannot be used, or was not tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """Versions."""

    grokctl: str
    python: str
    system: str
    """Such as `Linux 6.8.0, glibc 2.39`."""
    packages: Mapping[str, str]
    """Of those that matter, by distribution name, such as `jax`, `jaxlib`, `jax-cuda12-plugin`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What started this process, and what it was told."""

    cluster: str
    """`Slurm`, `Open MPI`, `Kubernetes`, `Cloud TPU`, or nothing."""
    processes: int
    """Of this job, all hosts together; 1 outside of one."""
    local_processes: int
    """Of this job on this host."""
    variables: Mapping[str, str]
    """Of the environment, those that change what JAX, XLA, CUDA, libtorrent or grokctl do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What a download would go through."""

    proxy: str
    """From the environment, without user name and password; empty if there is none."""
    certificates: str
    """The bundle of certificate authorities."""
    has_certificates: bool
    port: int | None
    """That a torrent session was bound to, for TCP and UDP; None if it could not be."""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """All of it."""

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
    """How many files this process may have open (soft limit)."""
    open_files_most: int
    """How many it could allow itself (hard limit)."""
    address_space: int | None = None
    """Bytes that this process may map; None without a limit."""

    @property
    def accelerators(self) -> tuple[Accelerator, ...]:
        """Those that JAX can use; where the driver knows more of them, with that."""
        gpus = self.nvml.gpus
        if self.jax.platform == "gpu" and len(gpus) == len(self.jax.accelerators):
            return gpus
        return self.jax.accelerators
