"""What int4 costs in accuracy, by group size: the largest magnitude, our steps, and any step."""

import argparse

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.quantization import to_int4, unpacked

INPUTS = 6144
GROUPS = (32, 64, 128, 256)
LARGEST = 7
FACTORS = np.arange(0.5, 1.0001, 0.01)


def weights(outputs: int) -> NDArray[np.int8]:
    """Normal values, quantised as the release is: the largest input of each output is 127."""
    normal = np.random.default_rng(0).standard_normal((INPUTS, outputs), dtype=np.float32)
    return np.rint(normal * (127 / np.abs(normal).max(axis=0))).astype(np.int8)


def by_step(values: NDArray[np.float32], steps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Codes of `(groups, group, outputs)` for the step of each group and output."""
    codes = np.rint(values / np.maximum(steps, np.float32(1e-9))[:, None])
    return codes.clip(-LARGEST, LARGEST)


def fitted(values: NDArray[np.float32], codes: NDArray[np.float32]) -> NDArray[np.float32]:
    """The steps that fit codes best."""
    steps: NDArray[np.float32] = (values * codes).sum(1) / np.maximum((codes * codes).sum(1), 1)
    return steps


def errors(
    values: NDArray[np.float32], codes: NDArray[np.float32], steps: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Sums of squared errors of each group and output."""
    change = codes * steps[:, None] - values
    squares: NDArray[np.float32] = (change * change).sum(1)
    return squares


def measure(integers: NDArray[np.int8], group: int) -> dict[str, float]:
    """Relative root mean square errors."""
    values = integers.reshape(-1, group, integers.shape[1]).astype(np.float32)
    largest = np.abs(values).max(1)
    usual = largest / LARGEST
    absmax = errors(values, by_step(values, usual), usual)
    least = absmax
    for factor in FACTORS:
        codes = by_step(values, usual * np.float32(factor))
        least = np.minimum(least, errors(values, codes, fitted(values, codes)))
    found = to_int4(integers, group=group)
    codes = unpacked(found.codes).reshape(values.shape).astype(np.float32)
    total = float((values * values).sum())
    sums = {
        "largest magnitude": absmax,
        "ours": errors(values, codes, found.steps),
        "best of all": least,
    }
    return {name: float(np.sqrt(squares.sum() / total)) for name, squares in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outputs", type=int, default=1024)
    integers = weights(parser.parse_args().outputs)
    found = {group: measure(integers, group) for group in GROUPS}
    print("| group | bytes a weight | " + " | ".join(next(iter(found.values()))) + " |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for group, values in found.items():
        nbytes = 0.5 + 2 / group  # and the step, in bfloat16
        cells = " | ".join(f"{value:.2%}" for value in values.values())
        print(f"| {group} | {nbytes:.5g} | {cells} |")


if __name__ == "__main__":
    main()
