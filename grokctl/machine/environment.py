"""The launcher of this process, its environment variables, and installed software."""

import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from typing import Final

from grokctl import __version__
from grokctl.machine.facts import Software, Surroundings
from grokctl.text import printable, shown_url

_MOST_PROCESSES: Final = 2**20
_SLURM: Final = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
"""JAX joins a job if all of these are set; a job script and `salloc` do not set all."""
_TPU: Final = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_ID", "TPU_NAME")
_NAMES: Final = re.compile(
    r"(XLA|JAX|PJRT|NCCL|RCCL|TPU|LIBTPU|MEGASCALE|GROKCTL)_\w+|TF_(CPP_MIN_LOG_LEVEL|XLA_FLAGS)"
    r"|NVIDIA_TF32_OVERRIDE|CUDA_(LAUNCH_BLOCKING|DEVICE_MAX_CONNECTIONS)"
    r"|(CUDA|HIP|ROCR)_VISIBLE_DEVICES|CUDA_DEVICE_ORDER|HSA_OVERRIDE_GFX_VERSION"
    r"|LD_(LIBRARY_PATH|PRELOAD)|OMP_NUM_THREADS|PYTHONPATH|TMPDIR"
    r"|HF_ENDPOINT|SSL_CERT_(FILE|DIR)|(HTTPS?|ALL|NO)_PROXY|(https?|all|no)_proxy",
    re.ASCII,
)
_SECRET: Final = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
PUBLIC: Final = frozenset(
    {
        "JAX_LEGACY_PRNG_KEY",
        "JAX_DEBUG_KEY_REUSE",
        "JAX_COMPILATION_CACHE_INCLUDE_METADATA_IN_KEY",
        "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY",
        "JAX_COMPILER_ENABLE_REMAT_PASS",
        "JAX_DISTRIBUTED_VERIFY_SECURE_CREDENTIALS",
        "JAX_MTLS_KEY_FILE",
        "NCCL_IB_PKEY",
    }
)
"""Variables of JAX and NCCL that hold no secret, though their names look like it."""
_LOGIN: Final = re.compile(r"\A([a-z][a-z0-9+.-]*://)?.*@", re.IGNORECASE | re.DOTALL)
_PASSWORD: Final = re.compile(r"(?<=//)[^/@\s]*@")
"""User name and password before a host, inside other text."""
_PACKAGES: Final = re.compile(
    r"(jax|jaxlib|jax[-_](cuda|rocm|metal|tpu)[-_\w]*|libtpu[-_\w]*|numpy|ml[-_]dtypes|scipy"
    r"|libtorrent|nvidia[-_](nccl|cudnn|cublas|cuda[-_]runtime|cuda[-_]nvcc)[-_\w]*|nvidia-ml-py"
    r"|zstandard|sentencepiece|httpx|psutil)",
    re.IGNORECASE,
)


def surroundings(environ: Mapping[str, str]) -> Surroundings:
    """Inspect the environment, as JAX does before it joins a job.

    Args:
        environ: Secrets in it are dropped.
    """
    cluster, processes, local_processes = _cluster(environ)
    return Surroundings(
        cluster=cluster,
        processes=processes,
        local_processes=min(local_processes, processes),
        variables={
            name: _harmless(name, environ[name])
            for name in sorted(environ)
            if _NAMES.fullmatch(name) and (name in PUBLIC or not _SECRET.search(name))
        },
    )


def without_password(proxy: str) -> str:
    """A proxy's address without user name and password, whatever characters those have."""
    return _LOGIN.sub(r"\1", proxy)


def _harmless(name: str, value: str) -> str:
    """A value that can be shown, even if it is not text."""
    text = value.encode(errors="surrogateescape").decode(errors="replace")
    if "proxy" not in name.lower():
        return _PASSWORD.sub("", text)
    return text if name.lower() == "no_proxy" else shown_url(without_password(text))


def _cluster(environ: Mapping[str, str]) -> tuple[str, int, int]:
    """The launcher, its processes, and those on this host; checked in the order of JAX."""
    if "OMPI_MCA_orte_hnp_uri" in environ or "OMPI_COMM_WORLD_SIZE" in environ:
        here = _count(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
        return "Open MPI", _count(environ, "OMPI_COMM_WORLD_SIZE"), here
    if "SLURM_JOB_ID" in environ:
        if not environ.keys() >= set(_SLURM):
            return "Slurm", 1, 1
        return "Slurm", _count(environ, "SLURM_NTASKS"), _slurm_local(environ)
    if any(name in environ for name in _TPU):
        hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
        return "Cloud TPU", min(hosts.count(",") + 1, _MOST_PROCESSES), 1
    return ("Kubernetes" if "KUBERNETES_SERVICE_HOST" in environ else ""), 1, 1


def _slurm_local(environ: Mapping[str, str]) -> int:
    """Tasks of this step on this host, from a list such as `2(x3),1`."""
    node = _number(environ.get("SLURM_NODEID", "")) or 0
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:\(x(\d{1,9})\))?", part, re.ASCII)
        if match is None:
            break
        node -= int(match[2] or 1)
        if node < 0:
            return max(1, int(match[1]))
    if each := _number(environ.get("SLURM_NTASKS_PER_NODE", "")):
        return each
    nodes = _count(environ, "SLURM_STEP_NUM_NODES")
    return -(-_count(environ, "SLURM_NTASKS") // nodes)


def _count(environ: Mapping[str, str], name: str) -> int:
    return max(1, _number(environ.get(name, "")) or 1)


def _number(text: str) -> int | None:
    return min(int(text), _MOST_PROCESSES) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else None


def software() -> Software:
    """Versions of installed software; nothing is imported."""
    library = " ".join(platform.libc_ver())
    system = f"{platform.system()} {platform.release()}" + (
        f", {library}" if library.strip() else ""
    )
    return Software(
        grokctl=__version__,
        python=platform.python_version(),
        system=printable(system),
        packages=dict(sorted(_packages())),
    )


def _packages() -> Iterator[tuple[str, str]]:
    """Name and version of relevant packages; the first of a name is the one that Python imports."""
    seen: set[str] = set()
    for distribution in metadata.distributions():
        with suppress(KeyError, OSError, ValueError, TypeError):  # broken metadata
            about = distribution.metadata
            if "Name" not in about or "Version" not in about:
                continue
            name, version = about["Name"], about["Version"]
            if _PACKAGES.fullmatch(name) and name.lower() not in seen:
                seen.add(name.lower())
                yield printable(name), printable(version)
