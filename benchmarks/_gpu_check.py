"""Grok-1 compiled for absent H100s: what a step starts, asks the host and copies, and its time.

A layer is what a program of two layers has more than a program of one, or a program of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import ceil
from pathlib import Path
from typing import Final

import _hlo
import _thunks
import jax
from _absent_gpus import CONTEXT, Compiler, Model, Step
from _gpu_memory import check_memory

from grokctl.checkpoint.storage import released_storage, storage_in
from grokctl.model.bucketing import POSITION_BLOCK, room
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute, Precision
from grokctl.model.sizing import Terms, cache_bytes
from grokctl.planning.accelerators import find
from grokctl.planning.plans import Spread
from grokctl.planning.step_time import (
    LAUNCHES_OF_A_LAYER,
    LAUNCHES_OUTSIDE,
    REACHED,
    Counts,
    StepTime,
    step_time,
    sums_s,
)

MOST_LAUNCHES: Final = 40
"""A layer of decoding one token on eight devices, beside its sums over devices."""
FEW: Final = 2
"""Launches by which the counts of `doctor`'s estimate may differ."""
POSITIONS: Final = (100, 2000, 8000)
H100: Final = "h100-80gb"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step on one mesh."""

    compiler: Compiler
    mesh: MeshShape
    batch: int
    tokens: int
    precision: Precision = Precision.INT8

    @property
    def is_decode(self) -> bool:
        """Whether each sequence has one token."""
        return self.tokens == 1

    def __str__(self) -> str:
        what = "decode" if self.is_decode else "prefill"
        return f"{what}, {self.batch * self.tokens} tokens, {self.mesh}"

    def _model(self, layers: int) -> Model:
        return Model(
            compiler=self.compiler, mesh=self.mesh, layers=layers, precision=self.precision
        )

    @cached_property
    def weights(self) -> frozenset[_hlo.Array]:
        """Types of weights on a device."""
        return self._model(1).weights

    @cached_property
    def one(self) -> Step:
        """With one layer."""
        return self._model(1).step(batch=self.batch, tokens=self.tokens)

    @cached_property
    def two(self) -> Step:
        """With two layers."""
        return self._model(2).step(batch=self.batch, tokens=self.tokens)

    def layer(self, turns: int = 1) -> _thunks.Tally:
        """What a layer does."""
        if self.one.together == 1:
            return self.one.layers.tally(turns)
        return self.two.layers.tally(turns) - self.one.layers.tally(turns)

    def outside(self) -> _thunks.Tally:
        """What the whole model does beside its layers."""
        programs = ceil(GROK_1.num_layers / self.one.together)
        between = self.one.layers.tally(1) - self.layer()
        return self.one.embed.tally(1) + between * programs + self.one.head.tally(1)

    @cached_property
    def copies(self) -> list[_hlo.Copy]:
        """Weights that a layer, the embedding or the head writes again."""
        programs = (self.one.embed, self.one.layers, self.one.head)
        return [copy for each in programs for copy in _hlo.copies(each.hlo, self.weights)]

    def time_at(self, position: int) -> StepTime:
        """Estimate for the token at a position, on H100s."""
        turns = position // POSITION_BLOCK + 1
        whole = self.layer(turns) * GROK_1.num_layers + self.outside()
        counts = Counts(launches=whole.launches, sums=whole.sums, waits=whole.waits)
        storage = storage_in(released_storage(GROK_1), self.precision, self.mesh)
        dtype = Terms(context=CONTEXT, compute=Compute.BFLOAT16).cache_dtype
        seen = cache_bytes(GROK_1, self.mesh, slots=1, past=position, dtype=dtype)
        nbytes = max(Spread.of(storage, self.mesh).read) + seen
        waiting = sums_s(GROK_1, self.mesh, platform="gpu", has_fast_links=True)
        return step_time(
            counts, nbytes=nbytes, rate=find(H100).bandwidth * REACHED["gpu"], sums_s=waiting
        )

    def faults(self) -> Iterator[str]:
        """What decoding must not do."""
        if not self.is_decode:
            return
        if waits := self.layer().waits + self.outside().waits:
            yield f"{self}: host waits: expected none, found {waits} in a layer and outside"
        for copy in self.copies:
            yield f"{self}: {copy.name} writes {copy.written}, of the weight {copy.weight}"
        if self.batch > 1 or self.mesh.size == 1:
            return
        launches = self.layer().launches
        if launches > MOST_LAUNCHES:
            yield f"{self}: launches a layer: expected at most {MOST_LAUNCHES}, found {launches}"
        for name, counted, found in (
            ("LAUNCHES_OF_A_LAYER", LAUNCHES_OF_A_LAYER, launches),
            ("LAUNCHES_OUTSIDE", LAUNCHES_OUTSIDE, self.outside().launches),
        ):
            if abs(counted - found) > FEW:
                yield f"{self}: step_time.{name}: expected about {counted}, found {found}"


def cases(compiler: Compiler, devices: Sequence[int], batches: Sequence[int]) -> Iterator[Case]:
    """Every step on every mesh; a batch of 0 stands for a chunk of a prompt."""
    chunk = room(CONTEXT, platform="gpu")[0]
    for size, batch in product(devices, batches):
        shape = {"batch": batch, "tokens": 1} if batch else {"batch": 1, "tokens": chunk}
        yield Case(compiler=compiler, mesh=MeshShape(1, size), **shape)


def check(*, devices: Sequence[int], batches: Sequence[int], keep: Path | None) -> int:
    """Compile, print what was found, and say with 1 that decoding does what it must not."""
    found = []
    compiler = Compiler(keep)
    print(f"JAX {jax.__version__}, int8, {CONTEXT} positions, compiled for absent H100s.\n")
    print(
        "| step | launches a layer | and a further block | outside | sums a layer | host waits "
        "a layer | copies of weights a layer | graphs a layer | temporaries | CPU seconds |"
    )
    print("| --- |" + " ---: |" * 9)
    for case in cases(compiler, devices, batches):
        found.append(case)
        print(_row(case), flush=True)
    _print_kernels([case for case in found if case.is_decode])
    for case in found:
        if case.is_decode and case.batch == 1 and case.mesh.size > 1:
            _print_times(case)
    faults = [fault for case in found for fault in case.faults()]
    faults += check_memory(compiler) if 0 in batches else []
    print(
        "\n"
        + ("\n".join(faults) or "Decoding asks no host, copies no weight, and starts few enough.")
    )
    return 1 if faults else 0


def _row(case: Case) -> str:
    layer, more = case.layer(), case.layer(2) - case.layer()
    copied = sum(copy.written.nbytes for copy in case.copies)
    values = (
        layer.launches,
        more.launches,
        case.outside().launches,
        layer.sums,
        f"{layer.waits}, {more.waits} a block" if more.waits else layer.waits,
        f"{len(case.copies)}, {copied / 1e6:,.0f} MB" if case.copies else 0,
        layer.graphs,
        f"{case.two.layers.temporaries / 1e6:,.1f} MB",
        f"{case.one.seconds:.0f} and {case.two.seconds:.0f}",
    )
    return f"| {case} | {' | '.join(map(str, values))} |"


def _print_kernels(found: Sequence[Case]) -> None:
    print(
        "\n| kernels of | name | registers | spilled bytes | loads in flight | FFMA | FMUL | FADD |"
    )
    print("| --- | --- |" + " ---: |" * 6)
    for case in found:
        for kernel in case.one.layers.kernels():
            used, done = kernel.resources, kernel.operations
            print(
                f"| {case} | {kernel.name} | {used.registers} | {used.spilled} | {kernel.loads} "
                f"| {done['FFMA']} | {done['FMUL']} | {done['FADD']} |",
                flush=True,
            )


def _print_times(case: Case) -> None:
    print(f"\n{case}, on H100s, milliseconds:\n")
    print("| position | launches | reading | sums | host waits | ends | a token | tokens/s |")
    print("| ---: |" + " ---: |" * 7)
    for position in POSITIONS:
        time = case.time_at(position)
        parts = (
            time.launches_s,
            time.reading_s,
            time.sums_s,
            time.waits_s,
            time.ends_s,
            time.total_s,
        )
        columns = " | ".join(f"{part * 1e3:.2f}" for part in parts)
        print(f"| {position:,} | {columns} | {1 / time.total_s:.0f} |")
