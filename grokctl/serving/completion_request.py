"""The body of a request for completions, checked field by field before anything is computed."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, cast

from grokctl.errors import UsageError
from grokctl.inference.generation import PromptOutput, Request
from grokctl.model.bucketing import TOP_LOGPROBS
from grokctl.model.sampling import Sampling
from grokctl.serving import fields
from grokctl.serving.wire_errors import bad_request, of_usage, unsupported
from grokctl.session import settings

Content = str | tuple[int, ...]
"""A prompt as text, or as token ids."""

MOST_SEQUENCES: Final = 1024
"""Prompts times samples of one request."""
_MOST_SAMPLES: Final = 128
_DEFAULT_TOKENS: Final = 16
_SEEDS: Final = 2**64
_INT64: Final = 2**63
_LONGEST_NAME: Final = 40
"""Characters of a stranger's key that are repeated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """What a client asks for, before the tokenizer has seen it."""

    model: str | None
    """None for the only one."""
    prompts: tuple[Content, ...]
    settings: Request
    """How to continue each of them; its prompt is empty, its seed that of choice 0."""
    samples: int = 1
    """Continuations of each prompt."""
    echo: bool = False
    """Whether texts begin with their prompts."""
    stream: bool = False
    include_usage: bool = False
    """Whether a stream ends with the usage."""
    continuous_usage: bool = False
    """Whether every event has the usage so far."""
    return_ids: bool = False
    """Whether choices have token ids, and log-probabilities a second form with them."""
    tokens_as_ids: bool = False
    """Whether log-probabilities name tokens as `token_id:42`."""
    ignored: tuple[str, ...] = ()
    """Fields that have no effect here."""

    @property
    def choices(self) -> int:
        """Sequences to generate."""
        return len(self.prompts) * self.samples


def read_completion(body: Mapping[str, object]) -> CompletionRequest:
    """Check a body; see the table `FIELDS`.

    Args:
        body: A JSON object; null means that a field is absent.

    Raises:
        WireError: A field has another type, lies outside its range, or asks for what is not here.
    """
    given = {name: value for name, value in body.items() if value is not None}
    fields.refuse(given, _NEUTRAL)
    prompts = _prompts(given.get("prompt"))
    samples = fields.take(given, "n", _samples, 1)
    if len(prompts) * samples > MOST_SEQUENCES:
        found = f"{len(prompts):,} prompts, {samples} of each"
        raise bad_request(
            f"n: expected at most {MOST_SEQUENCES:,} choices, found {found}", param="n"
        )
    if fields.take(given, "best_of", fields.integer, samples) not in {1, samples}:
        raise unsupported("best_of", settings.brief(given["best_of"]), f"1 or n ({samples})")
    stream = fields.take(given, "stream", fields.switch, False)
    options = _stream_options(given, stream=stream)
    return CompletionRequest(
        model=fields.take(given, "model", fields.text, "") or None,
        prompts=prompts,
        settings=_settings(given),
        samples=samples,
        echo=fields.take(given, "echo", fields.switch, False),
        stream=stream,
        include_usage=fields.take(options, "include_usage", fields.switch, False),
        continuous_usage=fields.take(options, "continuous_usage_stats", fields.switch, False),
        return_ids=fields.take(given, "return_token_ids", fields.switch, False),
        tokens_as_ids=fields.take(given, "return_tokens_as_token_ids", fields.switch, False),
        ignored=tuple(sorted(name[:_LONGEST_NAME] for name in given if name not in FIELDS)),
    )


# --- values


def _samples(name: str, value: object) -> int:
    count = fields.integer(name, value)
    if not 1 <= count <= _MOST_SAMPLES:
        raise fields.mismatch(name, f"1 to {_MOST_SAMPLES}", value)
    return count


def _seed(name: str, value: object) -> int:
    """A signed number, as clients write it; -1 asks for a random one."""
    seed = fields.integer(name, value)
    if not -_INT64 <= seed < _SEEDS:
        raise fields.mismatch(name, "an integer of 64 bits", value)
    return _random_seed() if seed == -1 else seed % _SEEDS


def _random_seed() -> int:
    return int.from_bytes(os.urandom(8))


def _logprobs(name: str, value: object) -> int | None:
    """A number of likeliest tokens; clients of the chat interface say true or false."""
    if isinstance(value, bool):
        return 1 if value else None
    count = fields.integer(name, value)
    if not 0 <= count <= TOP_LOGPROBS:
        raise fields.mismatch(name, f"0 to {TOP_LOGPROBS}", value)
    return count


