"""`/v1/completions`: a request is read, admitted, answered, and cancelled if its client leaves."""

import asyncio
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Final

from grokctl.serving.answering import Answering
from grokctl.serving.bodies import ClientGoneError
from grokctl.serving.choices import Choice
from grokctl.serving.completion_request import CompletionRequest, for_choice, read_completion
from grokctl.serving.exchange import Receive, Scope, Send, exchange_of
from grokctl.serving.forms import Completions, Form, Shape
from grokctl.serving.logprobs import TokenNames
from grokctl.serving.service import Service

_SHORT: Final = 2048
"""Characters or ids that are encoded at once, without a thread."""


async def completions(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request for completions.

    Raises:
        WireError: The request is wrong, or cannot be answered now; nothing was sent.
    """
    request = await service.bodies.read(scope, receive, read_completion)
    await complete(service, request, Completions(), scope, receive, send)


async def complete(
    service: Service,
    request: CompletionRequest,
    form: Form,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Run a request, and answer it in a form; the request is cancelled when its client leaves."""
    exchange, model = exchange_of(scope), service.model
    shape = Shape(
        exchange.own_id,
        int(time.time()),
        model.check_name(request.model),
        model.fingerprint,
    )
    choices = await _prepared(service, request)
    exchange.prompt_tokens = sum(len(choice.prompt.ids) for choice in choices[:: request.samples])
    requests = [for_choice(request, choice.prompt.ids, choice.index) for choice in choices]
    with service.admission.admitted(requests) as job:
        most = min(request.settings.max_tokens, model.plan.context)
        service.measures.asked(samples=request.samples, max_tokens=most)
        answer = Answering(service, request, form, shape, choices, job, exchange)
        work = answer.stream(send) if request.stream else answer.whole(scope, receive, send)
        await _while_there(work, receive)


async def _prepared(service: Service, request: CompletionRequest) -> list[Choice]:
    """Tokens of all prompts; long ones in a thread, so that others are answered meanwhile."""
    model = service.model
    names = TokenNames(
        vocabulary=model.vocabulary,
        as_ids=request.tokens_as_ids,
        with_ids=request.return_ids,
    )

    def prepare() -> list[Choice]:
        prompts = model.encode(request)
        return [
            Choice(index, request, prompts[index // request.samples], names)
            for index in range(request.choices)
        ]

    if sum(map(len, request.prompts)) * request.samples <= _SHORT:
        return prepare()
    return await asyncio.to_thread(prepare)


async def _while_there(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Do something until it is done, or until the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
