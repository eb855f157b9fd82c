"""Machines as `doctor` meets them, and how to look at what it finds."""

from dataclasses import replace
from pathlib import Path

from grokctl.checks import Status
from grokctl.diagnosis.inventory import (
    Inventory,
    KeptReady,
    KeptRelease,
)
from grokctl.doctor import Ability, Diagnosis, Question, doctor
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


def assert_verdict(machine, name, status, detail, fix):
    """One check has its verdict, and every problem has a fix to paste where there can be one."""
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


def stock(*found, **changes) -> Inventory:
    return replace(
        EMPTY,
        releases=tuple(item for item in found if isinstance(item, KeptRelease)),
        ready=tuple(item for item in found if isinstance(item, KeptReady)),
        **changes,
    )
