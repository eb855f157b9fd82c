"""Measure how fast a loaded model reads prompts and writes tokens, beside what its memory gives."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from grokctl.errors import UsageError
from grokctl.events import Advanced, Finished, Observer, Stage, Started, Unit, ignore
from grokctl.inference.devices import memory_bandwidth
from grokctl.inference.engine import Engine
from grokctl.inference.generation import BatchStats, Generation, Request
from grokctl.inference.plan import RunPlan
from grokctl.inference.scheduler import Scheduler
from grokctl.inference.stream import Batch
from grokctl.model.sampling import Sampling
from grokctl.text import format_number

_SEED: Final = 1
RUN_DEFAULTS: Final = Sampling(temperature=0.7, top_p=0.95)
"""Sampling of `grokctl run`."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts of one length, as many at a time as a batch holds."""

    prompt_tokens: int
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one workload came to; nothing compiled while it ran."""

    prompt_tokens: int
    batch: int
    prefill_tokens_per_s: float
    first_token_s: float
    """From a prompt to its first token, if no other prompt comes before it."""
    decode_tokens_per_s: float
    """Of all prompts of the batch together."""
    step_s: float
    """For one more token of each prompt."""
    bytes_per_step: int
    """Weights read for that, on all devices together."""
    bandwidth_fraction: float
    """Share of the measured bandwidth that reading them took."""
    hit_rate: float | None
    """Share of the chosen experts that were in memory; None if none are streamed."""
    disk_bytes_per_step: int | None
    """Bytes of the others."""
    disk_fraction: float | None
    """Share of the disk's rate while loading at which they came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all workloads came to, and the limit."""

    max_tokens: int
    load_s: float
    compile_s: float
    bandwidth: float
    """Bytes a second that the memory of all devices gave in this run."""
    kernel: str
    """What multiplies on a CPU, or why it is not the native kernel; empty on accelerators."""
    kernel_rate: float | None
    """Bytes a second of int8 weights that the native kernel alone read for one token."""
    rows: tuple[Row, ...]


def check_workloads(plan: RunPlan, workloads: Sequence[Workload], max_tokens: int) -> None:
    """Refuse what the context does not hold.

    Raises:
        UsageError: A prompt and its tokens are too long.
    """
    longest = max(workload.prompt_tokens for workload in workloads)
    if longest + max_tokens > plan.context:
        room = plan.config.sequence_len
        raise UsageError(
            f"a prompt of {longest:,} and {max_tokens:,} tokens are {longest + max_tokens:,}, "
            f"the context holds {plan.context:,}",
            f"--context {longest + max_tokens}" if longest + max_tokens <= room else None,
        )


def bench(
    engine: Engine,
    workloads: Sequence[Workload],
    *,
    max_tokens: int,
    observe: Observer = ignore,
) -> Bench:
    """Run each workload on random prompts, sampled as `run` does, past the end token.

    Args:
        engine: Runs as many prompts at a time as the largest batch.
        workloads: What to run, in this order.
        max_tokens: Tokens after each prompt, at least 2.
        observe: Receives progress in workloads.

    Raises:
        UsageError: The context does not hold it.
    """
    check_workloads(engine.plan, workloads, max_tokens)
    bandwidth, kernel_rate = memory_bandwidth(engine.devices), engine.kernel_rate()
    random = np.random.default_rng(_SEED)
    rows: list[Row] = []
    observe(Started(stage=Stage.BENCH, total=len(workloads), unit=Unit.NOTHING))
    for done, workload in enumerate(workloads):
        detail = f"{format_number(workload.prompt_tokens, 'token')} x {workload.batch}"
        observe(Advanced(stage=Stage.BENCH, done=done, detail=detail))
        shape = workload.batch, workload.prompt_tokens
        prompts = random.integers(engine.config.vocab_size, size=shape).tolist()
        rows.append(_measure(engine, prompts, max_tokens, bandwidth))
    observe(Finished(stage=Stage.BENCH))
    return Bench(
        max_tokens=max_tokens,
        load_s=engine.load_s,
        compile_s=engine.runner.compile_s,
        bandwidth=bandwidth,
        kernel=engine.kernel,
        kernel_rate=kernel_rate,
        rows=tuple(rows),
    )


def _measure(engine: Engine, prompts: list[list[int]], max_tokens: int, bandwidth: float) -> Row:
    """Read prompts, each for one token; then continue all of them side by side.

    The second time their slots have kept them, so every step decodes all of them.
    """
    scheduler, batch, length = engine.scheduler, len(prompts), len(prompts[0])
    first = _requests(prompts if length == 1 else prompts[:1], 1)
    # compiles, and brings weights into memory
    _run(scheduler, [replace(request, cache_prompt=False) for request in first])
    read, readings = _run(scheduler, _requests(prompts, 1))
    _run(scheduler, _requests(prompts, 1))  # compiles
    decoded, _ = _run(scheduler, _requests(prompts, max_tokens))
    prefill_s = read.prefill_s + read.decode_s  # of a prompt of one token, a decode step reads it
    step_s = decoded.decode_s / decoded.steps
    return Row(
        prompt_tokens=length,
        batch=batch,
        prefill_tokens_per_s=batch * length / prefill_s,
        first_token_s=sum(reading.stats.first_token_s for reading in readings) / batch,
        decode_tokens_per_s=decoded.decode_tokens_per_s,
        step_s=step_s,
        bytes_per_step=decoded.bytes_per_step,
        bandwidth_fraction=decoded.bytes_per_step / step_s / bandwidth,
        hit_rate=decoded.hit_rate,
        disk_bytes_per_step=decoded.disk_bytes // decoded.steps if decoded.experts_chosen else None,
        disk_fraction=engine.disk_fraction(decoded),
    )


def _requests(prompts: list[list[int]], max_tokens: int) -> list[Request]:
    return [
        Request(
            prompt=tuple(prompt),
            sampling=replace(RUN_DEFAULTS, seed=seed),
            max_tokens=max_tokens,
            ignore_eos=True,
        )
        for seed, prompt in enumerate(prompts)
    ]


def _run(scheduler: Scheduler, requests: list[Request]) -> tuple[BatchStats, list[Generation]]:
    batch = Batch(scheduler, requests)
    generations = [generation for _, generation in batch]
    return batch.stats, generations
