"""What an answer looks like: the object around the choices, whole or in events of a stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from grokctl.serving.choices import Choice, Piece


@dataclass(frozen=True, slots=True)
class Shape:
    """What identifies an answer, in all its events."""

    id: str
    created: int
    model: str
    fingerprint: str


class Form(Protocol):
    """What answers look like, which differs between routes."""

    def whole(
        self, shape: Shape, choices: Sequence[tuple[Choice, Piece]], usage: dict[str, Any]
    ) -> dict[str, Any]:
        """The whole answer."""
        ...

    def event(self, shape: Shape, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """An event of a stream, with one choice or none."""
        ...

    def piece(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """The choice of an event."""
        ...


class Completions:
    """The form of completions: events look like whole answers."""

    def whole(
        self, shape: Shape, choices: Sequence[tuple[Choice, Piece]], usage: dict[str, Any]
    ) -> dict[str, Any]:
        """The whole answer."""
        shown = [choice.shown(piece) for choice, piece in choices]
        return {**self.event(shape, shown), "usage": usage}

    def event(self, shape: Shape, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """An event of a stream: the same with one choice, or none."""
        return {
            "id": shape.id,
            "object": "text_completion",
            "created": shape.created,
            "model": shape.model,
            "system_fingerprint": shape.fingerprint,
            "choices": list(choices),
        }

    def piece(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """The choice of an event."""
        return choice.shown(piece)
