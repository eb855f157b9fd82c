"""Arithmetic within kernels for GPUs: codes of stored weights as floats, products added to sums.

A code becomes the last bits of a large float, which is then subtracted, exactly: a GPU converts
integers at a fraction of the rate of its other operations, too slowly for its memory.
"""

from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from grokctl.model.step_spec import KernelForm

try:
    from jax.experimental.pallas import triton
except ImportError:  # announced for a version after JAX 0.11
    triton = None  # type: ignore[assignment]

__all__ = ["codes", "multiply_add", "scale", "triton"]

_FLOAT: Final = 0x4B000000
"""2²³ as a float: its last bits count ones."""
_FOUR: Final = "".join(f" prmt.b32 ${byte}, a, {_FLOAT:#x}, 0x765{byte};" for byte in range(4))
"""Four bytes to the last byte of four floats each: the instruction picks bytes of two words."""
_INT8: Final = "xor.b32 a, $4, 0x80808080;"
_LOW: Final = "and.b32 a, $4, 0x0F0F0F0F;"
_HIGH: Final = "shr.u32 a, $4, 4; and.b32 a, a, 0x0F0F0F0F;"


def codes(stored: Shaped[Array, "*any"], form: KernelForm) -> list[Float[Array, "*any"]]:
    """Codes in stored numbers, as float32: one, or of a byte of int4 two, the low nibble first."""
    if stored.dtype not in (jnp.int8, jnp.uint8):
        return [scale(stored)]
    kinds = [(_INT8, 128)] if stored.dtype == jnp.int8 else [(_LOW, 8), (_HIGH, 8)]
    if form is KernelForm.PTX and stored.size % 4 == 0:
        return [_four(prepare, stored) - (2.0**23 + offset) for prepare, offset in kinds]
    as_float = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    if stored.dtype == jnp.uint8:
        bits = stored.astype(jnp.uint32)
        return [as_float(each & 0x0F | _FLOAT) - (2.0**23 + 8) for each in (bits, bits >> 4)]
    bits = jax.lax.bitcast_convert_type(stored, jnp.uint8).astype(jnp.uint32)
    return [as_float(bits ^ (_FLOAT | 0x80)) - (2.0**23 + 128)]


def scale(stored: Shaped[Array, "*any"]) -> Float[Array, "*any"]:
    """float32, or the bits of bfloat16, as float32."""
    if stored.dtype != jnp.uint16:
        return stored
    return jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)


def multiply_add(
    left: Float[Array, "rows columns"],
    right: Float[Array, " rows"],
    total: Float[Array, "rows columns"],
    form: KernelForm,
) -> Float[Array, "rows columns"]:
    """`total + left * right`, rounded once where the GPU can: Triton does not make one of both."""
    wide = jnp.broadcast_to(right[:, None], left.shape)
    if form is not KernelForm.PTX:
        return total + left * wide
    return _assembled("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", 1, left, wide, total)


def _four(prepare: str, stored: Shaped[Array, "*any"]) -> Float[Array, "*any"]:
    """2²³ plus each code, four stored bytes at a time."""
    text = f"{{ .reg .b32 a; {prepare}{_FOUR} }}"
    return _assembled(text, "=f,=f,=f,=f,r", 4, stored)


def _assembled(text: str, constraints: str, pack: int, *arguments: Any) -> Array:
    (found,) = triton.elementwise_inline_asm(
        text,
        args=arguments,
        constraints=constraints,
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arguments[0].shape, jnp.float32)],
    )
    result: Array = found
    return result
