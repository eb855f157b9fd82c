"""The kernel of CPUs for an engine: loaded, with its threads, or the reason why there is none."""

from dataclasses import dataclass
from typing import Final

import jax

from grokctl.events import Observer
from grokctl.inference.plan import EngineOptions
from grokctl.machine.host import probe_bytes
from grokctl.machine.memory import memory
from grokctl.native.binary import Library, NoKernelError
from grokctl.native.library import load
from grokctl.system import usable_cores
from grokctl.text import format_number

_ROUNDS: Final = 3


@dataclass(frozen=True, slots=True)
class NativeKernel:
    """Whether an engine has the kernel."""

    library: Library | None
    """None if it is not there."""
    words: str
    """Instruction set and threads, or the reason why it is not there; empty on accelerators."""

    def measured(self) -> float | None:
        """Bytes a second of int8 weights that it reads for one token, measured now.

        Takes a quarter of a second. None where it is not there, or memory is too small.
        """
        if self.library is None:
            return None
        return self.library.measured(probe_bytes(memory().usable), rounds=_ROUNDS)


def native_kernel(device: jax.Device, options: EngineOptions, *, observe: Observer) -> NativeKernel:
    """Load the kernel, if a device is a CPU.

    Without it XLA's programs multiply, with the same results and more slowly, so its absence is no
    failure and no note: `doctor` and `--stats` tell the reason.

    Args:
        device: One of the mesh.
        options: Where it may be compiled, and its threads.
        observe: Receives a note before a compiler runs.
    """
    if device.platform != "cpu":
        return NativeKernel(None, words="")
    try:
        library = load(options.native_cache, observe=observe)
    except NoKernelError as error:
        return NativeKernel(None, words=f"XLA: {error}")
    threads = options.threads or usable_cores()
    library.set_threads(threads)
    words = f"native, {library.instruction_set}, {format_number(threads, 'thread')}"
    return NativeKernel(library, words=words)
