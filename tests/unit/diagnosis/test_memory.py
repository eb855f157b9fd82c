from dataclasses import replace

import pytest
from machines import EIGHT, GB, RTX_4090, assert_verdict, box, laptop, server, told

from grokctl.machine.facts import Found, KernelReport, Memory, Node

NO_COMPILER = KernelReport(
    found=Found.ABSENT, reason="no C++ compiler", fix="sudo apt-get install g++"
)
TWO_NODES = tuple(
    Node(number=number, cores=cores, usable=32, memory=384 * GB)
    for number, cores in enumerate(("0-31", "32-63"))
)

SITUATIONS_MEMORY = [
    # machine, check, status, words of its detail, words of its fix
    pytest.param(
        server(kernel=KernelReport(found=Found.OK, instruction_set="avx2", rate=171e9)),
        "kernel",
        "ok",
        "native, avx2, reads weights at 171.0 GB/s",
        "",
        id="kernel",
    ),
    pytest.param(
        server(kernel=NO_COMPILER),
        "kernel",
        "warn",
        "none: no C++ compiler; XLA multiplies, decoding reaches 60% of the bandwidth",
        "sudo apt-get install g++",
        id="no-compiler",
    ),
    pytest.param(
        server(kernel=KernelReport(found=Found.ABSENT, reason="there is none for Darwin")),
        "kernel",
        "skip",
        "none: there is none for Darwin",
        "",
        id="no-kernel-for-the-system",
    ),
    pytest.param(
        server(nodes=TWO_NODES),
        "memory nodes",
        "warn",
        "2: 0 (cores 0-31, 384.0 GB), 1 (cores 32-63, 384.0 GB): one process waits",
        "for n in 0 1; do numactl --cpunodebind=$n --preferred=$n grokctl run -p",
        id="two-nodes",
    ),
    pytest.param(
        server(nodes=(*TWO_NODES, replace(TWO_NODES[0], number=2))),
        "memory nodes",
        "warn",
        "3: 0",
        "--num-processes 2 --process-id $n & done; wait",
        id="three-nodes",
    ),
    pytest.param(
        server(nodes=(TWO_NODES[0], replace(TWO_NODES[1], usable=0, memory=None))),
        "memory nodes",
        "ok",
        "2: 0 (cores 0-31, 384.0 GB), 1 (cores 32-63)",
        "",
        id="bound-to-one-node",
    ),
    pytest.param(
        replace(EIGHT, nodes=TWO_NODES),
        "memory nodes",
        "ok",
        "2: 0",
        "",
        id="two-nodes-beside-gpus",
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
]


@pytest.mark.parametrize(("machine", "name", "status", "detail", "fix"), SITUATIONS_MEMORY)
def test_every_situation_of_memory_has_its_verdict_and_its_fix(machine, name, status, detail, fix):
    assert_verdict(machine, name, status, detail, fix)
