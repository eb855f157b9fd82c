"""Compile the kernel into the package: for `make`, `make wheels` and `make sanitize`."""

import argparse
import os
import platform
import shlex
import sys
from pathlib import Path

from grokctl.native.build import INSTALLED, install, installed
from grokctl.native.compiler import BuildError, Compiler, find_compiler, how_to_install


def main() -> None:
    """Print the library's path; without a compiler, what is missing, which is no failure."""
    parser = argparse.ArgumentParser(prog="python -m grokctl.native", description=__doc__)
    parser.add_argument("--architecture", default=platform.machine())
    parser.add_argument("--compiler", help="command with its first arguments, instead of CXX")
    parser.add_argument("--flags", default="", help="more flags for every file")
    parser.add_argument("--into", type=Path, default=INSTALLED, help="folder for the library")
    asked = parser.parse_args()
    compiler = find_compiler(os.environ)
    if asked.compiler:
        compiler = Compiler(tuple(shlex.split(asked.compiler)))
    if compiler is None:
        missing = f"kernel for CPUs: no C++ compiler; {how_to_install(os.environ)}"
        sys.stderr.write(f"{missing}\n")
        return
    is_usual = asked.into == INSTALLED and not asked.flags and not asked.compiler
    path = installed() if is_usual else None
    try:
        path = path or install(
            compiler, asked.architecture, asked.into, flags=shlex.split(asked.flags)
        )
    except BuildError as error:
        sys.stderr.write(f"kernel for CPUs: {error}\n")
        if not is_usual:
            raise SystemExit(1) from error
        return
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
