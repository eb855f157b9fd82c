"""An admitted request, and how its answer is written: whole, or as a stream of events."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from grokctl.inference.generation import Failed, FinishReason, RequestEvent
from grokctl.serving.admission import Job
from grokctl.serving.choices import Choice, Piece, joined
from grokctl.serving.completion_request import CompletionRequest
from grokctl.serving.exchange import Answer, Exchange, Receive, Scope, Send, as_json, start
from grokctl.serving.forms import Form, Shape
from grokctl.serving.service import Service
from grokctl.serving.wire_errors import WireError, internal, of_failure

_DONE: Final = b"data: [DONE]\n\n"
_MANY: Final = 2048
"""Log-probabilities that take longer to write down than others should wait."""
_STREAM: Final = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would wait for more
}


class Answering:
    """An admitted request, and how its answer is written."""

    def __init__(  # noqa: PLR0913, PLR0917 (all that belongs to one request)
        self,
        service: Service,
        request: CompletionRequest,
        form: Form,
        shape: Shape,
        choices: list[Choice],
        job: Job,
        exchange: Exchange,
    ) -> None:
        self._service = service
        self._request = request
        self._form = form
        self._shape = shape
        self._choices = choices
        self._job = job
        self._exchange = exchange
        self._sent = [0] * len(choices)
        """Sampled tokens of each choice in the events until now."""
        limit = service.options.request_s
        self._until = None if limit is None else time.monotonic() + limit

    async def whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer when all choices have ended."""
        pieces: list[list[Piece]] = [[] for _ in self._choices]
        async for made in self._pieces():
            for choice, piece in made or ():
                pieces[choice.index].append(piece)
        count = sum(choice.made + len(choice.prompt.offsets) for choice in self._choices)
        is_long = count * (1 + (self._request.settings.logprobs or 0)) > _MANY
        body = await asyncio.to_thread(self._whole, pieces) if is_long else self._whole(pieces)
        await Answer(body, headers=self._headers)(scope, receive, send)

    def _whole(self, pieces: Sequence[Sequence[Piece]]) -> bytes:
        """The body of the answer; choice by choice, because JSON lets nobody run meanwhile."""
        answered = [(choice, joined(pieces[choice.index])) for choice in self._choices]
        values = self._form.whole(self._shape, answered, self._usage())
        choices = b",".join(map(as_json, values["choices"]))
        empty = as_json({**values, "choices": []})
        return empty.replace(b'"choices":[]', b'"choices":[%b]' % choices, 1)

    async def stream(self, send: Send) -> None:
        """Send events as tokens come; an error is an event, too, because the status was sent."""
        await send(start(200, {**_STREAM, **self._headers}))
        await self._send(send, b": queued\n\n")
        try:
            async for made in self._pieces():
                await self._send(send, self._comment() if made is None else self._events(made))
        except WireError as error:
            await self._send(send, _event(error.body) + _DONE)
        else:
            last = b""
            if self._request.include_usage:
                last = _event({**self._form.event(self._shape, ()), "usage": self._usage()})
            await self._send(send, last + _DONE)
        await send({"type": "http.response.body", "body": b""})

    @property
    def _headers(self) -> dict[str, str]:
        ignored = self._request.ignored
        return {"x-grokctl-ignored": _ascii(", ".join(ignored))} if ignored else {}

    @staticmethod
    async def _send(send: Send, body: bytes) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": True})

    def _events(self, made: Sequence[tuple[Choice, Piece]]) -> bytes:
        parts = []
        for choice, piece in made:
            event = self._form.event(self._shape, [self._form.piece(choice, piece)])
            self._sent[choice.index] = piece.made
            if self._request.continuous_usage:
                event["usage"] = self._usage(sum(self._sent))
            elif self._request.include_usage:
                event["usage"] = None
            parts.append(_event(event))
        return b"".join(parts)

    def _comment(self) -> bytes:
        """A line that clients pass over, and people read."""
        if not self._job.has_begun:
            return b": queued %d\n\n" % self._service.place(self._job)
        done, total = self._job.progress
        return b": reading %d/%d\n\n" % (done, total) if total else b": writing\n\n"

    async def _pieces(self) -> AsyncIterator[list[tuple[Choice, Piece]] | None]:
        """What the choices have got, turn by turn; None after a long silence.

        Raises:
            WireError: A choice failed, or the server ends.
        """
        left, said_at = len(self._choices), time.monotonic()
        while left:
            try:
                async with asyncio.timeout(self._patience(said_at)):
                    message = await self._job.messages.get()
            except TimeoutError:
                self._check_time()
                said_at = time.monotonic()
                yield None
                continue
            made: list[tuple[Choice, Piece]] = []
            while True:
                if isinstance(message, WireError):
                    raise message
                index, events = message
                choice = self._choices[index]
                made += [(choice, piece) for piece in await self._taken(choice, events)]
                left -= choice.generation is not None
                if self._job.messages.empty():
                    break
                message = self._job.messages.get_nowait()
            self._exchange.tokens = sum(choice.made for choice in self._choices)
            self._check_time()
            if made:
                said_at = time.monotonic()
                yield made

    async def _taken(self, choice: Choice, events: list[RequestEvent]) -> list[Piece]:
        if isinstance(events[-1], Failed):
            self._service.report(self._exchange.id, events[-1].error)
            raise of_failure(events[-1].error, self._exchange.id)
        pieces = (
            await asyncio.to_thread(choice.take, events)
            if choice.is_long(events)
            else choice.take(events)
        )
        generation = choice.generation
        if generation is not None and generation.finish_reason is FinishReason.INTERRUPTED:
            raise internal(self._exchange.id)  # the engine has, not this server
        return pieces

    def _patience(self, said_at: float) -> float:
        """Seconds until something must be said, or the request ends."""
        until = said_at + self._service.options.ping_s
        return max(0.0, min(until, self._until or until) - time.monotonic())

    def _check_time(self) -> None:
        if self._until is not None and time.monotonic() >= self._until:
            message = f"request: expected at most {self._service.options.request_s:g} s"
            raise WireError(503, message, "timeout", headers={"x-should-retry": "false"})

    def _usage(self, made: int | None = None) -> dict[str, Any]:
        """Tokens: those of a prompt once, however many samples it has.

        Args:
            made: Sampled tokens; by default, all until now.
        """
        firsts = self._choices[:: self._request.samples]
        prompt = sum(len(choice.prompt.ids) for choice in firsts)
        made = sum(choice.made for choice in self._choices) if made is None else made
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": sum(choice.cached for choice in firsts)},
        }


def _event(values: object) -> bytes:
    return b"data: %b\n\n" % as_json(values)


def _ascii(text: str) -> str:
    return "".join(mark if mark.isascii() and mark.isprintable() else "?" for mark in text)[:1024]
