"""What crosses the network, as the document says and as the programs are compiled."""

import subprocess
import sys

from places import PROJECT

SCRIPT = PROJECT / "benchmarks" / "wire.py"


def test_the_documented_bytes_over_the_wire_are_those_of_the_compiled_programs():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    experts, everything = done.stdout.splitlines()[-2:]
    assert experts.startswith("| `expert=2,model=8` | 64 | 1,572,864 |")
    assert everything.startswith("| `model=16` | 130 |")
