from dataclasses import replace

import pytest
from machines import CUDA, EIGHT, GB, assert_verdict, server

from grokctl.machine.facts import (
    Found,
    JaxReport,
    Machine,
)


def versions(**packages) -> Machine:
    known = CUDA | {name.replace("_", "-"): version for name, version in packages.items()}
    return replace(EIGHT, software=replace(EIGHT.software, packages=known))


SITUATIONS_SOFTWARE = [
    # machine, check, status, words of its detail, words of its fix
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
        server(data_segment=8 * GB),
        "data segment",
        "warn",
        "limited to 8.0 GB",
        "ulimit -d unlimited  # unless an administrator set the limit",
        id="a-login-node-that-limits-the-data-segment",
    ),
    pytest.param(
        server(data_segment=GB // 2, jax=JaxReport(found=Found.FAILED, error="ImportError")),
        "data segment",
        "fail",
        "limited to 500.0 MB: JAX does not start",
        "ulimit -d unlimited",
        id="a-limit-of-memory-with-which-jax-does-not-start",
    ),
]


@pytest.mark.parametrize(("machine", "name", "status", "detail", "fix"), SITUATIONS_SOFTWARE)
def test_every_situation_of_software_has_its_verdict_and_its_fix(
    machine, name, status, detail, fix
):
    assert_verdict(machine, name, status, detail, fix)
