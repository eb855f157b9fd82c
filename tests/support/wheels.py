"""Empty wheels with requirements, and a build backend that makes one."""

import zipfile
from pathlib import Path


def write_wheel(folder: Path, name: str, version: str, *needs: str, extra: str = "") -> Path:
    """A wheel without modules; its extra adds no requirement."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Provides-Extra: {extra}"] if extra else []
    lines += [f"Requires-Dist: {need}" for need in needs]
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def build_editable(wheel_directory: str, *_: object) -> str:
    """PEP 660's hook, for a project beside this file."""
    return write_wheel(Path(wheel_directory), "grokctl", "0", "sprout").name
