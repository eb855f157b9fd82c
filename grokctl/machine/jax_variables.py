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
    "JAX_RAISE_PERSISTENT_CACHE_ERRORS": "errors of kept programs",
    "JAX_DEFAULT_DEVICE": "the device",
    "JAX_SOFTMAX_CUSTOM_JVP": "the arithmetic",
    "JAX_CPU_ENABLE_ASYNC_DISPATCH": "the order of execution",
}
"""Variables that change what JAX computes, and what they change: JAX's own default is needed."""
_FINE: Final = re.compile(
    r"JAX_(PLATFORMS|COMPILATION_CACHE_DIR|COORDINATOR_(ADDRESS|IP|BIND_ADDRESS))=.*"
    r"|JAX_NUM_CPU_DEVICES=[0-9]{1,4}"
    r"|JAX_(LOG_COMPILES|EXPLAIN_CACHE_MISSES|DISABLE_MOST_OPTIMIZATIONS|ENABLE_PGLE"
    r"|ENABLE_COMPILATION_CACHE)=(0|1|true|false|on|off|yes|no)"
    r"|JAX_LOGGING_LEVEL=(debug|info|warning|error|critical)"
    r"|JAX_TRACEBACK_FILTERING=(off|tracebackhide|remove_frames|quiet_remove_frames|auto)"
    r"|JAX_COMPILATION_CACHE_MAX_SIZE=-1"
    r"|JAX_PERSISTENT_CACHE_MIN_(COMPILE_TIME_SECS|ENTRY_SIZE_BYTES)=(-1|[0-9]{1,12})"
    r"|XLA_(PYTHON_)?CLIENT_MEM_FRACTION=[0-9]*\.?[0-9]+"
    r"|XLA_PYTHON_CLIENT_PREALLOCATE=.*"
    r"|XLA_PYTHON_CLIENT_ALLOCATOR=(default|platform|bfc|cuda_async)",
    re.IGNORECASE | re.DOTALL,
)
"""Variables and values with which JAX certainly starts, so that no trial is needed."""
_READ_AT_START: Final = re.compile(
    "JAX_[A-Z0-9_]+|XLA_FLAGS|LIBTPU_INIT_ARGS|TF_XLA_FLAGS|XLA_(PYTHON_)?CLIENT_[A-Z0-9_]+"
)
_TIMEOUT_S: Final = 60
_START: Final = """
import os, resource
is_limited = False
for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
    space, most = resource.getrlimit(kind)
    if space != resource.RLIM_INFINITY:
        is_limited = True
        resource.setrlimit(kind, (max(1, space - 2**30), most))  # a run needs more
import jax
from jaxlib import xla_client
read_for_a_gpu = getattr(xla_client, "generate_pjrt_gpu_plugin_options", None)
if read_for_a_gpu is not None:
    read_for_a_gpu()
jax.devices()
if is_limited or "JAX_DUMP_IR_TO" in os.environ:
    jax.jit(lambda x: x @ x)(jax.numpy.ones((64, 64))).block_until_ready()
"""
"""A limit of memory that is too small ends the process, too: the trial has a GiB less. JAX makes
the folder of its dumps when it compiles."""
_LOG: Final = re.compile(r"^([EF])\d{4} [\d:.]+ +\d+ [\w.]+:\d+\] (?:Check failed: .*\) )?")
"""The beginning of a line that XLA logs: an error, or what ended the process."""
_RAISED: Final = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Warning)\b")
"""The beginning of the line with what Python raised."""


def doubtful(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Variables with which JAX may not start: flags of compilers, and values of JAX's own."""
    return tuple(
        name
        for name in sorted(environ)
        if _READ_AT_START.fullmatch(name)
        and environ[name].strip()
        and name not in OWN
        and not _FINE.fullmatch(f"{name}={environ[name].strip()}")
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
    unread = OWN.keys() | {"JAX_COMPILATION_CACHE_DIR"}  # a run has its own cache
    child = {**{k: v for k, v in environ.items() if k not in unread}, "JAX_PLATFORMS": "cpu"}
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
        why = _reason_in(done.stderr.decode(errors="replace"))
        return why, _blamed(names, environ, why) or (() if always else names)
    return None


def _reason_in(stderr: str) -> str:
    """The line of a failed start that tells why: XLA's error, or what Python raised."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    logged = [(match[1], line[match.end() :]) for line in lines if (match := _LOG.match(line))]
    if any(level == "F" for level, _ in logged):
        return next((text for level, text in logged if level == "E"), logged[-1][1])
    raised = [line for line in lines if _RAISED.match(line)]
    return (raised or lines or ["ends without a word"])[-1]


def _blamed(names: tuple[str, ...], environ: Mapping[str, str], why: str) -> tuple[str, ...]:
    """The variables that a reason names, or else those whose value it quotes."""
    named = tuple(name for name in names if name in why or name.lower() in why)
    return named or tuple(name for name in names if environ[name].strip() in why)
