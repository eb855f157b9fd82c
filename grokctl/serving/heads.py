"""The head of a request: short, and clear about where its body ends."""

from typing import Final

from grokctl.serving.exchange import Scope, header
from grokctl.serving.wire_errors import WireError

MOST_NBYTES: Final = 2**14
"""Of the path and the headers."""
_CLOSE: Final = {"connection": "close"}


def check_head(scope: Scope) -> None:
    """Refuse a head that a proxy may read in another way than this server, or that is too long.

    With two lengths of one body, what the one takes for its end is the next request of the other
    (RFC 9112, 6.1 and 6.3); the connection is closed, so that nobody's bytes become a request.

    Raises:
        WireError: It is refused.
    """
    version, has_chunks = scope["http_version"], header(scope, b"transfer-encoding") is not None
    if version not in {"1.0", "1.1"} or (has_chunks and version == "1.0"):
        message = f"HTTP: expected version 1.1, found {version}"
        raise WireError(400, message, headers=_CLOSE)
    if has_chunks and header(scope, b"content-length") is not None:
        message = "content-length, transfer-encoding: expected only one of them"
        raise WireError(400, message, headers=_CLOSE)
    nbytes = len(scope["raw_path"]) + len(scope["query_string"])
    nbytes += sum(len(name) + len(value) for name, value in scope["headers"])
    if nbytes > MOST_NBYTES:
        raise WireError(431, f"head: expected at most {MOST_NBYTES:,} bytes", headers=_CLOSE)
