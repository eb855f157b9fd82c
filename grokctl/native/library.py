"""The native kernel, known to JAX: found or compiled, loaded once, and registered."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import jax

from grokctl.events import Noted, Observer, ignore
from grokctl.native.binary import (
    HANDLERS,
    Library,
    NoKernelError,
    is_off,
    open_first,
)
from grokctl.native.compiler import Compiler
from grokctl.system import usable_cores
from grokctl.text import printable

_loaded: Final[list[Library]] = []
"""At most one: JAX's registry is the process's, and forgets nothing."""


def load(
    caches: Path | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    observe: Observer = ignore,
) -> Library:
    """The native kernel; once there is one, the same for the rest of the process.

    Args:
        caches: `cache/native` of a home, where it is compiled if it was not installed.
        environ: This process's environment by default.
        observe: Receives a note before a compiler runs.

    Raises:
        NoKernelError: There is none, with the reason.
    """
    environ = os.environ if environ is None else environ

    def begin(compiler: Compiler) -> None:
        message = f"compiling the kernel for this CPU with {compiler.name}, this time only"
        observe(Noted(message=message))

    if _loaded and not is_off(environ):
        return _loaded[0]
    library = open_first(caches, environ, begin=begin, accept=_register)
    library.set_threads(usable_cores())
    _loaded.append(library)
    return library


def _register(library: Library) -> None:
    """Tell JAX the handlers.

    Raises:
        NoKernelError: JAX has others of these names.
    """
    try:
        for name in HANDLERS:
            handler = jax.ffi.pycapsule(getattr(library.symbols, name))
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
    except (RuntimeError, ValueError) as error:
        reason = printable(str(error).partition("\n")[0])
        raise NoKernelError(f"{library.path}: JAX does not take it ({reason})") from error
