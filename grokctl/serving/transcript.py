"""`/v1/chat/completions` for a base model: a conversation is written down, and completed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from grokctl.serving import fields
from grokctl.serving.choices import Choice, Piece
from grokctl.serving.completion_request import CompletionRequest, read_completion
from grokctl.serving.completions import complete
from grokctl.serving.exchange import Receive, Scope, Send
from grokctl.serving.forms import Shape
from grokctl.serving.service import Service
from grokctl.serving.wire_errors import WireError, bad_request

_SPEAKERS: Final = {
    "system": "System",
    "developer": "System",
    "user": "User",
    "assistant": "Assistant",
}
_STOPS: Final = ("\n\nUser:", "\n\nSystem:", "\nUser:", "\nSystem:")
"""Where somebody else would speak; with the empty line before, if there is one."""
_UNLIMITED: Final = 2**31
"""Tokens of an answer unless a client says how many: the context ends it."""
_MOST_MESSAGES: Final = 10_000
_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
}
"""What a transcript cannot have, and the values with which it changes nothing."""
_OF_COMPLETIONS: Final = frozenset({"prompt", "echo", "suffix", "best_of", "return_token_ids"})
"""Fields that mean nothing in a conversation."""


async def chat(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """Complete a conversation as a transcript, if the server was started to.

    Raises:
        WireError: It was not, or the request is wrong, or cannot be answered now.
    """
    if not service.options.is_chatting:
        raise bad_request(
            "Grok-1 is a base model: it completes, it does not chat; use /v1/completions, or start "
            "the server with --chat transcript",
            code="base_model",
        )
    try:
        request = await service.bodies.read(scope, receive, read_chat)
        await complete(service, request, Conversation(), scope, receive, send)
    except WireError as error:
        if error.param == "prompt":
            error.param = "messages"
        raise


def read_chat(body: Mapping[str, object]) -> CompletionRequest:
    """The request for the completion of a conversation's transcript.

    Args:
        body: Of the request; null means that a field is absent.

    Raises:
        WireError: A field has another type, lies outside its range, or asks for what is not here.
    """
    given = {name: value for name, value in body.items() if value is not None}
    fields.refuse(given, _NEUTRAL)
    dropped = sorted(_OF_COMPLETIONS & given.keys())
    own = {"messages", "max_completion_tokens", "top_logprobs", *_NEUTRAL, *dropped}
    completion = {name: value for name, value in given.items() if name not in own}
    completion["prompt"] = transcript(given.get("messages"))
    completion["max_tokens"] = given.get(
        "max_completion_tokens", given.get("max_tokens", _UNLIMITED)
    )
    completion["logprobs"] = _logprobs(given)
    request = read_completion(completion)
    return replace(
        request,
        settings=replace(request.settings, stop=(*request.settings.stop, *_STOPS)),
        return_ids=request.settings.logprobs is not None,
        ignored=tuple(sorted({*request.ignored, *dropped})),
    )


def _logprobs(given: Mapping[str, object]) -> int | None:
    """The number of likeliest tokens, as the other interface asks for it."""
    is_wanted = fields.take(given, "logprobs", fields.switch, False)
    if "top_logprobs" not in given:
        return 0 if is_wanted else None
    if not is_wanted:
        raise bad_request("top_logprobs: expected with logprobs true only", param="top_logprobs")
    return fields.integer("top_logprobs", given["top_logprobs"])


def transcript(messages: object) -> str:
    """A conversation as a text that ends where the assistant speaks.

    Args:
        messages: With a role and a text each. The text of a system comes first as it is.

    Raises:
        WireError: They are no messages, or have more than text.
    """
    if not isinstance(messages, list) or not messages:
        raise fields.mismatch("messages", "a list of messages", messages)
    if len(messages) > _MOST_MESSAGES:
        raise fields.mismatch(
            "messages", f"at most {_MOST_MESSAGES:,} messages", f"{len(messages):,}"
        )
    blocks = []
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            raise fields.mismatch("messages", "an object with role and content", message)
        speaker = _SPEAKERS.get(str(message.get("role")))
        if speaker is None:
            raise fields.mismatch(
                "messages", f"a role of {', '.join(_SPEAKERS)}", message.get("role")
            )
        text = _text(message.get("content")).strip()
        is_heading = place == 0 and speaker == "System"
        blocks.append(text if is_heading else f"{speaker}: {text}")
    return "\n\n".join([*blocks, "Assistant:"])


def _text(content: object) -> str:
    match content:
        case str():
            return content
        case list():
            return "".join(map(_part, content))
        case _:
            raise fields.mismatch("messages", "content that is text", content)


def _part(part: object) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": kind}:
            raise fields.mismatch("messages", "parts of the type text", kind)
        case _:
            raise fields.mismatch("messages", "parts of the type text", part)


@dataclass(slots=True)
class Conversation:
    """How the answer to a conversation looks; of one request."""

    _begun: set[int] = field(default_factory=set)
    """Choices whose text has begun: spaces before it belong to the transcript."""
    _named: set[int] = field(default_factory=set)
    """Choices whose speaker was sent."""

    def whole(
        self, shape: Shape, choices: Sequence[tuple[Choice, Piece]], usage: dict[str, Any]
    ) -> dict[str, Any]:
        """The whole answer."""
        shown = [
            {
                **self._ends(choice, piece),
                "message": {
                    "role": "assistant",
                    "content": self._spoken(choice, piece),
                    "refusal": None,
                },
            }
            for choice, piece in choices
        ]
        return {**self._shape(shape, "chat.completion"), "choices": shown, "usage": usage}

    def event(self, shape: Shape, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """An event of a stream."""
        return {**self._shape(shape, "chat.completion.chunk"), "choices": list(choices)}

    def piece(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """The choice of an event; its first one says who speaks."""
        delta = {"content": self._spoken(choice, piece)}
        if choice.index not in self._named:
            self._named.add(choice.index)
            delta = {"role": "assistant", **delta}
        return {**self._ends(choice, piece), "delta": delta}

    @staticmethod
    def _shape(shape: Shape, kind: str) -> dict[str, Any]:
        return {
            "id": shape.id,
            "object": kind,
            "created": shape.created,
            "model": shape.model,
            "system_fingerprint": f"{shape.fingerprint}-transcript",
        }

    def _spoken(self, choice: Choice, piece: Piece) -> str:
        """The text of a piece, without spaces before the first word."""
        if choice.index in self._begun:
            return piece.text
        text = piece.text.lstrip()
        if text:
            self._begun.add(choice.index)
        return text

    @staticmethod
    def _ends(choice: Choice, piece: Piece) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "index": choice.index,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
        }
        if piece.logprobs is not None:
            shown["logprobs"] = {"content": piece.logprobs.content, "refusal": None}
        return shown
