"""Nodes of the memory (NUMA): which cores are next to which part of it."""

import re
from pathlib import Path
from typing import Final

from grokctl.machine.facts import Node
from grokctl.system import bound_cores
from grokctl.text import printable

_MEMORY: Final = re.compile(r"MemTotal:\s*(\d{1,15}) kB")
_RANGE: Final = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?", re.ASCII)
_MOST_CORES: Final = 2**16


def nodes(root: Path = Path("/")) -> tuple[Node, ...]:
    """The nodes that have cores, by number; empty where the system does not tell.

    Args:
        root: Where `sys` is.
    """
    usable = bound_cores()
    found = []
    for folder in (root / "sys/devices/system/node").glob("node*"):
        number = folder.name.removeprefix("node")
        text = _text(folder / "cpulist")
        cores = cores_of(text)
        if number.isdecimal() and number.isascii() and cores:
            size = _MEMORY.search(_text(folder / "meminfo"))
            found.append(
                Node(
                    number=int(number),
                    cores=printable(text),
                    usable=len(cores if usable is None else cores & usable),
                    memory=int(size[1]) * 1024 if size else None,
                )
            )
    return tuple(sorted(found, key=lambda node: node.number))


def cores_of(text: str) -> frozenset[int]:
    """The cores of a list such as `0-31,64-95`; empty if it is none."""
    cores: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            return frozenset()
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < _MOST_CORES:
            return frozenset()
        cores.update(range(first, last + 1))
    return frozenset(cores)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
