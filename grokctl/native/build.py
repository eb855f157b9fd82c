"""The file of the kernel's library: in the package, kept under home, or compiled now."""

import fcntl
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from grokctl.native.compiler import BuildError, Compiler, compile_library
from grokctl.native.sources import FOLDER, FORMS, flags_of
from grokctl.own_cache import make_private, why_not_private
from grokctl.system import usable_cores

INSTALLED: Final = Path(__file__).parent / "built"
"""Where `make` and wheels have the library."""
_API: Final = re.compile(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)")
_HEADER: Final = Path("xla/ffi/api/c_api.h")
_KEPT: Final = 4
"""Libraries that a home keeps for machines of one kind."""
_POLL_S: Final = 0.1
_WAIT_S: Final = 600.0
"""For another process that compiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What the library is made of on this machine."""

    sources: Mapping[Path, tuple[str, ...]]
    """C++ files with their flags."""
    includes: Path
    """XLA's headers, of the jaxlib that will call the kernel."""
    api: str
    """Version of the interface that they declare."""

    @property
    def key(self) -> str:
        """The same for libraries that one may use in place of another."""
        return sha256(f"{sources_key(self.sources)} {self.api}".encode()).hexdigest()[:16]


def build_here() -> Build:
    """What a library for this machine is made of.

    Raises:
        BuildError: There is no kernel for it, or no headers.
    """
    system, architecture = platform.system(), platform.machine()
    if system != "Linux" or architecture not in FORMS:
        raise BuildError(f"there is none for {system} on {architecture}")
    includes = headers()
    return Build(sources=flags_of(architecture), includes=includes, api=_api_of(includes))


def headers() -> Path:
    """The folder of XLA's headers in jaxlib, without importing it.

    Raises:
        BuildError: jaxlib is not installed, or has none.
    """
    spec = find_spec("jaxlib")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    folder = Path(places[0], "include") if places else Path()
    if not places or not (folder / _HEADER).is_file():
        raise BuildError("jaxlib has no headers here")
    return folder


def _api_of(includes: Path) -> str:
    """The version of the interface, such as `0.3`; `0.0` of headers that have none."""
    numbers = _API.findall((includes / _HEADER).read_text("utf-8", "replace"))
    return ".".join(numbers) if len(numbers) == 2 else "0.0"  # noqa: PLR2004 (major and minor)


def _numbers(version: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})\.(\d{1,9})", version)
    return (int(match[1]), int(match[2])) if match else (-1, 0)


def sources_key(sources: Mapping[Path, tuple[str, ...]]) -> str:
    """A digest of the flags of all sources, and of all files beside them."""
    digest = sha256(repr([(path.name, flags) for path, flags in sources.items()]).encode())
    for path in sorted(FOLDER.iterdir()):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def installed(folder: Path = INSTALLED) -> Path | None:
    """The library that came with the package, if it is of these sources and this JAX can call it.

    JAX calls a library of an earlier interface, and does not start with one of a later.
    """
    with suppress(BuildError):
        build = build_here()
        stem = f"{sources_key(build.sources)}-{platform.machine()}"
        for path in sorted(folder.glob(f"{stem}-*.so")):
            major, minor = _numbers(path.stem.removeprefix(f"{stem}-"))
            most = _numbers(build.api)
            if major == most[0] and minor <= most[1]:
                return path
    return None


def install(
    compiler: Compiler, architecture: str, folder: Path = INSTALLED, *, flags: Sequence[str] = ()
) -> Path:
    """Compile the library into a folder of the package, in place of earlier ones.

    Args:
        compiler: Makes libraries for the architecture.
        architecture: As `platform.machine()` names it.
        folder: Of libraries; made if it is missing.
        flags: More flags for every unit.

    Raises:
        BuildError: It cannot be compiled.
        OSError: The folder cannot be written to.
    """
    sources, includes, folder = flags_of(architecture), headers(), folder.absolute()
    folder.mkdir(exist_ok=True)
    target = folder / f"{sources_key(sources)}-{architecture}-{_api_of(includes)}.so"
    with _workshop(folder) as work:
        library = compile_library(
            compiler, sources, work, includes=includes, flags=flags, jobs=usable_cores()
        )
        library.replace(target)
    for path in folder.glob(f"*-{architecture}-*.so"):
        if path != target:
            path.unlink()
    return target


def cache_folder(caches: Path) -> Path:
    """The folder of libraries for machines like this one, below `cache/native` of a home."""
    return caches / "-".join([platform.machine(), *filter(None, platform.libc_ver())])


def kept(build: Build, folder: Path, compiler: Compiler | None) -> Path | None:
    """A library that was compiled here before, whole and of these sources.

    Args:
        build: What it must be made of.
        folder: Of the libraries.
        compiler: It must have made it; None takes any, because none can make another.

    Raises:
        OSError: Another user could have put it there, or the folder cannot be read.
    """
    if not folder.is_dir():
        return None
    problem = why_not_private(folder)
    if problem is not None:
        raise PermissionError(problem)
    made_by = "*" if compiler is None else compiler.identity
    for path in sorted(folder.glob(f"{build.key}-{made_by}-*.so")):
        if path.stem.endswith(f"-{_sum_of(path)}"):
            return path
        path.unlink(missing_ok=True)  # cut short
    return None


def compiled(
    build: Build, folder: Path, compiler: Compiler, *, begin: Callable[[], None] = lambda: None
) -> Path:
    """Compile the library into a folder, or wait for another process that does.

    Args:
        build: What it is made of.
        folder: Of libraries; made, and closed to others.
        compiler: Makes it.
        begin: Called before it is compiled here.

    Raises:
        BuildError: It cannot be compiled, or another process takes too long.
        OSError: The folder cannot be used.
    """
    make_private(folder)
    with _alone(folder):
        path = kept(build, folder, compiler)
        if path is not None:
            return path
        begin()
        with _workshop(folder) as work:
            library = compile_library(
                compiler, build.sources, work, includes=build.includes, jobs=usable_cores()
            )
            _sync(library)
            path = folder / f"{build.key}-{compiler.identity}-{_sum_of(library)}.so"
            library.rename(path)
        _forget_oldest(folder)
        return path


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; one that is lost with its process is free.

    Raises:
        BuildError: Another process holds it for too long.
    """
    until = time.monotonic() + _WAIT_S
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    reason = f"another process compiles it for longer than {_WAIT_S:.0f} s"
                    raise BuildError(reason) from error
                time.sleep(_POLL_S)
            except OSError:  # no locks on this file system: both compile, and one is kept
                break
        yield
    finally:
        os.close(handle)


@contextmanager
def _workshop(folder: Path) -> Iterator[Path]:
    """A folder for one compilation, which is gone at the end."""
    work = folder / f".work-{secrets.token_hex(4)}"
    work.mkdir(0o700)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sum_of(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()[:16]


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _forget_oldest(folder: Path) -> None:
    """Delete libraries of earlier versions, and what killed processes have left."""
    for path in sorted(folder.glob("*.so"), key=_age)[_KEPT:]:
        path.unlink(missing_ok=True)
    for work in folder.glob(".work-*"):
        if _age(work) > _WAIT_S:
            shutil.rmtree(work, ignore_errors=True)


def _age(path: Path) -> float:
    """Seconds since it was written."""
    return time.time() - path.stat().st_mtime
