"""The certificate of a server and its private key, which nobody is asked a pass phrase for."""

import ssl
from pathlib import Path
from typing import NoReturn

from grokctl.errors import invalid
from grokctl.paths import quoted


def tls_context(certificate: Path, private_key: Path) -> ssl.SSLContext:
    """What encrypts the connections of a server.

    Args:
        certificate: A file in PEM, with those that lead to a root behind it.
        private_key: A file in PEM, not encrypted.

    Raises:
        UsageError: A file cannot be used, or they do not belong together.
    """
    for name, path in (("tls_cert", certificate), ("tls_key", private_key)):
        try:
            path.open("rb").close()
        except OSError as error:
            raise invalid(name, path, error.strerror or "cannot be read") from error

    def refuse() -> NoReturn:
        problem = "expected a key without a pass phrase"
        hint = f"openssl pkey -in {quoted(private_key)} -out plain.pem"
        raise invalid("tls_key", private_key, problem, hint)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, private_key, password=refuse)
    except (ssl.SSLError, OSError) as error:
        problem = f"expected a certificate in PEM, and its key in {private_key}"
        raise invalid("tls_cert", certificate, problem) from error
    return context
