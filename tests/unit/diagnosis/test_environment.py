from dataclasses import replace

import pytest
from machines import GB, TB, assert_verdict, server, told, unused

from grokctl.machine.facts import (
    Memory,
)

SITUATIONS_ENVIRONMENT = [
    # machine, check, status, words of its detail, words of its fix
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
    *(
        pytest.param(told(**{name: "1"}), name, "warn", "changes compilation", f"unset {name}")
        for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_OPTIMIZATION_LEVEL", "JAX_ENABLE_PGLE")
    ),
    pytest.param(
        told(HF_ENDPOINT="https://hub.example"),
        "HF_ENDPOINT",
        "ok",
        "https://hub.example: where --mirror hf fetches from",
        "",
        id="hub",
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


@pytest.mark.parametrize(("machine", "name", "status", "detail", "fix"), SITUATIONS_ENVIRONMENT)
def test_every_situation_of_environment_has_its_verdict_and_its_fix(
    machine, name, status, detail, fix
):
    assert_verdict(machine, name, status, detail, fix)
