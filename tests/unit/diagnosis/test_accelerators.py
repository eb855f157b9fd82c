from dataclasses import replace

import pytest
from machines import EIGHT, GB, H100, PLAIN, RTX_4090, assert_verdict, box, server, told, unused

from grokctl.machine.facts import (
    Found,
    JaxReport,
    Nvml,
)

SITUATIONS_ACCELERATORS = [
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
]


@pytest.mark.parametrize(("machine", "name", "status", "detail", "fix"), SITUATIONS_ACCELERATORS)
def test_every_situation_of_accelerators_has_its_verdict_and_its_fix(
    machine, name, status, detail, fix
):
    assert_verdict(machine, name, status, detail, fix)
