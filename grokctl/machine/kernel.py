"""The native kernel of the CPU: whether it is there, and how fast it reads weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from grokctl.machine.facts import Found, KernelReport
from grokctl.os_errors import reason_of
from grokctl.system import usable_cores
from grokctl.text import printable

_COMPILES_S: Final = 300.0
"""A compiler may run first."""
_LONGEST: Final = 240
_FASTEST: Final = 1e14
"""Bytes a second that no memory has."""


def probe_kernel(caches: Path | None, *, nbytes: int) -> KernelReport:
    """Find or compile the kernel, and measure it, in a process of its own.

    Args:
        caches: `cache/native` of the home; None compiles nothing.
        nbytes: Of the weights to measure with; 0 measures nothing.
    """
    words = ["" if caches is None else str(caches.absolute()), str(nbytes), str(usable_cores())]
    try:
        done = subprocess.run(  # noqa: S603 (this Python, and a module of ours)
            [sys.executable, "-P", "-m", "grokctl.native.report", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMPILES_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        reason = f"nothing came of it in {_COMPILES_S:.0f} s"
        return KernelReport(found=Found.SILENT, reason=reason)
    except OSError as error:
        reason = f"Python does not start: {reason_of(error)}"
        return KernelReport(found=Found.FAILED, reason=reason)
    try:
        return _parsed(json.loads(done.stdout))
    except (ValueError, LookupError, TypeError, AttributeError):
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        ending = lines[-1] if lines else f"it ended with status {done.returncode}"
        return KernelReport(found=Found.FAILED, reason=printable(ending, limit=_LONGEST))


def _parsed(values: Any) -> KernelReport:
    if "error" in values:
        reason = printable(values["error"], limit=_LONGEST)
        fix = printable(values["fix"], limit=_LONGEST)
        return KernelReport(found=Found.ABSENT, reason=reason, fix=fix)
    rate = values["rate"]
    is_rate = isinstance(rate, float) and 0 < rate < _FASTEST
    return KernelReport(
        found=Found.OK,
        instruction_set=printable(values["instruction_set"]),
        rate=rate if is_rate else None,
    )
