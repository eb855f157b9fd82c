"""What C++ libraries print, in a process whose descriptors may be moved about."""

import subprocess
import sys

PROGRAM = """
import logging, os, sys
from grokctl.cluster.native_output import Noise
logging.basicConfig(level=logging.INFO, format="%(message)s")
noise = Noise()
print("said before")
with noise.quiet():
    os.write(1, b"Gloo to stdout. ")
sys.stdout.flush()
with noise.quiet():
    os.write(1, b"Gloo again. ")
    noise.be_heard()
    os.write(1, b"an error, said in a hurry\\n")
os.write(2, b"JAX to stderr. ")
sys.stderr.write("our own error\\n")
logging.info("our own log")
print("said after", repr(noise.text()))
"""


def run(**options):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, **options
    )


def test_libraries_are_kept_apart_from_what_python_says():
    done = run()

    kept = "'Gloo to stdout. Gloo again. JAX to stderr. '"
    assert done.stdout.splitlines() == [
        "said before",
        "an error, said in a hurry",
        f"said after {kept}",
    ]
    assert done.stderr.splitlines() == ["our own error", "our own log"]


def test_a_closed_stdout_is_no_obstacle():
    code = (
        "import sys; from grokctl.cluster.native_output import Noise; noise = Noise()\n"
        "with noise.quiet(): pass\n"
        "sys.stderr.write('fine')"
    )
    closing = ["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, code]

    done = subprocess.run(closing, stderr=subprocess.PIPE, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "fine")
