"""Where the processes of a run meet, tried before JAX crashes about it, or says nothing."""

import os
import socket
import time
from contextlib import closing
from typing import Final

from grokctl.errors import PeerError
from grokctl.launch import Launch

_TRY_S: Final = 5.0
_AGAIN_S: Final = 0.2


def check_address(launch: Launch, *, within_s: float) -> None:
    """Find out whether rank 0 can listen, or the others can reach it, for which they wait.

    Args:
        launch: Who this is.
        within_s: How long rank 0 may take to be there.

    Raises:
        PeerError: With the reason that the system gives.
    """
    if launch.rank == 0:
        _check_port(launch)
        return
    until = time.monotonic() + within_s
    while True:
        try:
            left = max(_AGAIN_S, min(_TRY_S, until - time.monotonic()))
            with closing(socket.create_connection((launch.host, launch.port), timeout=left)):
                return
        except (OSError, UnicodeError) as error:  # the latter of what no host is called
            if time.monotonic() > until:
                raise PeerError(
                    f"rank {launch.rank}: rank 0 cannot be reached at {launch.address} within "
                    f"{within_s:.0f} s ({getattr(error, 'strerror', None) or error})"
                ) from error
        time.sleep(_AGAIN_S)


def _check_port(launch: Launch) -> None:
    has_both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if has_both else socket.AF_INET
    try:
        with closing(
            socket.create_server(("", launch.port), family=family, dualstack_ipv6=has_both)
        ):
            return
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        other = 61440 + (launch.port + 1) % 4096
        raise PeerError(
            f"rank 0: port {launch.port} cannot be opened ({why})",
            f"--coordinator {launch.host}:{other}"
            if launch.is_by_hand
            else f"export JAX_COORDINATOR_PORT={other}",
        ) from error
