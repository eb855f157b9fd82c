"""Which file has the kernel, and what it says without JAX; or why there is none."""

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grokctl.native.build import (
    INSTALLED,
    build_here,
    cache_folder,
    compiled,
    installed,
    kept,
)
from grokctl.native.compiler import BuildError, Compiler, find_compiler, how_to_install
from grokctl.os_errors import reason_of
from grokctl.text import printable

SWITCH: Final = "GROKCTL_CPU_KERNEL"
"""The environment variable that says `off`, or has the path of a library."""
_OFF: Final = "off"
HANDLERS: Final = ("grokctl_project", "grokctl_expert", "grokctl_project_back")
"""Symbols that XLA calls, which are their names in JAX, too."""
_PORTABLE: Final = "portable"
"""The form for any processor, many times slower than XLA's programs: it is for tests."""


class NoKernelError(Exception):
    """There is no native kernel, so XLA's programs multiply on the CPU; the reason is one line."""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.fix = fix
        """A command to paste; empty if none would help."""


@dataclass(frozen=True, slots=True)
class Library:
    """A library that is loaded into this process."""

    path: Path
    symbols: ctypes.CDLL

    @property
    def instruction_set(self) -> str:
        """Name of the form that is used."""
        name: bytes = self.symbols.grokctl_isa()
        return name.decode()

    def force(self, instruction_set: str | None) -> bool:
        """Use another form; None: the fastest. False: it does not run here."""
        name = None if instruction_set is None else instruction_set.encode()
        return bool(self.symbols.grokctl_force_isa(name))

    def set_threads(self, threads: int) -> None:
        """Multiply with so many threads; 0: with all cores."""
        self.symbols.grokctl_set_threads(threads)

    @property
    def threads(self) -> int:
        """Threads that multiply."""
        return int(self.symbols.grokctl_threads())

    def counts(self) -> tuple[int, int]:
        """Products, and forks of the pool, since the library was loaded."""
        found = (ctypes.c_int64 * 2)()
        self.symbols.grokctl_stats(found)
        return found[0], found[1]

    def measured(self, nbytes: int, *, rounds: int) -> float | None:
        """Bytes a second of int8 weights that products of one token read from memory.

        Args:
            nbytes: Of the weights, which should fit no cache.
            rounds: Number of measurements; the fastest counts.

        Returns:
            None where there is too little memory.
        """
        return self.symbols.grokctl_measure(nbytes, rounds) or None


def open_library(path: Path) -> Library:
    """Load a library.

    Raises:
        NoKernelError: The system refuses it, it is no kernel, or XLA's programs are faster because
            it has no form for this processor's instructions.
    """
    try:
        symbols = ctypes.CDLL(os.fspath(path))
        for name in HANDLERS:
            getattr(symbols, name)
        symbols.grokctl_isa.restype = ctypes.c_char_p
        symbols.grokctl_force_isa.argtypes = [ctypes.c_char_p]
        symbols.grokctl_set_threads.argtypes = [ctypes.c_int]
        symbols.grokctl_stats.argtypes = [ctypes.POINTER(ctypes.c_int64)]
        symbols.grokctl_measure.argtypes = [ctypes.c_int64, ctypes.c_int]
        symbols.grokctl_measure.restype = ctypes.c_double
    except (OSError, AttributeError) as error:
        raise NoKernelError(f"{path} cannot be loaded ({printable(str(error))})") from error
    library = Library(path, symbols)
    if library.instruction_set == _PORTABLE:
        raise NoKernelError("it has no form for the instructions of this processor")
    return library


def open_first(
    caches: Path | None,
    environ: Mapping[str, str],
    *,
    begin: Callable[[Compiler], None] = lambda _: None,
    accept: Callable[[Library], None] = lambda _: None,
) -> Library:
    """Load the first of the candidates that can be used.

    Args:
        caches: `cache/native` of a home; None keeps and compiles none.
        environ: The switch, and what finds a compiler.
        begin: Called with the compiler before it runs.
        accept: Raises `NoKernelError` if a library that loads cannot be used.

    Raises:
        NoKernelError: There is none; the reason is that of the first.
    """
    first: NoKernelError | None = None
    try:
        for path in candidates(caches, environ, begin=begin):
            try:
                library = open_library(path)
                accept(library)
            except NoKernelError as error:
                first = first or error
            else:
                return library
    except NoKernelError as error:
        raise first or error from error
    raise AssertionError("candidates end with an error")


def is_off(environ: Mapping[str, str]) -> bool:
    """Whether the user wants no kernel."""
    return environ.get(SWITCH, "").strip().lower() == _OFF


def candidates(
    caches: Path | None,
    environ: Mapping[str, str],
    *,
    package: Path = INSTALLED,
    begin: Callable[[Compiler], None] = lambda _: None,
) -> Iterator[Path]:
    """The files to try, one after the other: of the package, kept under home, compiled now.

    Args:
        caches: `cache/native` of a home; None keeps and compiles none.
        environ: The switch, and what finds a compiler.
        package: The folder of libraries that came with grokctl.
        begin: Called with the compiler before it runs.

    Raises:
        NoKernelError: There is no further one.
    """
    if is_off(environ):
        raise NoKernelError(f"{SWITCH}={_OFF}", f"unset {SWITCH}")
    choice = environ.get(SWITCH, "").strip()
    if choice:
        yield Path(choice).absolute()
        raise NoKernelError(f"{SWITCH}={printable(choice)}: is no kernel", f"unset {SWITCH}")
    path = installed(package)
    if path is not None:
        yield path
    if caches is None:
        raise NoKernelError("it is not installed, and may not be compiled here")
    yield _own(caches, environ, begin)
    raise NoKernelError("what was compiled here cannot be used")


def _own(caches: Path, environ: Mapping[str, str], begin: Callable[[Compiler], None]) -> Path:
    """A library that this machine compiled, now or before.

    Raises:
        NoKernelError: It cannot.
    """
    folder, compiler = cache_folder(caches), find_compiler(environ)
    try:
        build = build_here()
    except BuildError as error:
        raise NoKernelError(str(error)) from error
    try:
        if compiler is not None:
            return compiled(build, folder, compiler, begin=lambda: begin(compiler))
        path = kept(build, folder, None)
    except BuildError as error:
        raise NoKernelError(str(error), how_to_install(environ)) from error
    except OSError as error:
        raise NoKernelError(f"{folder} cannot be used ({reason_of(error)})") from error
    if path is None:
        raise NoKernelError("no C++ compiler (c++, g++, clang++)", how_to_install(environ))
    return path
