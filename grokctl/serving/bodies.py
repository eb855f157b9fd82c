"""Read the body of a request, up to a limit, and parse it where it holds nobody up."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from grokctl.errors import UsageError
from grokctl.serving.exchange import Receive, Scope, header
from grokctl.serving.wire_errors import TOO_MANY, WireError, bad_request, unavailable
from grokctl.session.json_object import read_object

_JSON: Final = "application/json"
_LONG: Final = 2**14
"""Bytes that take long to parse, and their texts to encode: others do not wait for them."""
_MOST_VALUES: Final = 2**20
"""Of a body. The parser lets nobody else run meanwhile, and a number of 2 bytes becomes 36."""
_TOGETHER: Final = 8
"""Bodies of full length that may be held at a time."""
Value = TypeVar("Value")


class ClientGoneError(Exception):
    """The client has left before its request was complete."""


class Bodies:
    """The bodies of requests under way, which have a limit each, and one together.

    Args:
        most: Bytes of a body.
    """

    def __init__(self, *, most: int) -> None:
        self._most = most
        self._room = _TOGETHER * most

    async def read(
        self, scope: Scope, receive: Receive, check: Callable[[Mapping[str, object]], Value]
    ) -> Value:
        """What the object in the body of a request says.

        Args:
            scope: Of the request.
            receive: Gives the body.
            check: Makes something of the object; for a long body, in a thread.

        Raises:
            WireError: The body is of another type, too long, or no JSON object; there are too many
                others; or `check` raises it.
            ClientGoneError: The client has left.
        """
        media_type = (header(scope, b"content-type") or "").partition(";")[0].strip().lower()
        if media_type != _JSON:  # a browser asks before it sends this type to another origin
            raise WireError(415, f"content-type: expected {_JSON}")
        length = header(scope, b"content-length")
        if length is not None and length.isdecimal() and int(length[:20]) > self._most:
            raise self._too_long()
        parts: list[bytes] = []
        try:
            await self._receive(receive, parts)
            body = b"".join(parts)
            if len(body) > _LONG:
                return await asyncio.to_thread(_checked, body, check)
            return _checked(body, check)
        finally:
            self._room += sum(map(len, parts))

    async def _receive(self, receive: Receive, parts: list[bytes]) -> None:
        count, has_more = 0, True
        while has_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            parts.append(part)
            count += len(part)
            self._room -= len(part)
            if count > self._most:
                raise self._too_long()
            if self._room < 0:
                raise unavailable(
                    "bodies: expected fewer long ones at a time",
                    TOO_MANY,
                    retry_after_s=1,
                    connection="close",
                )
            has_more = message.get("more_body", False)

    def _too_long(self) -> WireError:
        message = f"body: expected at most {self._most:,} bytes"
        return WireError(413, message, headers={"connection": "close"})


def _checked(body: bytes, check: Callable[[Mapping[str, object]], Value]) -> Value:
    if body.count(b",") >= _MOST_VALUES:
        raise bad_request(f"body: expected at most {_MOST_VALUES:,} values")
    try:
        values = read_object(body, "body")
    except UsageError as error:
        raise bad_request(f"body: {str(error).removeprefix('body: ')}") from error
    return check(values)
