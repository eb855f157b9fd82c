"""How to run a checkpoint, checked before anything is loaded."""

from collections.abc import Sequence as Several
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import jax.numpy as jnp

from grokctl.errors import UsageError, invalid
from grokctl.model.config import GrokConfig
from grokctl.model.placement import MeshShape, check_mesh
from grokctl.model.precision import Compute, KvType
from grokctl.model.sizing import cache_type
from grokctl.model.tokenizer import Tokenizer

_MOST_STREAMS: Final = 256
"""A program names each of its sequences, so it grows with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to run a checkpoint."""

    mesh: MeshShape
    compute: Compute = Compute.BFLOAT16
    context: int | None = None
    """Positions to keep room for; the model's own by default."""
    streams: int = 1
    """Sequences that can be under way at a time, each with a cache of its own."""
    kv: KvType = KvType.COMPUTE
    compilation_cache: Path | None = None

    @property
    def cache_dtype(self) -> jnp.dtype:
        """Type of the key-value cache."""
        return cache_type(self.compute, self.kv)


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

    def check(self, tokens: Several[int]) -> None:
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
        InvalidValueError: The context, or the number of streams, lies outside its range.
        CorruptCheckpointError: The tokenizer is not the model's.
    """
    check_mesh(options.mesh, config)
    context = config.sequence_len if options.context is None else options.context
    if not 0 < context <= config.sequence_len:
        raise invalid("context", context, f"expected 1 to {config.sequence_len}")
    if not 0 < options.streams <= _MOST_STREAMS:
        raise invalid("streams", options.streams, f"expected 1 to {_MOST_STREAMS}")
    words = Tokenizer(tokenizer, vocab_size=config.vocab_size) if tokenizer else None
    return RunPlan(config=config, mesh=options.mesh, context=context, tokenizer=words)
