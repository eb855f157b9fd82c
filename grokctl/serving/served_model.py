"""The model as clients see it: its names, its facts, and its prompts in tokens."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, Final

from grokctl import __version__
from grokctl.checkpoint.tensor_source import TensorSource, digest_of_small
from grokctl.errors import UsageError
from grokctl.inference.plan import RunPlan
from grokctl.model.tensors import tensor_specs
from grokctl.serving.completion_request import CompletionRequest, Content
from grokctl.serving.vocabulary import Vocabulary
from grokctl.serving.wire_errors import WireError, bad_request, of_usage
from grokctl.session.prompts import check_settings

_OWNER: Final = "grokctl"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A prompt in tokens, and as the text that an answer repeats."""

    ids: tuple[int, ...]
    text: str
    """What `echo` puts before a completion."""
    offsets: Sequence[int]
    """Where each token begins in the text; empty if nobody wants to know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model under one name or more."""

    name: str
    """Of the checkpoint, never a path."""
    aliases: tuple[str, ...] = ()
    plan: RunPlan
    vocabulary: Vocabulary | None
    """None for a checkpoint without a tokenizer."""
    created: int
    """Seconds since 1970 when the server began."""
    fingerprint: str
    """Changes with whatever changes texts: version, weights, precision, mesh, types."""
    parameters: int
    nbytes: int
    """Of the weights."""
    bandwidth: float | None
    """Bytes a second of the devices' memory; None if it was not measured."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names that requests may use."""
        return (self.name, *self.aliases)

    def check_name(self, name: str | None) -> str:
        """The name that an answer repeats.

        Raises:
            WireError: There is no such model.
        """
        if name is None:
            return self.name
        if name not in self.names:
            message = f"model: expected {' or '.join(self.names)}, found {name[:64]!r}"
            raise WireError(404, message, "model_not_found", "model")
        return name

    def card(self, name: str) -> dict[str, Any]:
        """The entry of a list of models."""
        config = self.plan.config
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": _OWNER,
            "root": self.name,
            "parent": None,
            "max_model_len": self.plan.context,
            "meta": {
                "n_vocab": config.vocab_size,
                "n_ctx": self.plan.context,
                "n_ctx_train": config.sequence_len,
                "n_embd": config.emb_size,
                "n_params": self.parameters,
                "size": self.nbytes,
            },
        }

    # --- prompts

    def encode(self, request: CompletionRequest) -> list[EncodedPrompt]:
        """Token ids of all prompts of a request; takes long for long texts.

        Raises:
            WireError: A prompt, or another field, is nothing for this model.
        """
        try:
            check_settings(request.settings, self.plan)
        except UsageError as error:
            raise of_usage(error) from error
        return [self._encoded(content, request) for content in request.prompts]

    def _encoded(self, content: Content, request: CompletionRequest) -> EncodedPrompt:
        ids = self.tokens(content) if isinstance(content, str) else content
        self._check(ids)
        if not request.echo:
            return EncodedPrompt(ids=ids, text="", offsets=())
        text = content if isinstance(content, str) else self._echoed(ids, request)
        offsets: Sequence[int] = ()
        if request.settings.logprobs is not None:
            words = self.vocabulary
            offsets = [0] * len(ids) if words is None else words.offsets(ids, text)
        return EncodedPrompt(ids=ids, text=text, offsets=offsets)

    def _echoed(self, ids: Sequence[int], request: CompletionRequest) -> str:
        """The text of ids; what they leave open is in the completion, if there is one."""
        if self.vocabulary is None:
            return ""
        if request.settings.max_tokens == 0:
            return self.vocabulary.tokenizer.decode(ids)
        return self.vocabulary.certain_text(ids)

    def tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt.

        Raises:
            WireError: There is no tokenizer, or the text is longer than any context.
        """
        words = self.require_vocabulary()
        most = self.plan.context * words.longest
        if len(text) > most:
            raise _too_long(
                f"{len(text):,} characters, at least one token for {words.longest}", self
            )
        return tuple(words.tokenizer.encode(text))

    def _check(self, ids: Sequence[int]) -> None:
        if len(ids) > self.plan.context:
            raise _too_long(f"{len(ids):,} tokens", self)
        try:
            self.plan.check(ids)
        except UsageError as error:
            raise bad_request(f"prompt: {error}", param="prompt") from error

    def require_vocabulary(self) -> Vocabulary:
        """The tokenizer's pieces.

        Raises:
            WireError: The checkpoint has no tokenizer.
        """
        if self.vocabulary is None:
            message = "this model has no tokenizer.model: it takes and gives token ids only"
            raise bad_request(message, param="prompt")
        return self.vocabulary


def _too_long(found: str, model: ServedModel) -> WireError:
    message = f"prompt: expected at most {model.plan.context:,} tokens, found {found}"
    return bad_request(message, param="prompt", code="context_length_exceeded")


def describe(
    source: TensorSource,
    plan: RunPlan,
    *,
    name: str,
    tokenizer: Path | None,
    aliases: Sequence[str] = (),
    bandwidth: float | None = None,
) -> ServedModel:
    """The model that an engine runs, as clients see it.

    Args:
        source: Its checkpoint; norms and routers are read, because they tell weights apart.
        plan: How it runs.
        name: Of the checkpoint.
        tokenizer: The file of the plan's tokenizer.
        aliases: Further names.
        bandwidth: Bytes a second of the devices' memory, if it was measured.
    """
    precision = str(source.storage.precision)
    options = plan.options
    facts = (digest_of_small(source), precision, options.mesh, options.compute, options.kv)
    digest = sha256(" ".join(map(str, (*facts, plan.context))).encode()).hexdigest()
    words = None
    if tokenizer is not None and plan.tokenizer is not None:
        words = Vocabulary(tokenizer, plan.tokenizer, size=plan.config.vocab_size)
    return ServedModel(
        name=name,
        aliases=tuple(aliases),
        plan=plan,
        vocabulary=words,
        created=int(time.time()),
        fingerprint=f"grokctl-{__version__}-{precision}-{options.mesh}-{digest[:8]}",
        parameters=sum(prod(spec.shape) for spec in tensor_specs(plan.config)),
        nbytes=sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in source.storage.tensors),
        bandwidth=bandwidth,
    )
