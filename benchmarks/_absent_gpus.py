"""Programs of Grok-1, compiled for H100s that are not there; and what XLA's texts say of them."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import _hlo
import _sass
import _thunks
import jax
import jax.numpy as jnp
from jax.experimental.topologies import get_topology_desc

from grokctl.checkpoint.storage import released_storage, storage_in
from grokctl.inference.compiled_steps import Head, Programs
from grokctl.inference.loading import Loader
from grokctl.model.bucketing import room
from grokctl.model.cache import empty_cache, stored_type
from grokctl.model.config import GROK_1
from grokctl.model.parameters import Matrix, Parameters
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.model.step_spec import StepShape

CONTEXT: Final = 8192
BF16: Final = jnp.dtype(jnp.bfloat16)
_NAMES: Final = {"int8": "s8", "uint8": "u8", "uint16": "u16", "float32": "f32"}
"""Types of stored weights, as HLO calls them."""
HOPPER: Final = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  device_memory_size: 84978434048
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of Pallas in a program."""

    name: str
    resources: _sass.Resources
    loads: int
    """In flight, at most."""
    operations: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled program, and the folder with its texts."""

    compiled: Any
    texts: Path
    name: str
    """Of its module, such as `jit_run`."""

    @classmethod
    def of(cls, compiled: Any, texts: Path) -> "Program":
        """A program whose texts lie in a folder."""
        module = re.match(r"HloModule ([\w.-]+)", compiled.as_text())
        assert module
        return cls(compiled=compiled, texts=texts, name=module[1])

    def _text(self, ending: str) -> str:
        paths = list(self.texts.glob(f"module_*.{self.name}.*{ending}"))
        if len(paths) != 1:
            raise FileNotFoundError(f"{self.name}: expected one {ending}, found {paths}")
        return paths[0].read_text("utf-8")

    @cached_property
    def hlo(self) -> str:
        """The optimised program."""
        return self._text("gpu_after_optimizations.txt")

    @cached_property
    def _listing(self) -> list[_thunks.Thunk]:
        try:
            found = _thunks.thunks(self._text("thunk_sequence_after_thunk_passes.txt"))
        except FileNotFoundError:  # the passes had nothing to change
            found = _thunks.thunks(self._text("thunk_sequence.txt"))
        numbers = {each.number for top in found for each in top.walk()} - {0}
        assert numbers == self._annotations.keys(), "the listing and the metadata differ"
        return found

    @cached_property
    def _annotations(self) -> dict[int, str]:
        return _thunks.annotations(self._text("thunk_metadata.txt"))

    def tally(self, turns: int = 0) -> _thunks.Tally:
        """What it starts if loops of unknown length turn so often."""
        known = _hlo.trip_counts(self.hlo)
        trips = {number: known[name] for number, name in self._annotations.items() if name in known}
        return _thunks.tally(self._listing, trips, turns=turns)

    @property
    def temporaries(self) -> int:
        """Bytes, on each device."""
        return int(self.compiled.memory_analysis().temp_size_in_bytes)

    @property
    def made(self) -> int:
        """Bytes of temporaries and of results that are not the cache, on each device."""
        found = self.compiled.memory_analysis()
        written = found.output_size_in_bytes - found.alias_size_in_bytes
        return int(found.temp_size_in_bytes + written)

    def kernels(self) -> Iterator[Kernel]:
        """The kernels of Pallas, each once."""
        own = _hlo.kernels(self.hlo)
        names = {
            thunk.name
            for top in self._listing
            for thunk in top.walk()
            if self._annotations.get(thunk.number) in own
        }
        for path in sorted(self.texts.glob(f"module_*.{self.name}.*.ptx")):
            entry = re.search(r"\.entry (\w+)", path.read_text("utf-8"))
            if entry and entry[1] in names:
                names.remove(entry[1])
                yield _kernel(entry[1], path)


@dataclass(frozen=True, kw_only=True)
class Step:
    """The programs of a step."""

    embed: Program
    layers: Program
    """The first, if there are several."""
    head: Program
    together: int
    """Layers that a program has in a whole model."""
    seconds: float
    """Of all cores, to compile them."""


def _kernel(name: str, path: Path) -> Kernel:
    code = path.with_suffix(".cubin")
    compiled = _tool("ptxas", "-arch=sm_90a", "-v", str(path), "-o", str(code))
    sass = _tool("nvdisasm", "-c", str(code))
    return Kernel(
        name=name,
        resources=_sass.resources(compiled),
        loads=_sass.loads_in_flight(sass),
        operations=_sass.operations(sass, "FFMA", "FMUL", "FADD", "HMMA"),
    )


def _tool(name: str, *arguments: str) -> str:
    """What a program of NVIDIA's wheels prints, on both streams."""
    places = (Path(each) / "nvidia" / "cu13" / "bin" / name for each in sys.path)
    found = next((place for place in places if place.exists()), Path(name))
    done = subprocess.run([str(found), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


class Compiler:
    """Compiles for absent GPUs, one step after the other, and keeps XLA's texts of the last.

    XLA cannot try what is fastest, so it takes its first form of every product.
    """

    def __init__(self, keep: Path | None = None) -> None:
        self._kept = None if keep is not None else tempfile.TemporaryDirectory()
        self.texts = keep or Path(self._kept.name if self._kept else "")
        self.texts.mkdir(parents=True, exist_ok=True)
        flags = {
            "xla_gpu_autotune_level": 0,
            "xla_dump_to": self.texts,
            "xla_dump_hlo_as_text": "true",
            "xla_gpu_dump_llvmir": "true",
            "xla_dump_emitter_re": "ptx",
        }
        given = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = " ".join(
            [*(f"--{name}={value}" for name, value in flags.items()), given]
        )
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # it would look for a driver
        jax.config.update("jax_platforms", "cpu")

    def folder(self, name: str) -> Path:
        """Take what XLA has written into a folder of its own."""
        folder = self.texts / name
        folder.mkdir(exist_ok=True)
        for path in self.texts.iterdir():
            if path.is_file():
                path.replace(folder / path.name)
        return folder

    @staticmethod
    def gpus(count: int) -> list[jax.Device]:
        """GPUs that are not there."""
        described = get_topology_desc(
            f"{count} of them", platform="cuda", target_config=HOPPER, topology=f"1x1x{count}"
        )
        return list(described.devices)


@dataclass(frozen=True, kw_only=True)
class Model:
    """Grok-1 with fewer layers, on a mesh of absent GPUs."""

    compiler: Compiler
    mesh: MeshShape
    layers: int
    precision: Precision = Precision.INT8

    @cached_property
    def _loader(self) -> Loader:
        config = replace(GROK_1, num_layers=self.layers)
        storage = storage_in(released_storage(config), self.precision, self.mesh)
        source = SimpleNamespace(storage=storage, config=config)
        return Loader(source, self.mesh, self.compiler.gpus(self.mesh.size))

    @cached_property
    def parameters(self) -> Parameters:
        """Weights that are only described."""
        return self._loader.absent_parameters()

    @cached_property
    def weights(self) -> frozenset[_hlo.Array]:
        """Types of weights on one device."""
        leaves = jax.tree.leaves(self.parameters, is_leaf=lambda leaf: isinstance(leaf, Matrix))
        matrices = [leaf.weight for leaf in leaves if isinstance(leaf, Matrix)]
        return frozenset(
            _hlo.Array(_NAMES[leaf.dtype.name], leaf.sharding.shard_shape(leaf.shape))
            for leaf in [*matrices, self.parameters.embedding]
        )

    @cached_property
    def _programs(self) -> Programs:
        shape = StepShape(
            config=self._loader.source.config,
            mesh=self.mesh,
            platform="gpu",
            compute=BF16,
            has_kernel=True,
        )
        return Programs(self._loader, self.parameters, shape)

    def step(
        self, *, batch: int, tokens: int, slots: int | None = None, head: Head = Head.LAST
    ) -> Step:
        """Compile a step; what it has in common with an earlier one has no texts again."""
        absent = self._loader.absent
        cache = empty_cache(
            self._loader.source.config,
            self.mesh,
            slots=slots or batch,
            past=room(CONTEXT, platform="gpu")[1],
            dtype=stored_type(BF16, platform="gpu"),
            zeros=absent,
        )
        read = absent((), jnp.dtype(jnp.int32))
        began = time.process_time()
        step = self._programs.step(cache, read, batch=batch, time=tokens, head=head)
        seconds = time.process_time() - began
        mesh, layers = f"{self.mesh.expert}x{self.mesh.model}", self.layers
        texts = self.compiler.folder(
            f"{mesh}-{self.precision}-{batch}x{tokens}-{layers}-{head.name}"
        )
        return Step(
            embed=Program.of(step.embed, texts),
            layers=Program.of(step.layers[0], texts),
            head=Program.of(step.head, texts),
            together=step.together,
            seconds=seconds,
        )
