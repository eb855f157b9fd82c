"""The native library: built once with the system's compiler, and loaded."""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import which

import jax
import platformdirs

from grokctl.native.sources import FOLDER, flags_of
from grokctl.system import usable_cores

_TARGETS = ("grokctl_project",)


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded library."""

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


@cache
def load() -> Library | None:
    """The library; None without a compiler."""
    compiler = which("g++")
    if compiler is None:
        return None
    symbols = ctypes.CDLL(str(_built(compiler)))
    symbols.grokctl_isa.restype = ctypes.c_char_p
    symbols.grokctl_force_isa.argtypes = [ctypes.c_char_p]
    for name in _TARGETS:
        target = jax.ffi.pycapsule(getattr(symbols, name))
        jax.ffi.register_ffi_target(name, target, platform="cpu")
    library = Library(symbols)
    library.set_threads(usable_cores())
    return library


def _built(compiler: str) -> Path:
    sources = flags_of(platform.machine())
    digest = hashlib.sha256(repr(sources).encode())
    for path in sorted(FOLDER.iterdir()):
        digest.update(path.read_bytes())
    folder = platformdirs.user_cache_path("grokctl") / "native"
    library = folder / f"{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        objects = []
        for source, flags in sources.items():
            objects.append(f"{temporary}/{source.stem}.o")
            include = ("-isystem", jax.ffi.include_dir())
            command = [compiler, *flags, *include, "-c", str(source), "-o", objects[-1]]
            subprocess.run(command, check=True)  # noqa: S603
        linked = f"{temporary}/library.so"
        subprocess.run([compiler, "-shared", "-pthread", *objects, "-o", linked], check=True)  # noqa: S603
        os.replace(linked, library)  # noqa: PTH105
    return library
