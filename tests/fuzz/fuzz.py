"""Fuzz everything that reads strangers' bytes, a process each: `make fuzz SECONDS=600`."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from fuzz_targets import TARGETS


def main() -> int:
    """Fuzz one target, or all of them one after the other; 1 if there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", choices=sorted(TARGETS), help="all by default")
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together")
    parser.add_argument("--corpus", type=Path, help="folder that keeps what was found worth it")
    options = parser.parse_args()
    names = [options.target] if options.target else list(TARGETS)
    total, findings = 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            corpus = (options.corpus or Path(scratch)) / name
            inputs, is_fine = fuzz(name, max(1, options.seconds // len(names)), corpus, scratch)
            total += inputs
            findings += not is_fine
    print(f"{'total':>10} {total:>12,} inputs, {findings} findings")
    return int(findings > 0)


def fuzz(name: str, seconds: int, corpus: Path, scratch: str) -> tuple[int, bool]:
    """Fuzz a target; returns how many inputs it was fed, and whether none is a finding."""
    child = Path(__file__).with_name("fuzz_one.py")
    ended = subprocess.run(
        [sys.executable, child, name, str(seconds), corpus],
        capture_output=True,
        check=False,
        env={**os.environ, "TMPDIR": scratch, "XDG_CONFIG_HOME": scratch},
        text=True,
        errors="replace",
    )
    counts = re.findall(r"^stat::number_of_executed_units: +([0-9]+)", ended.stderr, re.MULTILINE)
    edges = re.findall(r" cov: ([0-9]+)", ended.stderr)
    count = int(counts[-1]) if counts else 0
    # without a count it never ran
    is_fine = ended.returncode == 0 and count > 0
    verdict = f"{edges[-1] if edges else 0} edges, {'fine' if is_fine else 'A FINDING'}"
    print(f"{name:>10} {count:>12,} inputs, {verdict}", flush=True)
    if not is_fine:
        print(ended.stdout[-4000:], ended.stderr[-4000:], sep="\n", file=sys.stderr)
    return count, is_fine


if __name__ == "__main__":
    sys.exit(main())