def _prompts(value: object) -> tuple[Content, ...]:
    """The four forms: a text, texts, ids, or lists of ids."""
    match value:
        case str():
            found: tuple[Content, ...] = (_prompt_text(value),)
        case [int(), *_] if isinstance(value, list):
            found = (_prompt_ids(value),)
        case [str() | list(), *_] if len(value) > MOST_SEQUENCES:
            raise fields.mismatch(
                "prompt", f"at most {MOST_SEQUENCES:,} prompts", f"{len(value):,}"
            )
        case [str(), *_]:
            found = tuple(_prompt_text(_one_kind(each, str)) for each in value)
        case [list(), *_]:
            found = tuple(_prompt_ids(_one_kind(each, list)) for each in value)
        case None | []:
            raise bad_request("prompt: expected text or token ids, found nothing", param="prompt")
        case _:
            raise fields.mismatch("prompt", "a text, texts, token ids or lists of them", value)
    return found


def _one_kind(value: object, kind: type[fields.Value]) -> fields.Value:
    if not isinstance(value, kind):
        message = (
            f"prompt: expected one kind of prompts, found {settings.brief(value)} among others"
        )
        raise bad_request(message, param="prompt")
    return value


def _prompt_text(text: str) -> str:
    try:
        return settings.check_text("prompt", text)
    except UsageError as error:
        raise of_usage(error) from error


def _prompt_ids(ids: list[object]) -> tuple[int, ...]:
    if set(map(type, ids)) - {int}:  # no loop: there may be a million
        other = next(each for each in ids if type(each) is not int)
        raise fields.mismatch("prompt", "token ids", other)
    return tuple(cast("list[int]", ids))


def _stream_options(given: Mapping[str, object], *, stream: bool) -> Mapping[str, object]:
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise fields.mismatch("stream_options", "an object", options)
    if options and not stream:
        message = "stream_options: expected with stream true only"
        raise bad_request(message, param="stream_options")
    return {name: value for name, value in options.items() if value is not None}


# --- settings of the engine

_CHANGES: Final = (
    "temperature",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "max_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "cache_prompt",
)
"""Fields that are settings of `grokctl run`, too, with the same types and ranges."""


def _settings(given: Mapping[str, object]) -> Request:
    """How to continue; 1 is the default of a temperature here, not 0.7 as at the terminal."""
    seed = fields.take(given, "seed", _seed, _random_seed())
    request = Request(
        prompt=(),
        sampling=Sampling(temperature=1.0, seed=seed),
        max_tokens=_DEFAULT_TOKENS,
        logprobs=fields.take(given, "logprobs", _logprobs, None),
    )
    values = {name: given[name] for name in _CHANGES if name in given}
    if values.get("top_k") == -1:  # as other servers call all
        values["top_k"] = 0
    try:
        for name, value in values.items():
            request = settings.change(request, name, value)
        if given.get("top_p", 1) == 0 and not isinstance(given["top_p"], bool):
            request = settings.change(request, "top_k", 1)  # the likeliest token alone
        elif "top_p" in given:
            request = settings.change(request, "top_p", given["top_p"])
    except UsageError as error:
        raise of_usage(error) from error
    return request


# --- fields that must say nothing

_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "suffix": ("",),
    "repetition_penalty": (1,),
    "repeat_penalty": (1,),
    "typical_p": (1, 0),
    "typical": (1, 0),
    "tfs": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "dynatemp_range": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "smoothing_factor": (0,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "include_stop_str_in_output": (False,),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "grammar": ("",),
    "json_schema": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "logits_processors": ([],),
}
"""What other servers have and this one has not, and the values with which it changes nothing."""


FIELDS: Final = frozenset(
    {
        "model",
        "prompt",
        "n",
        "best_of",
        "echo",
        "logprobs",
        "stream",
        "stream_options",
        "seed",
        "top_p",
        "user",
        "return_token_ids",
        "return_tokens_as_token_ids",
        *_CHANGES,
        *_NEUTRAL,
    }
)
"""All fields that are known; any other has no effect, and is named in the answer's headers."""


def for_choice(request: CompletionRequest, prompt: tuple[int, ...], index: int) -> Request:
    """The request of one choice to the engine.

    Args:
        request: What the client asks for.
        prompt: Token ids of this choice's prompt.
        index: Of the choice: it is added to the seed, so that choice 0 has the seed itself.
    """
    sampling = request.settings.sampling
    seeded = replace(sampling, seed=(sampling.seed + index) % _SEEDS)
    is_scored = request.echo and request.settings.logprobs is not None
    return replace(
        request.settings,
        prompt=prompt,
        sampling=seeded,
        of_prompt=PromptOutput.SCORES if is_scored else PromptOutput.NOTHING,
    )
