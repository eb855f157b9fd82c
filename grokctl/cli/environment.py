"""Set the environment variables that JAX and OpenSSL read; nothing below `cli` sets any."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final

from grokctl.errors import HardwareError, UsageError, invalid
from grokctl.paths import unquoted
from grokctl.system import usable_cores
from grokctl.text import printable, shown_url

_LONGEST: Final = 200
_BLAS_THREADS: Final = "OPENBLAS_NUM_THREADS"
_XLA_THREADS: Final = "PJRT_NPROC"
"""Read by XLA when it starts on the CPU; without it, it takes the cores of the affinity mask."""


def one_thread_of_blas() -> None:
    """Keep numpy's OpenBLAS from starting threads, unless the user chose a number.

    It starts them when it is imported, and ends the process where it cannot. Only JAX, which has
    its own, multiplies large matrices.
    """
    if not os.environ.get(_BLAS_THREADS):
        os.environ[_BLAS_THREADS] = "1"


@contextmanager
def gpu_memory_claimed() -> Iterator[None]:
    """Let JAX take the share of a GPU that a run is planned for, unless the user chose one.

    JAX reads the variable when it starts (`generate_pjrt_gpu_plugin_options` in
    `jaxlib/xla_client.py`). It limits what arrays may take even where nothing is preallocated.
    """
    from grokctl.model.memory_share import MEMORY_SHARE, SHARE_VARIABLES

    if any(os.environ.get(name) for name in SHARE_VARIABLES):
        yield
        return
    with _variable(SHARE_VARIABLES[0], str(MEMORY_SHARE)):
        yield


@contextmanager
def jax_prepared(threads: int | None = None) -> Iterator[None]:
    """Give JAX the environment that grokctl was tested with.

    Variables that change what JAX computes are set aside. The flags of the compilers stay, because
    a machine may need them; they are tried first, because XLA ends the process over a wrong one.

    Args:
        threads: Threads that compute on the CPU; by default as many as usable cores.

    Raises:
        InvalidValueError: More threads than cores.
        HardwareError: JAX does not start with a variable of the user's, or with the limits.
    """
    from grokctl.machine.jax_variables import OWN, start_failure
    from grokctl.machine.limits import ENOUGH_THREADS, little_memory, memory_limits, require_threads

    if threads is not None and threads > usable_cores():
        raise invalid("--threads", threads, f"expected 1 to {usable_cores()}, the usable cores")
    require_threads(ENOUGH_THREADS)
    failure = start_failure(os.environ, always=bool(memory_limits()))
    if failure is not None and not failure[1]:
        raise little_memory()
    if failure is not None:
        why, names = failure
        values = ", ".join(f"{name}={os.environ[name]}" for name in names)
        message = f"{printable(values, limit=_LONGEST)}: JAX does not start with it: "
        raise HardwareError(message + printable(why, limit=_LONGEST), f"unset {' '.join(names)}")
    with ExitStack() as stack:
        for name in OWN:
            if name in os.environ:
                stack.enter_context(_variable(name, None))
        if threads is not None:
            stack.enter_context(_variable(_XLA_THREADS, str(threads)))
        stack.enter_context(gpu_memory_claimed())
        yield


@contextmanager
def certificates_named() -> Iterator[None]:
    """Tell libtorrent's own OpenSSL where the certificate authorities are listed.

    It looks in two usual places only. On other systems every HTTPS tracker would fail, the first
    tracker of Grok-1 among them.
    """
    from grokctl.machine.network import BUILT_IN_CA_BUNDLES, certificates

    bundle = certificates(os.environ)
    if bundle in BUILT_IN_CA_BUNDLES:
        yield
        return
    with _variable("SSL_CERT_FILE", bundle):
        yield


def mirrors_named(names: Sequence[str] | None) -> tuple[str, ...]:
    """The mirrors of the command line; `hf` is where `HF_ENDPOINT` says, as for the hub's clients.

    Raises:
        UsageError: The variable is no address.
    """
    if not names or "hf" not in names:
        return tuple(names or ())
    from grokctl.transfer.sources import MIRRORS

    hub = hub_named()
    return tuple(hub if name == "hf" and hub != MIRRORS["hf"].url else name for name in names)


def hub_to_try() -> str | None:
    """The folder of Grok-1 at the hub, for a fetch that named none; None if there is no such."""
    try:
        return hub_named()
    except UsageError:
        return None


def hub_named() -> str:
    """The folder of Grok-1 at the hub, which is where `HF_ENDPOINT` says.

    Raises:
        UsageError: The variable is no address.
    """
    from grokctl.transfer.sources import MIRRORS, hub_mirror

    endpoint = unquoted(os.environ.get("HF_ENDPOINT", "").strip()).rstrip("/")
    if not endpoint:
        return MIRRORS["hf"].url
    mirror = hub_mirror(endpoint)
    if mirror is None:
        expected = "expected http://host or https://host, without a query"
        raise invalid("HF_ENDPOINT", shown_url(endpoint), expected, "unset HF_ENDPOINT")
    return mirror


@contextmanager
def _variable(name: str, value: str | None) -> Iterator[None]:
    """Set a variable in the block, or unset it."""
    before = os.environ.get(name)
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
