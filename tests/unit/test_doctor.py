"""What `doctor` says of machines that were made up: every situation, its verdict and its line."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.storage import released_storage, storage_in
from grokctl.checks import Status
from grokctl.diagnosis.inventory import (
    Inventory,
    KeptReady,
    KeptRelease,
    ready_nbytes,
    release_nbytes,
)
from grokctl.doctor import Ability, Diagnosis, Question, doctor
from grokctl.errors import HardwareError, PlacementError, UsageError
from grokctl.machine.facts import (
    Accelerator,
    Cpu,
    Disk,
    Found,
    JaxReport,
    Machine,
    Memory,
    Network,
    Nvml,
    Software,
    Surroundings,
)
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.precision import KvType, Precision
from grokctl.planning.plans import MESHES, PRECISIONS, hardware_for
from grokctl.planning.selection import Asked, Candidate, choose
from grokctl.text import format_bytes

GB = 10**9
TB = 10**12
HOME = Path("/data/grokctl")
EMPTY = Inventory(home=HOME)
HERE = Question()
PLAIN = {"jax": "0.10.2", "jaxlib": "0.10.2", "libtorrent": "2.1.1"}
CUDA = PLAIN | {"jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.2"}

H100 = Accelerator(
    name="NVIDIA H100 80GB HBM3",
    platform="gpu",
    memory=85_520 * 10**6,
    free=85_000 * 10**6,
    compute_capability=(9, 0),
    driver="570.86",
    has_nvlink=True,
)
RTX_4090 = replace(
    H100,
    name="NVIDIA GeForce RTX 4090",
    memory=25_757 * 10**6,
    free=25_400 * 10**6,
    compute_capability=(8, 9),
    has_nvlink=None,
)
DISK = Disk(
    purpose="home",
    path=HOME,
    total=4 * TB,
    free=2 * TB,
    file_system="ext4",
    is_writable=True,
    write_rate=2.0e9,
    read_rate=3.0e9,
)
CANNOT_BE_MENDED_BY_A_LINE = {
    ("NVIDIA driver", "JAX needs 12 or newer"),  # another driver: each system has its own way
    ("job", "Cloud TPU"),  # a pod is one machine to its runtime
    ("one kind", "TPU"),
}


def server(**changes) -> Machine:
    """A machine without accelerators where nothing is wrong."""
    fine = Machine(
        nvml=Nvml(found=Found.ABSENT),
        jax=JaxReport(found=Found.OK, platform="cpu", seconds=1.3),
        cpu=Cpu(
            model="Xeon", architecture="x86_64", cores=64, flags=("amx_bf16",), bandwidth=200e9
        ),
        memory=Memory(total=512 * GB, available=480 * GB, limit=None, shm=256 * GB),
        disks=(DISK,),
        software=Software(grokctl="1", python="3.12.4", system="Linux 6.8", packages=PLAIN),
        surroundings=Surroundings(cluster="", processes=1, local_processes=1, variables={}),
        network=Network(
            proxy="", certificates="/etc/ca.crt", has_certificates=True, port=6881, error=""
        ),
        open_files=1024,
        open_files_most=2**20,
    )
    return replace(fine, **changes)


def box(*gpus: Accelerator, **changes) -> Machine:
    """The same with NVIDIA GPUs."""
    fine = replace(
        server(),
        nvml=Nvml(found=Found.OK, driver="570.86", cuda="12.8", gpus=gpus),
        jax=JaxReport(found=Found.OK, platform="gpu", accelerators=gpus, seconds=4.0),
        software=replace(server().software, packages=CUDA),
    )
    return replace(fine, **changes)


def laptop(**changes) -> Machine:
    small = server(
        cpu=Cpu(model="i7", architecture="x86_64", cores=8, flags=("avx2",), bandwidth=50e9),
        memory=Memory(total=32 * GB, available=24 * GB, limit=None, shm=16 * GB),
        disks=(replace(DISK, total=TB, free=150 * GB),),
    )
    return replace(small, **changes)


EIGHT = box(*[H100] * 8)


def unused(machine: Machine = EIGHT, **changes) -> Machine:
    """GPUs that the driver sees, and JAX on the CPU."""
    return replace(machine, **{"jax": server().jax} | changes)


def on_disk(**changes) -> Machine:
    return server(disks=(replace(DISK, **changes),))


def told(
    machine: Machine = EIGHT, cluster="", processes=1, local_processes=None, **variables
) -> Machine:
    return replace(
        machine,
        surroundings=Surroundings(
            cluster=cluster,
            processes=processes,
            local_processes=processes if local_processes is None else local_processes,
            variables=variables,
        ),
    )


def versions(**packages) -> Machine:
    known = CUDA | {name.replace("_", "-"): version for name, version in packages.items()}
    return replace(EIGHT, software=replace(EIGHT.software, packages=known))


def check(found: Diagnosis, name: str):
    """The one check of that name; where there are several, the worst."""
    order = [Status.SKIP, Status.OK, Status.WARN, Status.FAIL]
    same = [made for group in found.groups for made in group.checks if made.name == name]
    return max(same, key=lambda made: order.index(made.status))


def ability(found: Diagnosis, name: str) -> Ability:
    return next(ability for ability in found.abilities if ability.name == name)


def problems(found: Diagnosis):
    return [
        made
        for group in found.groups
        for made in group.checks
        if made.status in {Status.WARN, Status.FAIL}
    ]


SITUATIONS = [
    # machine, check, status, words of its detail, words of its fix
    pytest.param(
        EIGHT, "accelerators", "ok", "8 x NVIDIA H100 80GB HBM3 (85.5 GB), 684.2 GB", "", id="gpus"
    ),
    pytest.param(
        server(), "accelerators", "warn", "none", "grokctl doctor --accelerator", id="no-gpu"
    ),
    pytest.param(
        unused(software=server().software),
        "accelerators",
        "fail",
        "8 x NVIDIA H100 80GB HBM3 (85.5 GB) seen by the driver, none by JAX: it has no plugin",
        "pip install '.[cuda12]'",
        id="no-plugin",
    ),
    pytest.param(
        unused(jax=replace(server().jax, error="CUDA_ERROR_SYSTEM_NOT_READY")),
        "accelerators",
        "fail",
        "none by JAX: CUDA_ERROR_SYSTEM_NOT_READY",
        "jax.devices('cuda')",
        id="plugin-that-finds-none",
    ),
    pytest.param(
        told(unused(), JAX_PLATFORMS="cpu"),
        "accelerators",
        "warn",
        "hidden from JAX by JAX_PLATFORMS=cpu",
        "unset JAX_PLATFORMS",
        id="platforms-cpu",
    ),
    pytest.param(
        told(unused(), JAX_PLATFORMS="cpu"),
        "JAX_PLATFORMS",
        "warn",
        "JAX ignores 8 GPUs",
        "unset JAX_PLATFORMS",
        id="platforms-cpu-in-the-environment",
    ),
    pytest.param(
        told(unused(), CUDA_VISIBLE_DEVICES=""),
        "accelerators",
        "warn",
        "CUDA_VISIBLE_DEVICES=",
        "unset CUDA_VISIBLE_DEVICES",
        id="all-hidden",
    ),
    pytest.param(
        told(
            replace(EIGHT, jax=replace(EIGHT.jax, accelerators=(H100,) * 2)),
            CUDA_VISIBLE_DEVICES="0,1",
        ),
        "all of them",
        "warn",
        "CUDA_VISIBLE_DEVICES=0,1 leaves 2 of 8 GPUs",
        "unset CUDA_VISIBLE_DEVICES",
        id="some-hidden",
    ),
    pytest.param(
        told(
            replace(EIGHT, jax=replace(EIGHT.jax, accelerators=(H100,) * 2)),
            cluster="Slurm",
            CUDA_VISIBLE_DEVICES="0,1",
        ),
        "all of them",
        "ok",
        "as assigned by Slurm",
        "",
        id="some-given",
    ),
    pytest.param(
        replace(EIGHT, jax=replace(EIGHT.jax, accelerators=(H100,) * 7)),
        "all of them",
        "warn",
        "7 of 8",
        "nvidia-smi -L",
        id="one-lost",
    ),
    pytest.param(
        box(H100, RTX_4090, H100),
        "one kind",
        "warn",
        "2 x NVIDIA H100",
        "CUDA_VISIBLE_DEVICES=0,2",
        id="two-kinds",
    ),
    pytest.param(
        box(H100, replace(H100, free=60 * GB)),
        "free memory",
        "warn",
        "device 1: other processes use 25.5 GB of 85.5 GB",
        "nvidia-smi",
        id="memory-in-use",
    ),
    pytest.param(
        box(replace(H100, compute_capability=(7, 0))),
        "bfloat16",
        "warn",
        "compute capability 7.0, expected 8.0",
        "--compute float32",
        id="old-gpu",
    ),
    pytest.param(
        box(*[replace(RTX_4090, has_nvlink=False)] * 8),
        "links",
        "warn",
        "PCIe only: 128 sums",
        "nvidia-smi topo -m",
        id="pcie",
    ),
    pytest.param(box(*[RTX_4090] * 2), "links", "skip", "unknown", "", id="links-unknown"),
    pytest.param(
        replace(EIGHT, jax=JaxReport(found=Found.SILENT, seconds=20.0)),
        "JAX",
        "fail",
        "did not answer in 20 s",
        "JAX_PLATFORMS=cpu grokctl run",
        id="jax-silent",
    ),
    pytest.param(
        replace(EIGHT, jax=JaxReport(found=Found.FAILED, error="Traceback\nImportError: no X\n")),
        "JAX",
        "fail",
        "ImportError: no X",
        "JAX_PLATFORMS=cpu grokctl run",
        id="jax-failed",
    ),
    pytest.param(
        told(
            server(jax=JaxReport(found=Found.FAILED, error="Unknown backend: 'cuda'")),
            JAX_PLATFORMS="cuda",
        ),
        "JAX",
        "fail",
        "Unknown backend: 'cuda'",
        "unset JAX_PLATFORMS",
        id="jax-told-of-none",
    ),
    pytest.param(
        told(
            server(jax=JaxReport(found=Found.FAILED, error="Unknown flag in XLA_FLAGS: --x")),
            XLA_FLAGS="--x",
        ),
        "JAX",
        "fail",
        "Unknown flag in XLA_FLAGS: --x",
        "unset XLA_FLAGS",
        id="jax-told-nonsense",
    ),
    pytest.param(
        told(
            server(jax=JaxReport(found=Found.FAILED, error="no JAX flag jax_num_cpu_devices")),
            JAX_NUM_CPU_DEVICES="x",
        ),
        "JAX",
        "fail",
        "no JAX flag jax_num_cpu_devices",
        "unset JAX_NUM_CPU_DEVICES",
        id="jax-told-nonsense-in-small-letters",
    ),
    pytest.param(
        told(
            server(jax=JaxReport(found=Found.SILENT, seconds=20)),
            JAX_NUM_CPU_DEVICES="100000",
        ),
        "JAX",
        "fail",
        "did not answer in 20 s",
        "unset JAX_NUM_CPU_DEVICES",
        id="jax-told-to-make-too-many",
    ),
    pytest.param(
        server(jax=JaxReport(found=Found.ABSENT)),
        "JAX",
        "fail",
        "not installed",
        "pip install",
        id="no-jax",
    ),
    pytest.param(
        server(nvml=Nvml(found=Found.FAILED, error="Driver/library version mismatch")),
        "NVIDIA driver",
        "fail",
        "Driver/library version mismatch",
        "nvidia-smi",
        id="nvml-failed",
    ),
    pytest.param(
        replace(EIGHT, nvml=Nvml(found=Found.SILENT)),
        "NVIDIA driver",
        "warn",
        "does not answer",
        "nvidia-smi",
        id="nvml-silent-and-jax-fine",
    ),
    pytest.param(
        replace(EIGHT, nvml=replace(EIGHT.nvml, cuda="11.8")),
        "NVIDIA driver",
        "fail",
        "supports CUDA 11.8, JAX needs 12 or newer",
        "",
        id="old-driver",
    ),
    pytest.param(
        replace(
            EIGHT,
            software=replace(EIGHT.software, packages=PLAIN | {"jax_cuda13_plugin": "0.10.2"}),
        ),
        "NVIDIA driver",
        "fail",
        "supports CUDA 12.8, JAX's plugin needs CUDA 13",
        "pip install '.[cuda12]'",
        id="newer-plugin",
    ),
    pytest.param(
        versions(jax_cuda12_plugin="0.9.0"),
        "JAX's parts",
        "fail",
        "jax-cuda12-plugin: expected 0.10.2 like jaxlib, found 0.9.0",
        "pip install --upgrade 'jax[cuda12]==0.10.2'",
        id="plugin-of-another-version",
    ),
    pytest.param(
        versions(jaxlib="0.9.2"),
        "JAX's parts",
        "fail",
        "jaxlib 0.9.2 does not match jax 0.10.2",
        "pip install --upgrade 'jax[cuda12]==0.10.2'",
        id="jaxlib-of-another-version",
    ),
    pytest.param(
        versions(jax_cuda13_plugin="0.10.2"),
        "JAX's parts",
        "warn",
        "cuda12 and cuda13",
        "pip uninstall -y jax-cuda13-plugin",
        id="two-plugins",
    ),
    pytest.param(
        server(software=replace(server().software, packages={"jax": "0.10.2"})),
        "JAX's parts",
        "fail",
        "jaxlib not installed",
        "pip install .",
        id="no-jaxlib",
    ),
    pytest.param(
        server(software=replace(server().software, packages={"jax": "0.10.2"})),
        "libtorrent",
        "fail",
        "is not installed",
        "pip install .",
        id="no-libtorrent",
    ),
    pytest.param(
        server(software=replace(server().software, python="3.14.0rc1")),
        "Python",
        "fail",
        "expected 3.11 to 3.13, found 3.14.0rc1",
        "python3.13 -m venv",
        id="newer-python",
    ),
    pytest.param(
        server(open_files=256),
        "open files",
        "warn",
        "up to 256, expected 1,024: the release has 770",
        "ulimit -n 4096",
        id="few-open-files",
    ),
    pytest.param(
        server(open_files=256, open_files_most=512),
        "open files",
        "warn",
        "up to 256",
        "ulimit -n 512",
        id="few-open-files-at-most",
    ),
    pytest.param(
        server(open_files=256, open_files_most=256),
        "open files",
        "warn",
        "up to 256",
        "sudo prlimit --pid $$ --nofile=4096",
        id="open-files-that-cannot-be-raised",
    ),
    pytest.param(
        server(address_space=8 * GB),
        "address space",
        "warn",
        "limited to 8.0 GB: a run on the CPU maps all weights, 318.2 GB at int8",
        "ulimit -v unlimited  # unless an administrator set the limit",
        id="a-login-node-that-limits-address-space",
    ),
    pytest.param(
        laptop(),
        "memory",
        "warn",
        "24.0 GB of 32.0 GB are free, Grok-1 needs 318.2 GB at int8, 170.5 GB at int4: the rest",
        "--precision int4",
        id="laptop",
    ),
    pytest.param(
        server(memory=Memory(total=256 * GB, available=250 * GB, limit=None)),
        "memory",
        "warn",
        "250.0 GB of 256.0 GB are free, Grok-1 needs 318.2 GB at int8, 170.5 GB at int4",
        "--precision int4",
        id="memory-for-int4",
    ),
    pytest.param(server(), "memory", "ok", "480.0 GB of 512.0 GB", "", id="memory-for-int8"),
    pytest.param(
        replace(EIGHT, memory=Memory(total=64 * GB, available=60 * GB, limit=None)),
        "memory",
        "ok",
        "weights go to the accelerators",
        "",
        id="memory-beside-gpus",
    ),
    pytest.param(
        server(memory=Memory(total=512 * GB, available=500 * GB, limit=64 * GB, used=4 * GB)),
        "memory limit",
        "warn",
        "the cgroup allows 64.0 GB of 512.0 GB, 4.0 GB are used: int4 needs 170.5 GB",
        "docker run --memory=175g",
        id="cgroup",
    ),
    pytest.param(
        told(
            server(memory=Memory(total=512 * GB, available=500 * GB, limit=64 * GB)),
            cluster="Slurm",
        ),
        "memory limit",
        "warn",
        "the cgroup allows 64.0 GB",
        "srun --mem=175G",
        id="cgroup-of-slurm",
    ),
    pytest.param(
        laptop(memory=Memory(total=32 * GB, available=24 * GB, limit=16 * GB)),
        "memory limit",
        "ok",
        "the cgroup allows 16.0 GB of 32.0 GB",
        "",
        id="cgroup-that-binds-nothing",
    ),
    pytest.param(
        box(*[replace(RTX_4090, has_nvlink=False)] * 8, memory=replace(EIGHT.memory, shm=2**26)),
        "/dev/shm",
        "warn",
        "67.1 MB, expected 1.1 GB",
        "mount -o remount",
        id="small-shared-memory",
    ),
    pytest.param(
        replace(EIGHT, memory=replace(EIGHT.memory, shm=2**26)),
        "/dev/shm",
        "ok",
        "grokctl needs none",
        "",
        id="small-shared-memory-beside-nvlink",
    ),
    pytest.param(
        on_disk(free=400 * GB),
        "room in home",
        "warn",
        "400.0 GB are free, expected 318.2 GB to download and 318.2 GB to reshard",
        "grokctl reshard --devices 1 --out DIR",
        id="room-for-the-download",
    ),
    pytest.param(
        on_disk(free=10 * GB),
        "room in home",
        "warn",
        "10.0 GB are free, expected 318.2 GB to download",
        "grokctl fetch --home DIR",
        id="full-disk",
    ),
    pytest.param(
        on_disk(is_writable=False, error="Read-only file system"),
        "home",
        "fail",
        "/data/grokctl cannot be written to (Read-only file system)",
        "grokctl fetch --home DIR",
        id="read-only",
    ),
    pytest.param(
        on_disk(file_system="nfs4", is_remote=True),
        "kind of home",
        "warn",
        "nfs4: on a network",
        "grokctl fetch --home DIR",
        id="nfs",
    ),
    pytest.param(
        on_disk(file_system="tmpfs"),
        "kind of home",
        "warn",
        "uses main memory",
        "grokctl fetch --home DIR",
        id="tmpfs",
    ),
    pytest.param(
        on_disk(file_system="overlay"),
        "kind of home",
        "warn",
        "deleted with the container",
        "grokctl fetch --home DIR",
        id="container",
    ),
    pytest.param(
        on_disk(file_system="vfat"),
        "kind of home",
        "fail",
        "vfat limits files to 4.3 GB: the largest released file has 3.2 GB, a device file 10.7",
        "grokctl fetch --home DIR",
        id="vfat",
    ),
    pytest.param(
        on_disk(read_rate=20e6),
        "speed of home",
        "warn",
        "takes 4.4 hours",
        "grokctl fetch --home DIR",
        id="slow-disk",
    ),
    pytest.param(
        server(disks=(DISK, replace(DISK, purpose="destination", free=GB, total=GB))),
        "room in destination",
        "warn",
        "1.0 GB are free, expected 318.2 GB to download",
        "grokctl fetch --to DIR",
        id="full-destination",
    ),
    pytest.param(
        server(disks=(replace(DISK, free=330 * GB), replace(DISK, purpose="destination"))),
        "room in home",
        "ok",
        "330.0 GB are free, 318.2 GB to reshard fit",
        "",
        id="download-elsewhere",
    ),
    pytest.param(
        server(disks=(DISK, replace(DISK, purpose="destination", is_writable=False))),
        "destination",
        "fail",
        "cannot be written to",
        "grokctl fetch --to DIR",
        id="read-only-destination",
    ),
    pytest.param(
        told(cluster="Slurm", processes=8),
        "job",
        "warn",
        "Slurm starts 8 processes",
        "srun --ntasks-per-node=1 --gpus-per-node=8 --kill-on-bad-exit=1 grokctl run",
        id="slurm",
    ),
    pytest.param(
        told(cluster="Open MPI", processes=4),
        "job",
        "warn",
        "Open MPI starts 4 processes",
        "mpirun --map-by ppr:1:node --bind-to none grokctl run",
        id="open-mpi",
    ),
    pytest.param(told(cluster="Slurm"), "job", "ok", "one process", "", id="one-task"),
    pytest.param(
        told(cluster="Slurm", processes=2, local_processes=1),
        "job",
        "ok",
        "Slurm starts 2 processes, one per host",
        "",
        id="one-task-on-each-of-two-hosts",
    ),
    pytest.param(told(cluster="Cloud TPU", processes=4), "job", "warn", "Cloud TPU", "", id="pod"),
    pytest.param(
        told(XLA_FLAGS="--xla_gpu_autotune_level=0"),
        "XLA_FLAGS",
        "warn",
        "--xla_gpu_autotune_level=0",
        "unset XLA_FLAGS",
        id="xla-flags",
    ),
    pytest.param(told(XLA_FLAGS=" "), "XLA_FLAGS", "ok", "is empty", "", id="no-xla-flags"),
    pytest.param(
        told(server(memory=Memory(total=TB, available=TB, limit=GB)), cluster="Kubernetes"),
        "memory limit",
        "warn",
        "the cgroup allows 1.0 GB of 1.0 TB",
        "kubectl set resources deployment NAME --limits=memory=175Gi",
        id="cgroup-of-kubernetes",
    ),
    pytest.param(
        told(XLA_PYTHON_CLIENT_MEM_FRACTION=".9"),
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "ok",
        "90% of the memory of GPUs, 77.0 GB of each",
        "",
        id="share",
    ),
    pytest.param(
        told(XLA_CLIENT_MEM_FRACTION="all"),
        "XLA_CLIENT_MEM_FRACTION",
        "warn",
        "found all",
        "unset XLA_CLIENT_MEM_FRACTION",
        id="no-share",
    ),
    pytest.param(
        told(NCCL_P2P_DISABLE="1"),
        "NCCL_P2P_DISABLE",
        "warn",
        "slower",
        "unset NCCL_P2P_DISABLE",
        id="nccl",
    ),
    pytest.param(told(NCCL_DEBUG="INFO"), "NCCL_DEBUG", "ok", "INFO", "", id="harmless-nccl"),
    pytest.param(
        told(unused(), LD_LIBRARY_PATH="/usr/local/cuda-11/lib64"),
        "LD_LIBRARY_PATH",
        "warn",
        "take precedence over those of JAX",
        "env -u LD_LIBRARY_PATH grokctl run",
        id="other-libraries",
    ),
    pytest.param(told(TMPDIR="/scratch"), "environment", "ok", "also set: TMPDIR", "", id="others"),
    pytest.param(
        server(network=replace(server().network, proxy="http://proxy:3128")),
        "proxy",
        "warn",
        "http://proxy:3128",
        "grokctl fetch --proxy http://proxy:3128",
        id="proxy",
    ),
    pytest.param(
        server(network=replace(server().network, proxy="https://proxy:3128")),
        "proxy",
        "warn",
        "https://proxy:3128",
        "grokctl fetch --mirror hf",
        id="proxy-for-the-web-only",
    ),
    pytest.param(
        server(network=replace(server().network, has_certificates=False)),
        "certificates",
        "warn",
        "/etc/ca.crt: no such file",
        "unset SSL_CERT_FILE",
        id="no-certificates",
    ),
    pytest.param(
        server(network=replace(server().network, port=None, error="Address in use")),
        "torrent port",
        "warn",
        "Address in use",
        "grokctl fetch --port 0",
        id="no-port",
    ),
]


@pytest.mark.parametrize(("machine", "name", "status", "detail", "fix"), SITUATIONS)
def test_every_situation_has_its_verdict_and_whatever_is_wrong_its_line(
    machine, name, status, detail, fix
):
    found = doctor(machine, EMPTY, question=HERE)

    made = check(found, name)
    assert (made.status, detail in made.detail) == (status, True), made
    assert fix in made.fix
    assert bool(made.fix) == bool(fix)
    assert found.is_ok == all(made.status is not Status.FAIL for made in problems(found))
    for wrong in problems(found):
        assert wrong.fix or any(
            wrong.name == name and words in wrong.detail
            for name, words in CANNOT_BE_MENDED_BY_A_LINE
        ), wrong
    assert all(ability.command or ability.status is Status.SKIP for ability in found.abilities)


def test_nothing_is_wrong_with_a_machine_that_has_everything():
    found = doctor(EIGHT, EMPTY, question=HERE)

    assert not problems(found)
    assert [group.title for group in found.groups] == [
        "accelerators",
        "processor and memory",
        "disks",
        "software",
        "surroundings",
        "network",
    ]
    assert all(group.checks for group in found.groups)
    assert found.is_here
    assert found.hardware.count == 8


# abilities


def test_eight_h100_run_int8_after_a_download_and_a_reshard():
    found = doctor(EIGHT, EMPTY, question=HERE)

    assert [(a.name, a.status) for a in found.abilities] == [
        ("download", "ok"),
        ("reshard", "ok"),
        ("run", "ok"),
    ]
    assert ability(found, "download").command == "grokctl fetch"
    assert (
        "318.2 GB; 8.8 hours at 10 MB/s or 53 minutes at 100 MB/s"
        in ability(found, "download").detail
    )
    assert ability(found, "reshard").command == "grokctl reshard --devices 8"
    assert ability(found, "run").command.startswith("grokctl run -p ")
    assert "int8 on 8 x NVIDIA H100 80GB HBM3" in ability(found, "run").detail
    assert "(estimate)" in ability(found, "run").detail
    assert found.best is not None
    assert (found.best.mesh, found.best.precision) == (MeshShape(1, 8), Precision.INT8)


def test_a_reshard_takes_the_disk_for_reading_and_for_writing():
    one = doctor(EIGHT, EMPTY, question=HERE)
    apart = replace(DISK, purpose="destination", path=Path("/mnt"), free=TB, read_rate=1e9)
    two = doctor(replace(EIGHT, disks=(DISK, apart)), EMPTY, question=HERE)

    read, written = release_nbytes(GROK_1), ready_nbytes(Precision.INT8, MeshShape(1, 8))
    assert (
        f"about {(read / 3e9 + written / 2e9) / 60:.0f} minutes" in ability(one, "reshard").detail
    )
    assert (
        f"about {max(read / 1e9, written / 2e9) / 60:.0f} minutes" in ability(two, "reshard").detail
    )
    assert ability(two, "download").command == "grokctl fetch --to /mnt"
    assert ability(two, "reshard").command == "grokctl reshard /mnt --devices 8"


def test_four_of_80_gb_hold_int4_and_are_told_what_int8_takes():
    found = doctor(box(*[H100] * 4), EMPTY, question=HERE)

    run = ability(found, "run")
    int8 = next(
        plan
        for plan in found.plans
        if plan.precision is Precision.INT8 and plan.mesh == MeshShape(1, 4)
    )
    assert not int8.fits
    assert run.status is Status.WARN
    assert "at int4 only" in run.detail
    assert f"int8 takes {format_bytes(int8.needs.total)} on each, and needs 8 of them" in run.detail
    assert ability(found, "reshard").command == "grokctl reshard --devices 4 --precision int4"


def test_a_laptop_without_room_is_told_what_it_would_take():
    found = doctor(laptop(), EMPTY, question=HERE)

    assert found.is_ok
    assert [a.status for a in found.abilities] == ["fail", "fail", "fail"]
    assert "expected 318.2 GB free, found 150.0 GB" in ability(found, "download").detail
    assert ability(found, "download").command == "grokctl fetch --home DIR"
    assert "seconds per token (estimate)" in ability(found, "run").detail
    assert " x " in ability(found, "run").detail.partition("fits ")[2]


def test_a_laptop_with_room_reads_int4_from_the_disk():
    found = doctor(laptop(disks=(replace(DISK, free=TB),)), EMPTY, question=HERE)

    assert ability(found, "run").status is Status.WARN
    assert "slowly: int4 on the CPU" in ability(found, "run").detail
    assert ability(found, "reshard").command == "grokctl reshard --devices 1 --precision int4"
    assert any(plan.memory is None for plan in found.plans)  # what accelerators would need


def test_a_server_with_512_gb_runs_int8_on_its_processor():
    found = doctor(server(), EMPTY, question=HERE)

    assert ability(found, "run").status is Status.OK
    assert "int8 on the CPU" in ability(found, "run").detail
    assert "of 480.0 GB of memory" in ability(found, "run").detail


def test_a_gpu_that_is_too_small_leaves_the_work_to_the_processor():
    found = doctor(box(RTX_4090), EMPTY, question=HERE)

    run = ability(found, "run")
    assert "1 x NVIDIA GeForce RTX 4090 are too small; int8 on the CPU" in run.detail
    assert run.command.startswith("JAX_PLATFORMS=cpu grokctl run ")
    assert found.hardware.platform == "cpu"


@pytest.mark.parametrize(
    "jax",
    [JaxReport(found=Found.SILENT, seconds=20), JaxReport(found=Found.FAILED, error="oh")],
    ids=["silent", "failed"],
)
def test_plans_are_for_the_gpus_that_jax_should_use(jax):
    found = doctor(replace(EIGHT, jax=jax), EMPTY, question=HERE)

    assert not found.is_ok
    assert found.hardware.count == 8
    assert ability(found, "run").status is Status.FAIL
    assert "JAX must be fixed first; then int8 on 8 x" in ability(found, "run").detail
    assert ability(found, "run").command.startswith("JAX_PLATFORMS=cpu grokctl run")


def test_a_jax_that_is_silent_without_gpus_is_kept_to_the_processor():
    machine = server(jax=JaxReport(found=Found.SILENT, seconds=20))

    found = doctor(machine, EMPTY, question=HERE)

    assert ability(found, "run").command.startswith("JAX_PLATFORMS=cpu grokctl run")


def test_who_hides_gpus_on_purpose_gets_plans_for_the_processor():
    found = doctor(told(unused(), JAX_PLATFORMS="cpu"), EMPTY, question=HERE)

    assert found.is_ok
    assert found.hardware.platform == "cpu"


def kept(**changes) -> KeptRelease:
    whole = KeptRelease(
        name="grok-1",
        root=HOME / "releases" / "grok-1",
        is_grok_1=True,
        nbytes=release_nbytes(GROK_1),
        is_complete=True,
    )
    return replace(whole, **changes)


def ready(precision=Precision.INT8, **changes) -> KeptReady:
    mesh = MeshShape(1, 8)
    whole = KeptReady(
        name=f"grok-1-{precision}-{mesh.slug}",
        root=HOME / "ready" / f"grok-1-{precision}-{mesh.slug}",
        is_grok_1=True,
        precision=precision,
        mesh=mesh,
        nbytes=ready_nbytes(precision, mesh),
        is_whole=True,
    )
    return replace(whole, **changes)


def stock(*found, **changes) -> Inventory:
    return replace(
        EMPTY,
        releases=tuple(item for item in found if isinstance(item, KeptRelease)),
        ready=tuple(item for item in found if isinstance(item, KeptReady)),
        **changes,
    )


@pytest.mark.parametrize(
    ("machine", "download", "reshard"),
    [
        pytest.param(
            on_disk(is_writable=False), "no: /data/grokctl cannot be written to", "no: ", id="ro"
        ),
        pytest.param(on_disk(file_system="vfat"), "yes", "no: a device file has", id="vfat"),
        pytest.param(
            on_disk(free=None), "free space is unknown", "free space is unknown", id="unknown"
        ),
        pytest.param(
            on_disk(write_rate=None), "yes", "time unknown before the download", id="no-rates"
        ),
        pytest.param(on_disk(write_rate=50e6), "at 50 MB/s", "hours", id="slow"),
    ],
)
def test_what_a_disk_allows(machine, download, reshard):
    found = doctor(machine, EMPTY, question=HERE)

    assert download in ability(found, "download").detail
    assert reshard in ability(found, "reshard").detail


def test_a_download_that_is_done_needs_no_room():
    machine = replace(EIGHT, disks=(replace(DISK, free=330 * GB),))

    found = doctor(machine, stock(kept()), question=HERE)

    assert ability(found, "download").status is Status.SKIP
    assert ability(found, "download").command == "grokctl verify /data/grokctl/releases/grok-1"
    assert ability(found, "reshard").status is Status.OK
    assert check(found, "room in home").status is Status.OK


def test_a_download_that_was_begun_needs_room_for_the_rest():
    machine = replace(EIGHT, disks=(replace(DISK, free=330 * GB),))
    begun = kept(nbytes=300 * GB, missing_nbytes=18 * GB, is_complete=False)

    found = doctor(machine, stock(begun), question=HERE)

    assert "18.0 GB, the rest is on disk" in ability(found, "download").detail
    reshard = ability(found, "reshard")
    assert reshard.status is Status.FAIL
    assert "expected 318.4 GB free in addition to the download, found 312.0 GB" in reshard.detail
    assert reshard.command == "grokctl reshard --devices 8 --out DIR"


def test_what_is_ready_is_run():
    machine = replace(EIGHT, disks=(replace(DISK, free=GB),))

    found = doctor(machine, stock(ready()), question=HERE)

    assert ability(found, "download").status is Status.SKIP
    assert ability(found, "reshard").status is Status.SKIP
    assert ability(found, "run").status is Status.OK
    assert not problems(found)


def test_what_is_ready_is_preferred_to_what_could_be_made():
    found = doctor(EIGHT, stock(ready(Precision.INT4)), question=HERE)

    assert found.best is not None
    assert found.best.precision is Precision.INT4
    assert ability(found, "reshard").status is Status.SKIP


def test_what_is_ready_and_too_large_is_cut_again():
    found = doctor(box(*[H100] * 4), stock(ready(), kept()), question=HERE)

    source = "/data/grokctl/releases/grok-1"
    command = f"grokctl reshard {source} --devices 4 --precision int4"
    assert ability(found, "reshard").command == command
    assert ability(found, "reshard").status is Status.OK


def test_what_is_ready_is_cut_again_where_there_is_no_release():
    found = doctor(box(*[H100] * 4), stock(ready()), question=HERE)

    source = "/data/grokctl/ready/grok-1-int8-8"
    command = f"grokctl reshard {source} --devices 4 --precision int4"
    assert ability(found, "download").status is Status.SKIP
    assert ability(found, "reshard").command == command
    assert ability(found, "reshard").detail.startswith("yes, about")


def test_what_was_cut_for_fewer_devices_is_run_as_it_is():
    large = replace(H100, name="large", memory=200 * GB, free=200 * GB)
    there = replace(ready(), name="four", mesh=MeshShape(1, 4))

    found = doctor(box(*[large] * 8), stock(there), question=HERE)

    assert found.best is not None
    assert found.best.mesh == MeshShape(1, 4)
    assert ability(found, "reshard").detail.startswith("done: four")


def test_what_cannot_be_undone_does_not_make_a_download_needless():
    wide = ready(Precision.FLOAT32)

    found = doctor(EIGHT, stock(wide), question=HERE)

    assert ability(found, "download").command == "grokctl fetch"
    assert ability(found, "reshard").command == (
        "grokctl reshard /data/grokctl/releases/grok-1 --devices 8"
    )


def test_gpus_can_run_a_release_for_which_a_ready_checkpoint_has_no_room():
    machine = replace(EIGHT, disks=(replace(DISK, free=GB),))

    found = doctor(machine, stock(kept()), question=HERE)

    assert ability(found, "reshard").status is Status.FAIL
    assert ability(found, "run").status is Status.WARN
    assert "resharded at every start" in ability(found, "run").detail


def test_a_read_only_home_with_a_ready_checkpoint_is_good_enough():
    machine = replace(EIGHT, disks=(replace(DISK, is_writable=False, error="read-only"),))

    found = doctor(machine, stock(ready()), question=HERE)

    assert found.is_ok
    assert check(found, "home").status is Status.WARN
    assert ability(found, "run").status is Status.OK


def test_damaged_checkpoints_are_named_with_the_line_that_looks_at_them():
    broken = ready(is_whole=False, damage="device-00: missing", name="a b", root=HOME / "a b")

    found = doctor(EIGHT, stock(broken, error="/data: Permission denied"), question=HERE)

    made = [made for made in problems(found) if made.name == "checkpoints"]
    assert {made.fix for made in made} == {
        "grokctl verify '/data/grokctl/a b'",
        "ls -ld /data/grokctl",
    }
    assert ability(found, "download").status is Status.OK


def test_a_ready_checkpoint_that_takes_no_text_is_said_so():
    root = HOME / "ready" / "a b"
    mute = KeptReady(
        name="a b",
        root=root,
        is_grok_1=True,
        precision=Precision.INT8,
        mesh=MeshShape(1, 8),
        nbytes=1,
        is_whole=True,
        has_tokenizer=False,
    )

    found = doctor(EIGHT, Inventory(home=HOME, ready=(mute,)), question=HERE)

    made = check(found, "tokenizer")
    assert (made.status, made.fix) == (
        Status.WARN,
        "cp tokenizer.model '/data/grokctl/ready/a b'",
    )


def test_what_is_compressed_cannot_be_read_again_and_again():
    packed = KeptReady(
        name="packed",
        root=HOME / "ready" / "packed",
        is_grok_1=True,
        precision=Precision.INT8,
        mesh=MeshShape(1, 1),
        nbytes=1,
        is_whole=True,
        is_mapped=False,
    )
    small = laptop(disks=(DISK,))

    found = doctor(small, Inventory(home=HOME, ready=(packed,)), question=HERE)
    plain = Inventory(home=HOME, ready=(replace(packed, is_mapped=True),))

    assert ability(found, "reshard").status is Status.OK
    assert ability(doctor(small, plain, question=HERE), "reshard").status is Status.SKIP


def test_commands_name_a_home_that_is_not_the_default():
    there = Path("/big disk")

    found = doctor(EIGHT, Inventory(home=there, is_default=False), question=HERE)

    assert [a.command.endswith("--home '/big disk'") for a in found.abilities] == [True] * 3


def test_a_release_among_others_is_named():
    other = kept(name="two", root=HOME / "releases" / "two", is_grok_1=False)

    found = doctor(EIGHT, stock(kept(), other), question=HERE)

    command = ability(found, "reshard").command
    assert command == "grokctl reshard /data/grokctl/releases/grok-1 --devices 8"


# questions


def test_hardware_that_is_not_here_needs_no_machine():
    found = doctor(None, question=Question(devices=8, memory=80 * GB))

    assert not found.groups
    assert not found.is_here
    assert found.is_ok
    assert [a.command.split(" -p ")[0] for a in found.abilities] == [
        "grokctl reshard --devices 8",
        "grokctl run",
    ]


def test_the_fewest_devices_are_named_where_nobody_says_how_many():
    found = doctor(None, question=Question(accelerator="h100"))

    assert found.best is not None
    assert found.best.mesh == MeshShape(1, 8)


def test_who_can_never_have_int8_is_told_what_has():
    found = doctor(None, question=Question(accelerator="tpu-v5e", devices=16))

    assert "at int4 only, on 16 x TPU v5e 16GB" in ability(found, "run").detail
    assert "8 x L40S 48GB" in ability(found, "run").detail


def test_hardware_that_holds_nothing_is_not_ok():
    found = doctor(EIGHT, EMPTY, question=Question(accelerator="rtx-4090", devices=1))

    run = ability(found, "run")
    assert not found.is_ok
    assert not found.groups
    assert run.status is Status.FAIL
    assert "needs" in run.detail
    assert re.search("are available; (8|16) of them hold int[48]", run.detail)


def test_a_context_that_only_a_small_memory_asks_for_is_said():
    machine = laptop(memory=Memory(total=2 * GB, available=GB, limit=None, shm=0))

    found = doctor(machine, EMPTY, question=HERE)

    assert found.best is not None
    assert found.best.context < GROK_1.sequence_len
    assert f"context {found.best.context:,}" in ability(found, "run").detail


def test_of_gpus_that_were_chosen_already_those_of_one_kind_keep_their_numbers():
    mixed = told(box(H100, RTX_4090, H100), CUDA_VISIBLE_DEVICES="4,5,7")

    assert check(doctor(mixed, EMPTY, question=HERE), "one kind").fix == (
        "export CUDA_VISIBLE_DEVICES=4,7"
    )


def test_a_processor_without_room_for_anything_is_told_what_it_needs_beside_the_weights():
    machine = laptop(memory=Memory(total=GB, available=GB // 2, limit=None, shm=0))

    found = doctor(machine, EMPTY, question=HERE)

    plan = found.plans[0]
    assert plan.is_paged
    assert not plan.fits
    beside = format_bytes(plan.needs.cache + plan.needs.workspace)
    assert f"needs {beside} even with the weights on disk" in ability(found, "run").detail


def every_cut(platform: str) -> list[Candidate]:
    """Grok-1 as it can be cut, a candidate for each mesh and precision."""
    own = released_storage(GROK_1)
    return [
        Candidate(
            name=f"{precision}-{mesh}",
            storage=storage_in(own, precision, mesh),
            mesh=mesh,
            is_mapped=True,
        )
        for precision, mesh in product(PRECISIONS, MESHES[:1] if platform == "cpu" else MESHES)
    ]


@pytest.mark.parametrize("asked", [{}, {"batch": 8, "context": 1024, "kv": KvType.INT8}], ids=str)
@pytest.mark.parametrize(
    "named",
    [
        {"devices": 8, "memory": 80 * GB},
        {"devices": 4, "memory": 141 * GB},
        {"devices": 4, "memory": 80 * GB},
        {"devices": 16, "memory": 40 * GB},
        {"devices": 16, "memory": 24 * GB},
        {"devices": 8, "memory": 48 * GB},
        {"devices": 1, "memory": 80 * GB},
        {"devices": 2, "memory": 192 * GB},
        {"devices": 8, "accelerator": "rtx-4090"},
        {"devices": 16, "accelerator": "tpu-v5e"},
        {"memory": 512 * GB, "accelerator": "cpu"},
        {"memory": 200 * GB, "accelerator": "cpu"},
        {"memory": 24 * GB, "accelerator": "cpu"},
        {"memory": GB, "accelerator": "cpu"},
    ],
    ids=str,
)
def test_what_doctor_would_run_is_what_run_chooses(named, asked):
    best = doctor(None, question=Question(**named, **asked)).best

    hardware = hardware_for(**named)
    wanted = Asked(
        context=asked.get("context"),
        streams=asked.get("batch", 1),
        kv=asked.get("kv", KvType.COMPUTE),
    )
    try:
        chosen = choose(hardware, every_cut(hardware.platform), wanted).plan
    except HardwareError:
        chosen = None
    assert best == chosen


def test_a_context_that_is_asked_for_is_in_the_command():
    question = Question(devices=8, memory=80 * GB, context=1024, kv=KvType.INT8)

    found = doctor(None, question=question)

    assert ability(found, "run").command.endswith("--context 1024 --kv int8")
    assert all(plan.context == 1024 for plan in found.plans)


def test_a_batch_comes_from_a_file():
    found = doctor(None, question=Question(devices=8, memory=80 * GB, batch=4))

    command = ability(found, "run").command
    assert command == "grokctl run --prompts-file prompts.jsonl --batch 4"


def test_a_shorter_context_is_taken_where_only_that_fits():
    sizes = [
        plan.needs
        for plan in doctor(None, question=Question(devices=8, memory=80 * GB)).plans
        if plan.precision is Precision.INT8 and plan.mesh == MeshShape(1, 8)
    ]
    room = sizes[0].weights + sizes[0].workspace  # nothing for keys and values
    tight = replace(H100, memory=None, free=room + sizes[0].cache // 2)

    found = doctor(box(*[tight] * 8), EMPTY, question=HERE)

    assert found.best is not None
    assert found.best.precision is Precision.INT8
    assert 512 <= found.best.context < GROK_1.sequence_len
    assert f"context {found.best.context:,}" in ability(found, "run").detail


def test_questions_that_cannot_be_meant_are_refused():
    with pytest.raises(UsageError):
        doctor(None, question=Question(accelerator="abacus"))
    with pytest.raises(PlacementError):
        doctor(None, question=Question(devices=3, memory=80 * GB))


# whatever comes

words = st.sampled_from(["", "gpu", "tpu", "cpu", "0", "0.10.2", "x\ny", "-1", "nan", "∞", "\0"])
sizes = st.integers(0, 2**63)
maybe = st.none() | sizes
rates = st.none() | st.floats(0, 1e13)
gpus = st.lists(
    st.builds(
        Accelerator,
        name=words,
        platform=st.sampled_from(["gpu", "tpu"]),
        memory=maybe,
        free=maybe,
        compute_capability=st.none() | st.tuples(st.integers(0, 99), st.integers(0, 9)),
        has_nvlink=st.none() | st.booleans(),
    ),
    max_size=17,
).map(tuple)
names = st.sampled_from(
    [
        "JAX_PLATFORMS",
        "XLA_FLAGS",
        "CUDA_VISIBLE_DEVICES",
        "XLA_CLIENT_MEM_FRACTION",
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "XLA_PYTHON_CLIENT_PREALLOCATE",
        "NCCL_P2P_DISABLE",
        "LD_LIBRARY_PATH",
        "JAX_NUM_CPU_DEVICES",
        "TMPDIR",
    ]
)
packages = st.sampled_from([*CUDA, "jax-cuda13-plugin", "jax_cuda", "jax-cuda-plugin", "numpy"])
machines = st.builds(
    Machine,
    nvml=st.builds(
        Nvml,
        found=st.sampled_from(Found),
        error=words,
        driver=words,
        cuda=st.sampled_from(["", "11.8", "12.8", "?"]),
        gpus=gpus,
    ),
    jax=st.builds(
        JaxReport,
        found=st.sampled_from(Found),
        error=words,
        platform=st.sampled_from(["", "cpu", "gpu", "tpu"]),
        accelerators=gpus,
        seconds=st.floats(0, 1e6),
    ),
    cpu=st.builds(
        Cpu,
        model=words,
        architecture=words,
        cores=st.integers(1, 9999),
        flags=st.lists(words).map(tuple),
        bandwidth=rates,
    ),
    memory=st.builds(Memory, total=sizes, available=sizes, limit=maybe, used=sizes, shm=maybe),
    disks=st.lists(
        st.builds(
            Disk,
            purpose=st.sampled_from(["home", "destination"]),
            path=st.sampled_from([HOME, Path("/a b/'$(x)")]),
            total=maybe,
            free=maybe,
            file_system=st.sampled_from(["", "ext4", "vfat", "tmpfs", "nfs", "overlay"]),
            is_remote=st.booleans(),
            is_writable=st.booleans(),
            write_rate=rates,
            read_rate=rates,
            error=words,
        ),
        max_size=3,
    ).map(tuple),
    software=st.builds(
        Software,
        grokctl=words,
        python=words,
        system=words,
        packages=st.dictionaries(packages, words),
    ),
    surroundings=st.builds(
        Surroundings,
        cluster=st.sampled_from(["", "Slurm", "Open MPI", "Kubernetes", "Cloud TPU", "?"]),
        processes=st.integers(0, 2**20),
        local_processes=st.integers(0, 2**20),
        variables=st.dictionaries(names, words),
    ),
    network=st.builds(
        Network,
        proxy=words,
        certificates=words,
        has_certificates=st.booleans(),
        port=st.none() | st.integers(1, 65535),
        error=words,
    ),
    open_files=st.integers(0, 2**63),
    open_files_most=st.integers(0, 2**63),
)
stocks = st.lists(
    st.one_of(
        st.builds(
            KeptRelease,
            name=st.sampled_from(["grok-1", "x\ny", "-rf"]),
            root=st.just(HOME),
            is_grok_1=st.booleans(),
            nbytes=sizes,
            missing_nbytes=sizes,
            is_complete=st.booleans(),
            damage=words,
        ),
        st.builds(
            KeptReady,
            name=st.sampled_from(["grok-1", "x\ny", "-rf"]),
            root=st.just(HOME),
            is_grok_1=st.booleans(),
            precision=st.none() | st.sampled_from(Precision),
            mesh=st.none()
            | st.sampled_from([MeshShape(*shape) for shape in product((1, 2), (1, 8))]),
            nbytes=sizes,
            is_whole=st.booleans(),
            damage=words,
        ),
    ),
    max_size=3,
).map(lambda found: stock(*found))


@given(machine=machines, inventory=stocks)
@settings(max_examples=30, deadline=None)
def test_no_machine_is_too_strange(machine, inventory):
    found = doctor(machine, inventory, question=HERE)

    assert [a.name for a in found.abilities] == ["download", "reshard", "run"]
    assert all(made.name and made.detail for group in found.groups for made in group.checks)
    assert not any("None" in made.detail for group in found.groups for made in group.checks)


def test_a_machine_of_which_nothing_is_known_is_no_reason_to_fail():
    nothing = Machine(
        nvml=Nvml(found=Found.ABSENT),
        jax=JaxReport(found=Found.OK),
        cpu=Cpu(model="", architecture="", cores=1, flags=(), bandwidth=None),
        memory=Memory(total=0, available=0, limit=None),
        disks=(),
        software=Software(grokctl="", python="", system="", packages=PLAIN),
        surroundings=Surroundings(cluster="", processes=1, local_processes=1, variables={}),
        network=Network(proxy="", certificates="", has_certificates=False, port=None),
        open_files=1024,
        open_files_most=1024,
    )

    found = doctor(nothing, EMPTY, question=HERE)

    assert found.is_ok
    assert [a.status for a in found.abilities] == ["skip", "skip", "fail"]
