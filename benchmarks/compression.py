"""What zstd makes of weights as they are stored: ratio and speed by level, on one core."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from grokctl.checkpoint.frames import FRAME, Compression, compress
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.quantization import dequantised, rounded, to_int4

INPUTS, OUTPUTS = 6144, 4096  # of an expert, on one of 8 devices
LEVELS = (1, 3, 9, 19)
GROUP = 64


def weights() -> dict[str, NDArray[Any]]:
    """Normal values, quantised as the release is: the largest input of each output is 127."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((INPUTS, OUTPUTS), dtype=np.float32)
    integers = np.rint(normal * (127 / np.abs(normal).max(axis=0))).astype(np.int8)
    scales = rng.uniform(1e-4, 3e-4, OUTPUTS).astype(BFLOAT16)
    floats = dequantised(integers, scales)
    return {
        "int8": integers,
        "int4": to_int4(integers, group=GROUP).codes,
        "bf16": rounded(floats),
        "float32": floats,
    }


def frames(weight: NDArray[Any], count: int) -> list[bytes]:
    data = weight.tobytes()[: count * FRAME]
    return [data[low : low + FRAME] for low in range(0, len(data), FRAME)]


def planes(frame: bytes) -> bytes:
    """First all low bytes, then all high ones: exponents beside exponents."""
    return np.frombuffer(frame, np.uint8).reshape(-1, 2).T.tobytes()


def entropy(frame: bytes) -> float:
    """Bits of a byte that a coder of single bytes cannot save."""
    counts = np.bincount(np.frombuffer(frame, np.uint8), minlength=256)
    parts = counts[counts > 0] / len(frame)
    return float(-(parts * np.log2(parts)).sum())


def fastest(work: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=6, help="of 1 MiB, of each precision")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    made = {name: frames(weight, options.frames) for name, weight in weights().items()}
    made["bf16, bytes apart"] = list(map(planes, made["bf16"]))
    print("| stored as | order-0 entropy | level | compressed to | MB/s in | MB/s back |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, parts in made.items():
        nbytes = sum(map(len, parts))
        bound = sum(map(entropy, parts)) / len(parts) / 8
        for level in LEVELS:
            way = Compression(level)
            packed = [compress(part, way) for part in parts]
            ratio = sum(map(len, packed)) / nbytes
            rounds = 1 if level == LEVELS[-1] else options.rounds
            there = fastest(lambda p=parts, w=way: [compress(part, w) for part in p], rounds)
            unpacker = zstandard.ZstdDecompressor()
            back = fastest(
                lambda p=packed, u=unpacker: [u.decompress(part) for part in p], options.rounds
            )
            print(
                f"| {name} | {bound:.3f} | {level} | {ratio:.3f} "
                f"| {nbytes / there / 1e6:,.0f} | {nbytes / back / 1e6:,.0f} |"
            )


if __name__ == "__main__":
    main()
