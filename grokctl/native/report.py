"""The kernel of this machine's CPU, as a line of JSON: run as a process of its own, never imported.

A compiler runs here, and machine code for this very processor: neither can end `doctor`.
"""

import json
import os
import sys
from pathlib import Path

from grokctl.native.binary import NoKernelError, open_first


def main() -> None:
    """Print `instruction_set` and `rate`, or `error` and `fix`.

    Arguments: `cache/native` of a home or nothing, bytes to measure with (0: none), and threads.
    """
    caches = Path(sys.argv[1]) if sys.argv[1] else None
    nbytes, threads = int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(_report(caches, nbytes, threads)))  # noqa: T201 (the answer)


def _report(caches: Path | None, nbytes: int, threads: int) -> dict[str, object]:
    try:
        library = open_first(caches, os.environ)
    except NoKernelError as error:
        return {"error": str(error), "fix": error.fix}
    library.set_threads(threads)
    rate = library.measured(nbytes, rounds=_ROUNDS) if nbytes else None
    return {"instruction_set": library.instruction_set, "rate": rate}


_ROUNDS = 6
"""Of measurements, as many as of the bandwidth."""

if __name__ == "__main__":
    main()
