"""Read the body of a request, up to a limit, and parse it where it holds nobody up."""

import asyncio
from typing import Any, Final

from grokctl.errors import UsageError
from grokctl.serving.exchange import Receive, Scope, header
from grokctl.serving.wire_errors import WireError, bad_request
from grokctl.session.json_object import read_object

_JSON: Final = "application/json"
_LONG: Final = 2**16
"""Bytes that take more than a millisecond to parse."""


class ClientGoneError(Exception):
    """The client has left before its request was complete."""


async def read_json(scope: Scope, receive: Receive, *, most: int) -> dict[str, Any]:
    """The object in the body of a request.

    Args:
        scope: Of the request.
        receive: Gives the body.
        most: Bytes of a body.

    Raises:
        WireError: The body is of another type, too long, or no JSON object.
        ClientGoneError: The client has left.
    """
    media_type = (header(scope, b"content-type") or "").partition(";")[0].strip().lower()
    if media_type != _JSON:  # a browser asks before it sends this type to another origin
        raise WireError(415, f"content-type: expected {_JSON}")
    body = await _read(scope, receive, most=most)
    try:
        if len(body) > _LONG:
            return await asyncio.to_thread(read_object, body, "body")
        return read_object(body, "body")
    except UsageError as error:
        raise bad_request(f"body: {str(error).removeprefix('body: ')}") from error


async def _read(scope: Scope, receive: Receive, *, most: int) -> bytes:
    length = header(scope, b"content-length")
    if length is not None and length.isdecimal() and int(length[:20]) > most:
        raise _too_long(most)
    parts, count = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parts.append(message.get("body", b""))
        count += len(parts[-1])
        if count > most:
            raise _too_long(most)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_long(most: int) -> WireError:
    return WireError(413, f"body: expected at most {most:,} bytes", headers={"connection": "close"})
