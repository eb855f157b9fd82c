"""Load a checkpoint onto devices and stream generated tokens, or score given ones."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.logical import TensorSource
from grokctl.errors import Reason, UsageError, corrupt
from grokctl.events import Advanced, Finished, Observer, Stage, Started, Unit, ignore
from grokctl.generation import (
    FinishReason,
    Generation,
    Score,
    Stats,
    StopFilter,
    Token,
    negative_log_likelihood,
)
from grokctl.hardware import check_memory, find_devices, memory_bandwidth, use_compilation_cache
from grokctl.loading import Loader, out_of_memory
from grokctl.model.config import GrokConfig
from grokctl.model.parameters import (
    Cache,
    LayerCache,
    Parameters,
    cache_bytes,
    cache_shape,
)
from grokctl.model.placement import MeshShape, check_mesh
from grokctl.model.sampling import Sampling
from grokctl.model.step import StepShape
from grokctl.model.tokenizer import TextStream, Tokenizer
from grokctl.programs import Programs, Step

_SHORTEST_CHUNK: Final = 16
_LONGEST_CHUNK: Final = 512
"""Prompts run in chunks of a power of two within these, so that no prompt compiles its own."""


class Compute(StrEnum):
    """Type of the key-value cache, and of operands where the platform is fast in it."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to run a checkpoint."""

    mesh: MeshShape
    compute: Compute = Compute.BFLOAT16
    context: int | None = None
    """Positions to keep room for; the model's own by default."""
    compilation_cache: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What can be said about a run before its weights are loaded."""

    config: GrokConfig
    mesh: MeshShape
    context: int
    tokenizer: Tokenizer | None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            UsageError: The checkpoint came without a tokenizer.
        """
        if self.tokenizer is None:
            raise UsageError(
                "this checkpoint has no tokenizer.model, so it takes no text",
                "put tokenizer.model into its folder, or use --token-ids 1,2,3",
            )
        return self.tokenizer.encode(text)

    def check(self, tokens: Sequence[int]) -> None:
        """Refuse what the model cannot read.

        Raises:
            UsageError: There is no token, more than the context, or impossible ids.
        """
        if not tokens:
            raise UsageError("the prompt is empty: there is nothing to continue", "-p 'Once upon'")
        if len(tokens) > self.context:
            longest = self.config.sequence_len
            hint = f"--context {longest}" if self.context < longest else None
            raise UsageError(
                f"the prompt is {len(tokens)} tokens, the context {self.context}", hint
            )
        wrong = [token for token in tokens if not 0 <= token < self.config.vocab_size]
        if wrong:
            raise UsageError(
                f"token id {wrong[0]} lies outside the vocabulary of {self.config.vocab_size}"
            )


def plan(config: GrokConfig, options: EngineOptions, *, tokenizer: Path | None = None) -> RunPlan:
    """Check everything about a run that costs nothing to check.

    Args:
        config: The model.
        options: Mesh, type of computation, length of the context.
        tokenizer: The sentencepiece model; without one, only token ids can be used.

    Raises:
        PlacementError: The model does not divide over the mesh.
        UsageError: The context is not one that the model has.
        CorruptCheckpointError: The tokenizer is not the model's.
    """
    check_mesh(options.mesh, config)
    context = config.sequence_len if options.context is None else options.context
    if not 0 < context <= config.sequence_len:
        raise UsageError(f"context is {context} tokens, possible are 1 to {config.sequence_len}")
    words = Tokenizer(tokenizer, vocab_size=config.vocab_size) if tokenizer else None
    return RunPlan(config=config, mesh=options.mesh, context=context, tokenizer=words)


def infer(
    source: TensorSource,
    options: EngineOptions,
    *,
    tokenizer: Path | None = None,
    observe: Observer = ignore,
) -> "Engine":
    """Load a checkpoint onto devices.

    Args:
        source: A ready checkpoint, whose files are mapped if its mesh is the one asked for, or
            anything else that tensors can be cut from, which is copied.
        options: Mesh, type of computation, length of the context.
        tokenizer: The sentencepiece model; without one, only token ids can be used.
        observe: Receives progress in bytes, then the phases of running.

    Raises:
        HardwareError: It does not fit.
        GrokctlError: As `plan` does.
    """
    planned = plan(source.config, options, tokenizer=tokenizer)
    return start(source, options, planned, observe=observe)


