"""The share of an accelerator's memory that a run may take: arithmetic, without numpy or JAX."""

from collections.abc import Mapping
from contextlib import suppress
from math import inf
from typing import Final

MEMORY_SHARE: Final = 0.92
"""Of a GPU. The rest is for the context of CUDA or ROCm, for libraries, and for the gaps between
arrays."""
SHARE_VARIABLES: Final = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Environment variables for another share; the second is an older name of the first."""
_TPU_SHARE: Final = 0.97
"""Of a TPU. Its runtime keeps little for itself, and JAX allocates when it needs memory."""


def usable(memory: int, *, platform: str, share: float | None = None) -> int:
    """Bytes of an accelerator that a run may take.

    Args:
        memory: All of its bytes.
        platform: `gpu` or `tpu`; on a CPU, a run may take all of the memory.
        share: The share of a GPU that the environment sets for JAX, if any.
    """
    if platform == "cpu":
        return memory
    if platform == "tpu":
        return int(memory * _TPU_SHARE)
    return int(memory * (MEMORY_SHARE if share is None else share))


def environment_share(variables: Mapping[str, str]) -> float | None:
    """The share of a GPU that environment variables set; None without a valid one."""
    for name in SHARE_VARIABLES:
        with suppress(ValueError):
            share = float(variables.get(name, ""))
            if 0 < share < inf:
                return share
    return None
