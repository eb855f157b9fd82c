"""The C++ compiler of this machine: which one, and how it makes a shared library."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Final

from grokctl.text import printable

_NAMES: Final = ("c++", "g++", "clang++")
_TIMEOUT_S: Final = 600.0
"""For one file: a minute on a slow machine that is busy."""
_LINK: Final = ("-shared", "-pthread", "-Wl,-s")
_UNKNOWN_FLAG: Final = re.compile(
    "unrecognized command.line option|unknown argument|unsupported option|unsupported argument"
)
_ZIG: Final = "ziglang"
"""The module that `make wheels` runs."""
_LONGEST: Final = 200
_INSTALLERS: Final = {
    "apt-get": "sudo apt-get install g++",
    "dnf": "sudo dnf install gcc-c++",
    "yum": "sudo yum install gcc-c++",
    "zypper": "sudo zypper install gcc-c++",
    "pacman": "sudo pacman -S gcc",
    "apk": "sudo apk add g++",
}
"""Programs that install others -> the command that installs a compiler."""


class BuildError(Exception):
    """No library was made, with the reason in one line."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler."""

    command: tuple[str, ...]
    """Its absolute path, and arguments that come first."""

    @property
    def name(self) -> str:
        """As people know it, such as `g++`."""
        return Path(self.command[0]).name

    @property
    def identity(self) -> str:
        """Of this compiler and no other version of it, without running it."""
        program = Path(self.command[0]).resolve()
        status = program.stat()
        facts = (str(program), status.st_size, status.st_mtime_ns, self.command[1:])
        return sha256(repr(facts).encode()).hexdigest()[:8]

    def spelled(self, flags: Sequence[str]) -> list[str]:
        """Flags as this compiler knows them: Zig's names processors where others name versions."""
        if _ZIG not in self.command:
            return list(flags)
        return [re.sub(r"^-march=armv8\.2-a\b", "-mcpu=generic", flag) for flag in flags]


def find_compiler(environ: Mapping[str, str]) -> Compiler | None:
    """The compiler that `CXX` names, or else the usual one on the path; None without any.

    Args:
        environ: `CXX`, which may have arguments, and `PATH`, of which absolute folders count.
    """
    folders = environ.get("PATH", os.defpath).split(os.pathsep)
    path = os.pathsep.join(folder for folder in folders if folder.startswith(os.sep))
    try:
        named = shlex.split(environ.get("CXX", ""))
    except ValueError:  # an open quote
        named = []
    for words in ([named] if named else []) + [[name] for name in _NAMES]:
        program = shutil.which(words[0], path=path)
        if program is not None:
            return Compiler((os.path.abspath(program), *words[1:]))  # noqa: PTH100 (keeps links)
    return None


def how_to_install(environ: Mapping[str, str]) -> str:
    """A command that installs a compiler."""
    path = environ.get("PATH", os.defpath)
    found = (line for name, line in _INSTALLERS.items() if shutil.which(name, path=path))
    return next(found, "conda install --channel conda-forge gxx")


def compile_library(
    compiler: Compiler,
    sources: Mapping[Path, Sequence[str]],
    folder: Path,
    *,
    includes: Path,
    flags: Sequence[str] = (),
    jobs: int = 1,
) -> Path:
    """Compile every source, and link them.

    A source is left out if the compiler does not know its flags: it is for an instruction set of
    processors that are younger than the compiler.

    Args:
        compiler: Makes objects and the library.
        sources: C++ files with their flags.
        folder: An empty folder of this user's own, for objects, the compiler's temporary files and
            the library.
        includes: Folder of headers.
        flags: For every source and for linking.
        jobs: Sources at a time.

    Returns:
        The library, in the folder.

    Raises:
        BuildError: The compiler fails, with the first of its errors.
    """
    run = partial(_run, compiler, folder)

    def compiled(source: Path) -> str:
        made = f"{source.stem}.o"
        own = (*compiler.spelled(sources[source]), *flags, "-isystem", str(includes))
        try:
            run([*own, "-c", str(source), "-o", made])
        except BuildError as error:
            if not _UNKNOWN_FLAG.search(str(error)):
                raise
            return ""
        return made

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(filter(None, pool.map(compiled, sources)))
    library = folder / "library.so"
    run([*objects, *_LINK, *flags, "-o", library.name])
    return library


def _run(compiler: Compiler, folder: Path, arguments: Sequence[str]) -> None:
    """Run the compiler in a folder.

    Raises:
        BuildError: It fails.
    """
    environ = {**os.environ, "LC_ALL": "C", "TMPDIR": str(folder)}
    try:
        done = subprocess.run(  # noqa: S603 (the user's own compiler, and files of ours)
            [*compiler.command, *arguments],
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{compiler.name} took longer than {_TIMEOUT_S:.0f} s") from error
    except OSError as error:
        raise BuildError(f"{compiler.name} does not start ({error.strerror})") from error
    if done.returncode:
        raise BuildError(f"{compiler.name} failed: {_reason(done.stderr, done.returncode)}")


def _reason(output: bytes, status: int) -> str:
    """The first line with an error, or else the last line."""
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line]
    chosen = [*errors[:1], *lines[-1:], f"status {status}"]
    return printable(chosen[0].strip(), limit=_LONGEST)
