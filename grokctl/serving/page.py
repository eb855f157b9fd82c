"""The playground: a page of static files, which asks nothing of other servers."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from grokctl.serving.exchange import Answer, Receive, Scope, Send, header
from grokctl.serving.service import Service
from grokctl.serving.wire_errors import WireError

_FOLDER: Final = Path(__file__).parent / "static"
FILES: Final[Mapping[str, tuple[str, str]]] = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/core.js": ("core.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""By path: a file, and its media type."""
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
_HEADERS: Final = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    tag: str


@cache
def _file(name: str) -> _File:
    body = (_FOLDER / name).read_bytes()
    return _File(body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')


async def page(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """A file of the page, or 304 if the browser has it.

    Raises:
        WireError: This server has no page.
    """
    if not service.options.has_page:
        raise WireError(404, "path: expected a route of this server", "unknown_url")
    name, media_type = FILES[scope["path"]]
    file = _file(name)
    headers = {**_HEADERS, "etag": file.tag}
    if header(scope, b"if-none-match") == file.tag:
        answer = Answer(status=304, media_type=media_type, headers=headers)
    else:
        answer = Answer(file.body, media_type=media_type, headers=headers)
    await answer(scope, receive, send)
