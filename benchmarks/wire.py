"""What a decoded token of Grok-1 sends between two hosts of eight devices, as it was compiled.

    python benchmarks/wire.py

Compiles the decode step of Grok-1's true sizes for 16 devices, of which none has to hold anything,
reads the collectives out of XLA's text, and counts those whose groups have devices on both hosts.
Exits with 1 where that is not what docs/cluster.md says.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from grokctl.checkpoint.storage import released_storage
from grokctl.checkpoint.tensor_source import Storage
from grokctl.inference.compiled_steps import Head, Programs
from grokctl.inference.devices import find_devices
from grokctl.inference.loading import Loader
from grokctl.model.cache import empty_cache
from grokctl.model.config import GROK_1, GrokConfig
from grokctl.model.placement import MeshShape
from grokctl.model.step_spec import StepShape

DOCUMENT = Path(__file__).parents[1] / "docs" / "cluster.md"
HOSTS = 2
MESHES = (MeshShape(2, 8), MeshShape(1, 16))
GIGABITS = (100, 200, 400)
CONTEXT = 1024
ITEM_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "u16": 2, "s8": 1, "pred": 1}
COLLECTIVE = re.compile(
    r"= \(?(\w+)\[([\d,]*)\].*? (all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute)(?:-start)?\("
)


@dataclass(frozen=True)
class Sizes:
    """A model that is not there: only its sizes are asked for."""

    storage: Storage

    @property
    def config(self) -> GrokConfig:
        """The model."""
        return self.storage.config


@dataclass(frozen=True)
class Collective:
    """One of a program."""

    kind: str
    nbytes: int
    """Of its result."""
    groups: tuple[tuple[int, ...], ...]

    def crosses(self, size: int) -> bool:
        """Whether it has devices on both hosts."""
        own = size // HOSTS
        return any(len({device // own for device in group}) > 1 for group in self.groups)

    @property
    def sent(self) -> int:
        """Bytes that each host must send the other at least.

        Of a sum its own part of it, which is as large as the sum; of what is put together, what
        the other one does not have.
        """
        return self.nbytes if self.kind == "all-reduce" else self.nbytes // HOSTS


def groups_of(line: str, size: int) -> tuple[tuple[int, ...], ...]:
    """The groups of a collective: listed, an iota reshaped and transposed, or axes of a mesh."""
    if listed := re.search(r"replica_groups=\{(\{[^=]*?\})\}", line):
        parts = re.findall(r"\{([\d,]+)\}", listed[1])
        return tuple(tuple(map(int, part.split(","))) for part in parts)
    pattern = r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if iota := re.search(pattern, line):
        shape, dimensions = (tuple(map(int, iota[n].split(","))) for n in (1, 2))
        found = np.arange(size).reshape(dimensions)
        if iota[3]:
            found = found.transpose(tuple(map(int, iota[3].split(","))))
        return tuple(map(tuple, found.reshape(shape).tolist()))
    if meshed := re.search(r"replica_groups=mesh\[([^\]]+)\] \{([^}]*)\},", line):
        axes = {name: int(length) for name, length in re.findall(r"'(\w+)'=(\d+)", meshed[1])}
        along = [list(axes).index(name) for name in re.findall(r"'(\w+)'", meshed[2])]
        devices = np.arange(size).reshape(tuple(axes.values()))
        last = np.moveaxis(devices, along, range(-len(along), 0))
        return tuple(map(tuple, last.reshape(-1, prod(last.shape[-len(along) :])).tolist()))
    assert "replica_groups={}" in line, line
    return (tuple(range(size)),)


def collectives(program: str, size: int) -> Iterator[Collective]:
    """Those of a program's text."""
    for line in program.splitlines():
        if found := COLLECTIVE.search(line):
            count = prod(int(length) for length in found[2].split(",") if length)
            yield Collective(found[3], count * ITEM_BYTES[found[1]], groups_of(line, size))


def crossing(config: GrokConfig, mesh: MeshShape) -> list[Collective]:
    """Every collective of a decoded token that has devices on both hosts."""
    loader = Loader(Sizes(released_storage(config)), mesh, find_devices(mesh.size))
    loader.local = loader.local[: mesh.size // HOSTS]  # as one of two processes compiles it
    assert loader.is_shared
    shape = StepShape(config=config, mesh=mesh, platform="cpu", compute=jnp.dtype(jnp.bfloat16))
    programs = Programs(loader, loader.absent_parameters(), shape)
    cache = empty_cache(
        config, mesh, slots=1, past=CONTEXT, dtype=jnp.dtype(jnp.uint16), zeros=loader.absent
    )
    read = loader.absent((), jnp.dtype(jnp.int32))
    step = programs.step(cache, read, batch=1, time=1, head=Head.LAST)
    drawn = programs.largest(1, 0)
    texts = [program.as_text() for program in (step.embed, *step.layers, step.head, drawn)]
    found = [each for text in texts for each in collectives(text, mesh.size)]
    return [each for each in found if each.crosses(mesh.size)]


def table(config: GrokConfig) -> list[str]:
    """Markdown."""
    heads = [f"at {rate} Gb/s" for rate in GIGABITS]
    lines = [
        "| mesh | collectives that cross | bytes each way | " + " | ".join(heads) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(GIGABITS),
    ]
    for mesh in MESHES:
        found = crossing(config, mesh)
        sent = sum(each.sent for each in found)
        times = [f"{sent * 8 / rate / 1e3:.0f} µs" for rate in GIGABITS]
        lines.append(f"| `{mesh}` | {len(found)} | {sent:,} | " + " | ".join(times) + " |")
    return lines


def main() -> int:
    """Print the table; whether the document has it."""
    jax.config.update("jax_num_cpu_devices", max(mesh.size for mesh in MESHES))
    lines = table(GROK_1)
    print("\n".join(lines))
    missing = [line for line in lines if line not in DOCUMENT.read_text("utf-8").splitlines()]
    if missing:
        print(f"{DOCUMENT.name} says something else", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
