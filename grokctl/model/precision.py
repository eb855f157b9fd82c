"""Types of stored weights, of operands, and of keys and values."""

from enum import StrEnum
from typing import Final, Self

from grokctl.errors import PlacementError

_SPELLINGS: Final = {
    "bfloat16": ("bf16",),
    "bf16": ("bfloat16",),
    "float32": ("fp32", "f32"),
}
"""Other spellings of a dtype that people know, by ours."""


class _Spelled(StrEnum):
    """A dtype by its name, in any case, or by another spelling of it."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        wanted = str(value).casefold()
        known = (one for one in cls if wanted in (one.value, *_SPELLINGS.get(one.value, ())))
        return next(known, None)


class Precision(_Spelled):
    """Type of the tensors that the release quantises; all others stay float32."""

    INT8 = "int8"
    """The released integers and scales, regrouped, never rounded again: lossless."""
    BFLOAT16 = "bf16"
    """Integer times scale, rounded to nearest even."""
    FLOAT32 = "float32"
    """Integer times scale, exactly: lossless, four times the bytes of int8."""
    INT4 = "int4"
    """-7 to 7 times the scale of a group of inputs; scales minimise the squared error."""


class Compute(_Spelled):
    """Type of the key-value cache, and of operands on platforms that multiply it fast."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class KvType(_Spelled):
    """Type of keys and values in the cache."""

    COMPUTE = "compute"
    """The type of computation."""
    INT8 = "int8"
    """Codes with a scale for every head and position: half the memory of bfloat16."""


def check_conversion(source: Precision, target: Precision, *, hint: str | None = None) -> None:
    """Refuse a conversion that would need information that its source has lost.

    Args:
        source: The precision that there is.
        target: The one that is wanted.
        hint: Where the information may still be.

    Raises:
        PlacementError: The target is int8, and the source is not.
    """
    if target is Precision.INT8 and source is not Precision.INT8:
        raise PlacementError(
            f"int8 stores the released integers, and {source} weights no longer hold them",
            hint,
        )
