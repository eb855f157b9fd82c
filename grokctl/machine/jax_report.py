"""The devices that JAX finds, as a line of JSON: run as a process of its own, never imported.

JAX may hang, crash or print anything here. The file is run by its path, so it must import nothing
but Python and JAX.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from typing import Any


def main() -> None:
    """Print one object: `platform`, `devices` and `seconds`, or `error`."""
    signal.alarm(int(sys.argv[1]))  # ends this process even if its parent was killed
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))  # a crash leaves no core file
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # plugins print to stdout
    begun = time.monotonic()
    report = _report()
    line = json.dumps({**report, "seconds": time.monotonic() - begun}) + "\n"
    with os.fdopen(answer, "w") as file:
        file.write(line)


def _report() -> dict[str, Any]:
    try:
        import jax  # noqa: PLC0415 (its failures are the result)
    except ModuleNotFoundError as error:
        return {"error": _sentence(error), "is_absent": error.name == "jax"}
    except Exception as error:  # noqa: BLE001 (plugins raise anything)
        return {"error": _sentence(error)}
    try:
        devices = jax.local_devices()
        return {"platform": devices[0].platform, "devices": [_device(each) for each in devices]}
    except Exception as error:  # noqa: BLE001 (likewise)
        return {"error": _sentence(error)}


def _device(device: Any) -> dict[str, Any]:
    try:
        stats = device.memory_stats() or {}
    except Exception:  # noqa: BLE001 (some plugins have no stats)
        stats = {}
    return {
        "kind": str(device.device_kind),
        "limit": stats.get("bytes_limit"),
        "capability": str(getattr(device, "compute_capability", "")),
    }


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # some assertions of JAX have no message, such as for an unavailable JAX_PLATFORMS
    lines += [frame.line for frame in traceback.extract_tb(error.__traceback__)[-1:] if frame.line]
    return ": ".join([type(error).__name__, *lines[:1]])


if __name__ == "__main__":
    main()
