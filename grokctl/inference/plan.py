"""How to run a checkpoint, checked before anything is loaded."""

from collections.abc import Sequence as Several
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grokctl.errors import UsageError, invalid
from grokctl.model.config import GrokConfig
from grokctl.model.placement import MeshShape, check_mesh
from grokctl.model.precision import Compute, KvType
from grokctl.model.sizing import Terms
from grokctl.model.tokenizer import Tokenizer
from grokctl.planning.residence import Counts

_MOST_SLOTS: Final = 256
"""A program names each of its sequences, so it grows with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to run a checkpoint."""

    mesh: MeshShape
    compute: Compute = Compute.BFLOAT16
    context: int | None = None
    """Positions to keep room for; the model's own by default."""
    slots: int = 1
    """Sequences that the cache has room for at a time."""
    kv: KvType = KvType.COMPUTE
    compilation_cache: Path | None = None
    """`cache/xla` of a home; None keeps no compiled programs."""
    native_cache: Path | None = None
    """`cache/native` of a home; None takes the kernel of CPUs only where it is installed."""
    threads: int | None = None
    """That compute on the CPU; by default as many as usable cores."""
    max_memory: int | None = None
    """Most bytes of main memory for weights, cache and workspace on a CPU; by default what is free.
    Experts beyond it are streamed."""
    counts: Counts | None = None
    """How often earlier texts chose each expert: if some are streamed, the most chosen stay."""
    draws_on_device: bool | None = None
    """Whether devices look for the tokens to draw from; by default accelerators do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """A run before its weights are loaded, with everything checked that costs nothing to check."""

    config: GrokConfig
    options: EngineOptions
    context: int
    """Positions to keep room for."""
    tokenizer: Tokenizer | None

    @property
    def mesh(self) -> MeshShape:
        """The mesh that the model is split over."""
        return self.options.mesh

    @property
    def terms(self) -> Terms:
        """Context, types and slots."""
        options = self.options
        return Terms(
            context=self.context, compute=options.compute, slots=options.slots, kv=options.kv
        )

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

    def check(self, tokens: Several[int]) -> None:
        """Refuse tokens that the model cannot read.

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
        InvalidValueError: The context, or the number of slots, lies outside its range.
        CorruptCheckpointError: The tokenizer is not the model's.
    """
    check_mesh(options.mesh, config)
    context = config.sequence_len if options.context is None else options.context
    if not 0 < context <= config.sequence_len:
        raise invalid("context", context, f"expected 1 to {config.sequence_len}")
    if not 0 < options.slots <= _MOST_SLOTS:
        raise invalid("slots", options.slots, f"expected 1 to {_MOST_SLOTS}")
    words = Tokenizer(tokenizer, vocab_size=config.vocab_size) if tokenizer else None
    return RunPlan(config=config, options=options, context=context, tokenizer=words)
