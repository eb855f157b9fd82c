"""The network of a download: proxy, certificate authorities, and a port to listen on."""

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
from grokctl.text import printable, shown_url

_PORT: Final = 6881
"""The port that a session prefers."""
_PROXIES: Final = (
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
    "HTTP_PROXY",
    "http_proxy",
)
BUILT_IN_CA_BUNDLES: Final = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
)
"""The bundles that libtorrent finds by itself."""
_OTHER_CA_BUNDLES: Final = (
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
)


def network(environ: Mapping[str, str], *, timeout_s: float = 20.0) -> Network:
    """Inspect the network of a download; sends nothing.

    Args:
        environ: May name a proxy and a bundle of certificate authorities.
        timeout_s: Seconds to wait for the disk of that bundle.
    """
    bundle = certificates(environ)
    has_bundle = Waiting(partial(_is_file, bundle), timeout_s=timeout_s, default=False)
    port, error = _port()
    return Network(
        proxy=_proxy(environ),
        certificates=bundle,
        has_certificates=has_bundle.answer(),
        port=port,
        error=error,
    )


def _proxy(environ: Mapping[str, str]) -> str:
    named = next((environ[name] for name in _PROXIES if environ.get(name)), "")
    return printable(shown_url(without_password(named)))


def _port() -> tuple[int | None, str]:
    """A port that TCP and UDP can bind: the usual one, or any free one; and any error."""
    failure = ""
    for port in (_PORT, 0):
        try:
            with (
                closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as stream,
                closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as packets,
            ):
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                stream.bind(("0.0.0.0", port))  # noqa: S104 (as a session does, for a moment)
                stream.listen(1)
                bound: int = stream.getsockname()[1]
                packets.bind(("0.0.0.0", bound))  # noqa: S104 (likewise)
                return bound, failure
        except OSError as error:
            failure = f"port {port or 'any'}: {reason_of(error)}"
    return None, failure


def certificates(environ: Mapping[str, str]) -> str:
    """The bundle of certificate authorities."""
    if named := environ.get("SSL_CERT_FILE"):
        return named
    for bundle in (
        *BUILT_IN_CA_BUNDLES,
        ssl.get_default_verify_paths().cafile,
        *_OTHER_CA_BUNDLES,
    ):
        if bundle is not None and _is_file(bundle):
            return bundle
    return certifi.where()


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False
