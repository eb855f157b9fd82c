"""How weights are stored in a ready checkpoint."""

from enum import StrEnum


class Precision(StrEnum):
    """Storage of the quantised tensors; everything else stays float32 as released."""

    INT8 = "int8"
    """The released integers and scales, regrouped, never rounded again: lossless."""
