"""The kernel of CPUs for an engine: loaded, with its threads, or the reason why there is none."""

from dataclasses import dataclass

import jax

from grokctl.events import Observer
from grokctl.inference.plan import EngineOptions
from grokctl.native.binary import NoKernelError
from grokctl.native.library import load
from grokctl.system import usable_cores
from grokctl.text import format_number


@dataclass(frozen=True, slots=True)
class NativeKernel:
    """Whether an engine has the kernel."""

    is_there: bool
    words: str
    """Instruction set and threads, or the reason why it is not there; empty on accelerators."""


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
        return NativeKernel(is_there=False, words="")
    try:
        library = load(options.native_cache, observe=observe)
    except NoKernelError as error:
        return NativeKernel(is_there=False, words=f"XLA: {error}")
    threads = options.threads or usable_cores()
    library.set_threads(threads)
    words = f"native, {library.instruction_set}, {format_number(threads, 'thread')}"
    return NativeKernel(is_there=True, words=words)
