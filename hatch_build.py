"""A wheel with the compiled kernel, for `make wheels`; any other build makes a plain one."""

import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "GROKCTL_WHEEL"
"""Has the folder of the library, a colon, and the platform of the wheel."""


class KernelHook(BuildHookInterface[Any]):
    """Puts the library of `VARIABLE` into the package."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Name the platform, and add the library."""
        folder, _, platform = os.environ.get(VARIABLE, "").partition(":")
        if not platform or version == "editable":
            return
        (library,) = Path(folder).glob("*.so")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["force_include"][str(library)] = f"grokctl/native/built/{library.name}"
