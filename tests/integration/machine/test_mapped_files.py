"""A file that is cut while it is mapped ends the process with a sentence, wherever it is read."""

import subprocess
import sys

import pytest

READERS = {
    "python": "memory[-1]",
    "numpy": "np.frombuffer(memory, np.uint8).sum()",
    "a-thread-without-the-interpreter": (
        "pool = ThreadPoolExecutor(1); pool.submit(lambda: sha256(memory).digest()).result()"
    ),
}
SCRIPT = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
import numpy as np
from grokctl.checkpoint.mapped_files import map_to_read
other, path = Path(sys.argv[1]) / "other", Path(sys.argv[1]) / "device 0"
held = []
for each in (other, path):
    each.write_bytes(bytes(1_000_000))
    with each.open("rb") as file:
        held.append(map_to_read(file.fileno(), each))
memory = held[1]
os.truncate(path, int(sys.argv[2]))
{reader}
print("read")
"""


@pytest.mark.parametrize(
    ("reader", "name", "shown", "pasted"),
    [
        ("python", "a\u202eb\x1b[2Jc", "ab[2Jc", r"$'{}/a\342\200\256b\033[2Jc'"),
        ("numpy", "plain", "plain", "{}/plain"),
        ("a-thread-without-the-interpreter", "it's", "it's", """'{}/it'"'"'s'"""),
    ],
)
def test_a_cut_file_is_named(tmp_path, reader, name, shown, pasted):
    script = SCRIPT.format(reader=READERS[reader])
    (tmp_path / name).mkdir()

    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / name, "5000"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip

    expected = f"error: {tmp_path}/{shown}/device 0: expected 1,000,000 bytes, found 5,000"
    assert done.stderr.startswith(expected)
    assert done.stderr.endswith(f"hint: grokctl verify {pasted.format(tmp_path)}\n")
    assert (done.returncode, done.stdout) == (20, "")


def test_a_whole_file_is_read_as_always(tmp_path):
    script = SCRIPT.format(reader=READERS["numpy"])

    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path, "1000000"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip

    assert (done.stdout, done.stderr) == ("read\n", "")
