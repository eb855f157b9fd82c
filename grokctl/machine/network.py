"""What a download would go through: a proxy, certificate authorities, and a port of our own."""

import os
import socket
import ssl
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Final

import certifi

from grokctl.machine.environment import without_password
from grokctl.machine.facts import Network
from grokctl.machine.waiting import Waiting
from grokctl.os_errors import reason_of
from grokctl.text import printable

_PORT: Final = 6881
"""That a session prefers."""
_PROXIES: Final = (
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
    "HTTP_PROXY",
    "http_proxy",
)
_BUILT_IN_CA_BUNDLES: Final = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
)
"""That libtorrent finds by itself."""
_OTHER_CA_BUNDLES: Final = (
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
)


def network(environ: Mapping[str, str], *, timeout_s: float = 20.0) -> Network:
    """Look at what a download would go through; sends nothing.

    Args:
        environ: Where a proxy, and a list of certificate authorities, may be named.
        timeout_s: How long the disk of that list is waited for.
    """
    bundle = certificates(environ)
    is_there = Waiting(partial(_is_file, bundle), timeout_s=timeout_s, otherwise=False)
    port, error = _port()
    return Network(
        proxy=_proxy(environ),
        certificates=bundle,
        has_certificates=is_there.answer(),
        port=port,
        error=error,
    )


def _proxy(environ: Mapping[str, str]) -> str:
    named = next((environ[name] for name in _PROXIES if environ.get(name)), "")
    return printable(without_password(named))


def _port() -> tuple[int | None, str]:
    """A port that TCP and UDP can be bound to: the usual one, or any."""
    why = ""
    for port in (_PORT, 0):
        try:
            with (
                closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as stream,
                closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as packets,
            ):
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                stream.bind(("0.0.0.0", port))  # noqa: S104 (what a session does, but for a moment)
                stream.listen(1)
                number: int = stream.getsockname()[1]
                packets.bind(("0.0.0.0", number))  # noqa: S104 (likewise)
                return number, why
        except OSError as error:
            why = f"port {port or 'of any number'}: {reason_of(error)}"
    return None, why


def certificates(environ: Mapping[str, str]) -> str:
    """Where certificate authorities are listed."""
    if named := environ.get("SSL_CERT_FILE"):
        return named
    for bundle in (
        *_BUILT_IN_CA_BUNDLES,
        ssl.get_default_verify_paths().cafile,
        *_OTHER_CA_BUNDLES,
    ):
        if bundle is not None and _is_file(bundle):
            return bundle
    return certifi.where()


def find_certificates() -> str:
    """Tell libtorrent's own OpenSSL where certificate authorities are listed, and return it.

    It knows the two usual places; on other systems every HTTPS tracker would fail, and the first
    of Grok-1's trackers is one. The variable is all that it listens to.
    """
    bundle = certificates(os.environ)
    if bundle not in _BUILT_IN_CA_BUNDLES:
        os.environ["SSL_CERT_FILE"] = bundle
    return bundle


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False
