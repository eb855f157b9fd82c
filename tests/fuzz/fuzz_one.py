"""Fuzz one target in this process, guided by the coverage of grokctl's own code."""

import resource
import sys
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["grokctl"]):
    from fuzz_targets import TARGETS

MEMORY = 2**30
"""Bytes of address space that a target may take beside what it has at its start."""
LARGEST = 2**16
"""Bytes of an input."""


def main(name: str, seconds: str, corpus: Path) -> None:
    """Feed a target until the time is over or an input is a finding; ends the process."""
    target = TARGETS[name]
    corpus.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(target.seeds()):
        (corpus / f"seed-{index}").write_bytes(seed)
        target.run(seed)

    def mutate(data: bytes, size: int, seed: int) -> bytes:
        rng = Random(seed)
        if rng.random() < 0.5:
            return atheris.Mutate(data, size)
        return target.mutate(data, rng)[:size]

    def feed(data: bytes) -> None:
        target.run(data)

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    flags = [
        f"-max_total_time={seconds}",
        f"-max_len={LARGEST}",
        "-timeout=10",
        "-print_final_stats=1",
        f"-artifact_prefix={name}-",
    ]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], feed, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
