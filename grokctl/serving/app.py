"""The routes of the server, as one ASGI application; who may ask is decided from the same table."""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Final

from starlette.routing import Match, Route

from grokctl.serving import facts
from grokctl.serving.bodies import ClientGoneError
from grokctl.serving.completions import completions
from grokctl.serving.exchange import (
    App,
    Exchange,
    Receive,
    Scope,
    Send,
    error_answer,
    exchange_of,
    open_exchange,
)
from grokctl.serving.guard import Guard, GuardOptions
from grokctl.serving.heads import check_head
from grokctl.serving.page import FILES, page
from grokctl.serving.service import Service
from grokctl.serving.transcript import chat
from grokctl.serving.wire_errors import TOO_MANY, WireError, internal, unavailable

Handler = Callable[[Service, Scope, Receive, Send], Awaitable[None]]
Log = Callable[[Exchange], object]
_GONE: Final = 499
"""The status in the log of a request whose client has left."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A route."""

    method: str
    path: str
    handler: Handler
    is_open: bool = False
    """Whether it needs no key."""


ENDPOINTS: Final = (
    Endpoint("POST", "/v1/completions", completions),
    Endpoint("POST", "/v1/chat/completions", chat),
    Endpoint("GET", "/v1/models", facts.models),
    Endpoint("GET", "/v1/models/{name:path}", facts.one_model),
    Endpoint("POST", "/tokenize", facts.tokenize),
    Endpoint("POST", "/v1/tokenize", facts.tokenize),
    Endpoint("POST", "/detokenize", facts.detokenize),
    Endpoint("POST", "/v1/detokenize", facts.detokenize),
    Endpoint("GET", "/tokenizer_info", facts.tokenizer_info),
    Endpoint("GET", "/v1/tokenizer_info", facts.tokenizer_info),
    Endpoint("GET", "/health", facts.health, is_open=True),
    Endpoint("GET", "/v1/health", facts.health, is_open=True),
    Endpoint("GET", "/version", facts.version),
    Endpoint("GET", "/metrics", facts.metrics),
    Endpoint("GET", "/props", facts.props),
    Endpoint("GET", "/slots", facts.slots),
    Endpoint("GET", "/load", facts.load),
    *(Endpoint("GET", path, page, is_open=True) for path in FILES),
)


def application(service: Service, guard: GuardOptions, *, log: Log) -> App:
    """The whole server.

    Args:
        service: What handlers share.
        guard: Who may ask.
        log: Gets every exchange at its end.
    """
    router = _Router(service, ENDPOINTS)
    open_paths = {endpoint.path for endpoint in ENDPOINTS if endpoint.is_open}
    limited = _Limit(router, service, open_paths=open_paths)
    return _Boundary(service, Guard(limited, guard, open_paths=open_paths), log=log)


class _Limit:
    """Refuses requests beside too many others; those of probes always have room."""

    def __init__(self, app: App, service: Service, *, open_paths: Collection[str]) -> None:
        self._app = app
        self._service = service
        self._open = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        most = self._service.options.requests
        if self._service.served > most and scope["path"] not in self._open:
            message = f"requests: expected at most {most} at a time"
            raise unavailable(message, TOO_MANY, retry_after_s=1)
        await self._app(scope, receive, send)


class _Router:
    """Finds the handler of a path."""

    def __init__(self, service: Service, table: tuple[Endpoint, ...]) -> None:
        self._service = service
        self._routes = [
            (endpoint, Route(endpoint.path, _nothing, methods=[endpoint.method]))
            for endpoint in table
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        allowed: set[str] = set()
        for endpoint, route in self._routes:
            match, found = route.matches(scope)
            if match is Match.NONE:
                continue
            if match is Match.PARTIAL:
                allowed |= route.methods or set()
                continue
            exchange_of(scope).route = endpoint.path
            scope.update(found)
            await endpoint.handler(self._service, scope, receive, send)
            return
        if allowed:
            message = f"method: expected {' or '.join(sorted(allowed))}, found {scope['method']!r}"
            headers = {"Allow": ", ".join(sorted(allowed))}
            raise WireError(405, message, "method_not_allowed", headers=headers)
        raise WireError(404, "path: expected a route of this server", "unknown_url")


def _nothing() -> None:
    """Stands for a handler: routes are only asked whether they match."""


class _Boundary:
    """Makes an answer of every end of a request, and logs it."""

    def __init__(self, service: Service, app: App, *, log: Log) -> None:
        self._service = service
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        exchange = open_exchange(scope)
        self._service.served += 1
        try:
            await self._answer(exchange, scope, receive, send)
        finally:
            self._service.served -= 1
            self._service.measures.answered(exchange.route, exchange.status)
            self._log(exchange)

    async def _answer(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        async def marked(message: Scope) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message["headers"], *exchange.headers]
            await send(message)

        try:
            check_head(scope)
            await self._app(scope, receive, marked)
        except WireError as error:
            await self._send_error(error, exchange, scope, receive, marked)
        except ClientGoneError:
            exchange.status = _GONE
        except asyncio.CancelledError:
            exchange.status = exchange.status or _GONE
            raise
        except Exception as error:  # noqa: BLE001 (a bug: the client gets a sentence)
            self._service.report(exchange.id, error)
            await self._send_error(internal(exchange.id), exchange, scope, receive, marked)

    @staticmethod
    async def _send_error(
        error: WireError, exchange: Exchange, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if not exchange.status:  # else a part of an answer was sent, which cannot be taken back
            await error_answer(error)(scope, receive, send)
