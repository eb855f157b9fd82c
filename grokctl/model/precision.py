"""How numbers are stored: weights of a ready checkpoint, operands, keys and values."""

from enum import StrEnum

from grokctl.errors import PlacementError


class Precision(StrEnum):
    """Storage of the tensors that the release quantises; everything else stays float32."""

    INT8 = "int8"
    """The released integers and scales, regrouped, never rounded again: lossless."""
    BFLOAT16 = "bf16"
    """Integer times scale, rounded to nearest even."""
    FLOAT32 = "float32"
    """Integer times scale, exactly: lossless, four times the bytes of int8."""
    INT4 = "int4"
    """-7 to 7 times the scale of a group of inputs that makes the squared error least."""


class Compute(StrEnum):
    """Type of the key-value cache, and of operands where the platform is fast in it."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class KvType(StrEnum):
    """How keys and values are kept."""

    COMPUTE = "compute"
    """In the type of computation."""
    INT8 = "int8"
    """As codes with a scale for every head and position: half the memory of bfloat16."""


def check_conversion(source: Precision, target: Precision) -> None:
    """Refuse to make a precision out of another that does not determine it.

    Raises:
        PlacementError: The released integers are wanted back from what was rounded or multiplied.
    """
    if target is Precision.INT8 and source is not Precision.INT8:
        raise PlacementError(
            f"int8 is the released integers, and {source} weights do not hold them any more",
            "grokctl reshard grok-1 --devices 8  # from the release, or from an int8 checkpoint",
        )