def start(
    source: TensorSource, options: EngineOptions, planned: RunPlan, *, observe: Observer = ignore
) -> "Engine":
    """Load a checkpoint for a run that was planned already; see `infer`."""
    devices = find_devices(options.mesh.size, observe=observe)
    if options.compilation_cache is not None:
        use_compilation_cache(options.compilation_cache, observe=observe)
    started = time.perf_counter()
    with out_of_memory():
        loader = Loader(source, options.mesh, devices)
        parameters = loader.load(observe)
    return Engine(
        plan=planned,
        loader=loader,
        parameters=parameters,
        compute=options.compute,
        load_s=time.perf_counter() - started,
        observe=observe,
    )


class Engine:
    """A model on its devices. Runs one sequence at a time; not thread-safe."""

    def __init__(
        self,
        *,
        plan: RunPlan,
        loader: Loader,
        parameters: Parameters,
        compute: Compute,
        load_s: float,
        observe: Observer,
    ) -> None:
        self.plan = plan
        self.config = plan.config
        self.mesh = plan.mesh
        self.tokenizer = plan.tokenizer
        self.context = context = plan.context
        self._loader = loader
        self._observe = observe
        self._shape = StepShape(
            config=self.config,
            mesh=self.mesh,
            platform=loader.devices[0].platform,
            compute=jnp.dtype(compute),
        )
        self._chunk = min(_LONGEST_CHUNK, max(_SHORTEST_CHUNK, 1 << (context - 1).bit_length()))
        self._programs = Programs(loader, parameters, self._shape)
        self._steps: dict[tuple[int, bool], Step] = {}
        self._parameters = parameters
        self._load_s = load_s
        self._compile_s = 0.0
        self._cache = self._new_cache()

    def _new_cache(self) -> Cache:
        # a whole number of chunks, so that padding behind the last one stays inside
        past = -(-self.context // self._chunk) * self._chunk
        shape = cache_shape(self.config, self.mesh, batch=1, context=past)
        dtype = self._shape.compute
        nbytes = cache_bytes(self.config, self.mesh, batch=1, context=past, dtype=dtype)
        if self._shape.platform == "cpu":
            check_memory(
                nbytes * self.mesh.size, purpose=f"the cache of {self.context} tokens of context"
            )
        with out_of_memory():
            return tuple(
                LayerCache(
                    key=self._loader.zeros(shape, dtype), value=self._loader.zeros(shape, dtype)
                )
                for _ in range(self.config.num_layers)
            )

    def generate(
        self,
        prompt: Sequence[int],
        *,
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Generation:
        """Continue a prompt.

        Args:
            prompt: Token ids, at least one.
            sampling: How tokens are chosen.
            max_tokens: Ends with `length` after this many.
            stop: Ends with `stop` where the text comes to one of these, which is left out.
            ignore_eos: Whether to go on after the end token.

        Returns:
            A generation whose tokens are computed as they are taken.

        Raises:
            UsageError: The prompt is empty, longer than the context, or holds impossible ids.
        """
        self.plan.check(prompt)
        if max_tokens < 0:
            raise UsageError(f"max-tokens is at least 0, not {max_tokens}")
        stats = Stats(load_s=self._load_s, bytes_per_token=self._loader.bytes_per_token())
        generation = Generation(
            tokens=iter(()), prompt_tokens=len(prompt), seed=sampling.seed, stats=stats
        )
        limit = min(max_tokens, self.context - len(prompt) + 1)
        ids = self._sample(list(prompt), sampling, limit, stats)
        stream = self.tokenizer.stream(prompt) if self.tokenizer else None
        generation.tokens = self._texts(
            ids, generation, stream, StopFilter(tuple(stop)), ignore_eos=ignore_eos
        )
        return generation

    def _sample(
        self, prompt: list[int], sampling: Sampling, limit: int, stats: Stats
    ) -> Iterator[int]:
        """Token ids without end, up to a limit; fills in the timings."""
        if limit == 0:
            return
        for length in self._lengths(len(prompt), limit):
            self._step(length, every=False)  # now, so that nothing compiles between tokens
        compiled = self._compile_s
        started = time.perf_counter()
        logits = self._prefill(prompt)
        token = sampling.choose(logits, 0)
        spent = time.perf_counter() - started - (self._compile_s - compiled)
        stats.first_token_s = spent
        stats.prefill_tokens_per_s = len(prompt) / spent
        decoded = 0.0
        for step in range(1, limit + 1):
            stats.compile_s = self._compile_s
            yield token
            if step == limit:
                return
            compiled, started = self._compile_s, time.perf_counter()
            logits = self._run([token], len(prompt) + step - 1, every=False)[0]
            token = sampling.choose(logits, step)
            decoded += time.perf_counter() - started - (self._compile_s - compiled)
            stats.decode_tokens_per_s = step / decoded

    def _texts(
        self,
        ids: Iterator[int],
        generation: Generation,
        stream: TextStream | None,
        held: "StopFilter",
        *,
        ignore_eos: bool,
    ) -> Iterator[Token]:
        generation.finish_reason = FinishReason.LENGTH
        for token in ids:
            if token == self.config.eos_token and not ignore_eos:
                generation.finish_reason = FinishReason.STOP
                break
            text = held.push(stream.push(token) if stream else "")
            yield Token(token, text)
            if held.found:
                generation.finish_reason = FinishReason.STOP
                return
        rest = held.push(stream.finish() if stream else "") + held.finish()
        if rest:
            yield Token(None, rest)

    def score(
        self, tokens: Sequence[int], *, logits_out: NDArray[np.float32] | None = None
    ) -> Score:
        """Likelihood of given tokens, each predicted from those before it.

        Args:
            tokens: At least one id.
            logits_out: Filled with the logits, `(tokens, vocab)`.

        Raises:
            UsageError: There is no token, more than the context, or impossible ids.
        """
        self.plan.check(tokens)
        nll = 0.0
        self._observe(Started(stage=Stage.SCORE, total=len(tokens), unit=Unit.TOKENS))
        for start in range(0, len(tokens), self._chunk):
            part = list(tokens[start : start + self._chunk])
            logits = self._run(part, start, every=True)
            if logits_out is not None:
                logits_out[start : start + len(part)] = logits
            targets = np.asarray(tokens[start + 1 : start + 1 + len(part)], np.int64)
            nll += negative_log_likelihood(logits[: len(targets)], targets)
            self._observe(Advanced(stage=Stage.SCORE, done=start + len(part)))
        self._observe(Finished(stage=Stage.SCORE))
        return Score(tokens=len(tokens), nll=nll)

    def measure_bandwidth(self, stats: Stats) -> None:
        """Measure the memory of these devices, and say what share of it decoding reached."""
        rate = stats.decode_tokens_per_s * stats.bytes_per_token
        stats.bandwidth_fraction = rate / memory_bandwidth(self._loader.devices)

    def _prefill(self, prompt: list[int]) -> NDArray[np.float32]:
        """Run a prompt; return the logits after its last token."""
        logits = np.empty(0, np.float32)
        self._observe(Started(stage=Stage.PREFILL, total=len(prompt), unit=Unit.TOKENS))
        for start in range(0, len(prompt), self._chunk):
            part = prompt[start : start + self._chunk]
            logits = self._run(part, start, every=False)[0]
            self._observe(Advanced(stage=Stage.PREFILL, done=start + len(part)))
        self._observe(Finished(stage=Stage.PREFILL))
        return logits

    def _lengths(self, prompt: int, limit: int) -> list[int]:
        """Lengths of the steps that a generation takes."""
        parts = [min(self._chunk, prompt - start) for start in range(0, prompt, self._chunk)]
        return sorted({self._padded(part) for part in [*parts, *([1] if limit > 1 else [])]})

    def _padded(self, length: int) -> int:
        if length == 1:
            return 1
        return min(self._chunk, max(_SHORTEST_CHUNK, 1 << (length - 1).bit_length()))

    def _run(self, tokens: list[int], start: int, *, every: bool) -> NDArray[np.float32]:
        """One step: logits `(tokens, vocab)`, or `(1, vocab)` after the last token only."""
        length = self._padded(len(tokens))
        padded = [*tokens, *[self.config.pad_token] * (length - len(tokens))]
        step = self._step(length, every=every)
        select = None if every else len(tokens) - 1
        with out_of_memory():
            try:
                logits, self._cache = step.run(
                    self._parameters, self._cache, padded, start, select=select
                )
                found: NDArray[np.float32] = np.asarray(logits)[0]
            except KeyboardInterrupt:
                self._cache = self._new_cache()  # the old one was given away
                raise
        found = found[: len(tokens)]
        if not np.isfinite(found).all():
            raise corrupt(
                "logits",
                Reason.ALTERED,
                "the model computed values that are not finite, so weights must be damaged",
                "grokctl verify",
            )
        return found

    def _step(self, length: int, *, every: bool) -> Step:
        """The compiled step of a length; compiled once."""
        key = (length, every)
        if key not in self._steps:
            started = time.perf_counter()
            detail = "one token" if length == 1 else f"{length} tokens"
            self._observe(Started(stage=Stage.COMPILE, unit=Unit.NOTHING))
            self._observe(Advanced(stage=Stage.COMPILE, detail=detail))
            with out_of_memory():
                self._steps[key] = self._programs.step(self._cache, length, every=every)
            self._observe(Finished(stage=Stage.COMPILE))
            self._compile_s += time.perf_counter() - started
        return self._steps[key]
