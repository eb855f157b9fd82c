from dataclasses import replace

import pytest
from machines import EIGHT, GB, RTX_4090, assert_verdict, box, laptop, server, told

from grokctl.machine.facts import (
    Memory,
)

SITUATIONS_MEMORY = [
    # machine, check, status, words of its detail, words of its fix
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
]


@pytest.mark.parametrize(("machine", "name", "status", "detail", "fix"), SITUATIONS_MEMORY)
def test_every_situation_of_memory_has_its_verdict_and_its_fix(machine, name, status, detail, fix):
    assert_verdict(machine, name, status, detail, fix)
