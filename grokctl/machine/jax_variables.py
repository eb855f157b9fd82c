"""Environment variables of JAX and XLA: those set aside, and whether JAX starts with the rest."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

OWN: Final[Mapping[str, str]] = {
    "JAX_ENABLE_X64": "64-bit numbers",
    "JAX_DEFAULT_DTYPE_BITS": "the width of numbers",
    "JAX_DEFAULT_MATMUL_PRECISION": "the precision of products",
    "JAX_NUMPY_DTYPE_PROMOTION": "the promotion of types",
    "JAX_NUMPY_RANK_PROMOTION": "the promotion of ranks",
    "JAX_USE_SHARDY_PARTITIONER": "the partitioner",
    "JAX_DISABLE_JIT": "compilation",
    "JAX_DYNAMIC_SHAPES": "compilation",
    "JAX_DEFAULT_PRNG_IMPL": "random numbers",
    "JAX_ENABLE_CUSTOM_PRNG": "random numbers",
    "JAX_THREEFRY_PARTITIONABLE": "random numbers",
    "JAX_THREEFRY_GPU_KERNEL_LOWERING": "random numbers",
    "JAX_LEGACY_PRNG_KEY": "random numbers",
    "JAX_TRANSFER_GUARD": "transfers",
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE": "transfers",
    "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE": "transfers",
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST": "transfers",
    "JAX_DEBUG_NANS": "checks of every value",
    "JAX_DEBUG_INFS": "checks of every value",
    "JAX_ENABLE_CHECKS": "checks of every step",
    "JAX_CHECK_TRACER_LEAKS": "checks of every step",
    "JAX_NO_EXECUTION": "execution",
    "JAX_NO_TRACING": "compilation",
    "JAX_DEFAULT_DEVICE": "the device",
    "JAX_SOFTMAX_CUSTOM_JVP": "the arithmetic",
    "JAX_CPU_ENABLE_ASYNC_DISPATCH": "the order of execution",
}
"""Variables that change what JAX computes, and what they change: JAX's own default is needed."""
_USERS: Final = re.compile(
    "JAX_(PLATFORMS|COMPILATION_CACHE_DIR|COORDINATOR_ADDRESS|COORDINATOR_IP"
    "|LOG_COMPILES|TRACEBACK_FILTERING|LOGGING_LEVEL)"
    "|XLA_(PYTHON_)?CLIENT_.*"
)
"""Variables that JAX cannot fail to read."""
_PLAIN: Final = re.compile("-?[0-9.]+|true|false", re.IGNORECASE)
"""Values that numbers and switches may have."""
_READ_AT_START: Final = re.compile("JAX_[A-Z0-9_]+|XLA_FLAGS|LIBTPU_INIT_ARGS|TF_XLA_FLAGS")
_TIMEOUT_S: Final = 60
_START: Final = """
import resource
space, most = resource.getrlimit(resource.RLIMIT_AS)
if space != resource.RLIM_INFINITY:
    resource.setrlimit(resource.RLIMIT_AS, (max(1, space - 2**30), most))  # a run needs more
import jax
jax.devices()
if space != resource.RLIM_INFINITY:
    jax.jit(lambda x: x @ x)(jax.numpy.ones((64, 64))).block_until_ready()
"""
"""An address space that is too small ends the process, too: the trial has a GiB less."""
_LOG: Final = re.compile(r"^[A-Z]\d{4} [\d:.]+ +\d+ [\w.]+:\d+\] ")


def doubtful(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Variables with which JAX may not start: flags of compilers, and values of JAX's own."""
    return tuple(
        name
        for name in sorted(environ)
        if _READ_AT_START.fullmatch(name)
        and environ[name].strip()
        and name not in OWN
        and not (_USERS.fullmatch(name) or _PLAIN.fullmatch(environ[name].strip()))
    )


def start_failure(
    environ: Mapping[str, str], *, always: bool = False
) -> tuple[str, tuple[str, ...]] | None:
    """Start JAX on the CPU in a process of its own, if a variable is doubtful.

    A flag that XLA does not know ends the process, and no code can catch that.

    Args:
        environ: The variables.
        always: Whether to start it without a doubtful variable, too.

    Returns:
        Why it does not start, and the variables to unset, if it is due to them; None if it starts.
    """
    names = doubtful(environ)
    if not names and not always:
        return None
    child = {**{k: v for k, v in environ.items() if k not in OWN}, "JAX_PLATFORMS": "cpu"}
    with suppress(subprocess.TimeoutExpired, OSError):
        done = subprocess.run(  # noqa: S603 (our own interpreter)
            [sys.executable, "-P", "-c", _START],
            env=child,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
            cwd=os.sep,
        )
        if done.returncode == 0:
            return None
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        fatal = [line for line in lines if line.startswith("F")]
        why = _LOG.sub("", (fatal or lines or ["ends without a word"])[-1])
        named = [name for name in names if name in why or name.lower() in why]
        return why, tuple(named) or (() if always else names)
    return None
