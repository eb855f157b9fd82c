"""grokctl as it is, but for a disk that takes any number of bytes and keeps none of them.

Only the last step differs: `os.pwrite` makes the file as long as it would be, and drops the data,
and every disk has room. Such a file is a hole, its folder no result, and its sums are those of the
bytes that were dropped.
"""

import os
import shutil
import sys
from types import SimpleNamespace

from grokctl.__main__ import main


def pwrite(handle: int, data: memoryview, offset: int) -> int:
    """Make a file longer."""
    end = offset + len(data)
    if os.fstat(handle).st_size < end:
        os.ftruncate(handle, end)
    return len(data)


if __name__ == "__main__":
    os.pwrite = pwrite
    shutil.disk_usage = lambda _: SimpleNamespace(free=2**50)
    sys.exit(main())
