"""The facts that a compiled step depends on, beside the shapes of its arguments."""

from dataclasses import dataclass
from enum import Enum

import jax.numpy as jnp

from grokctl.model.config import GrokConfig
from grokctl.model.placement import MeshShape


class KernelForm(Enum):
    """How the kernels for GPUs are written down."""

    PTX = "ptx"
    """With instructions of NVIDIA's GPUs where Triton finds worse ones."""
    PLAIN = "plain"
    """Without any, for others."""
    INTERPRETED = "interpreted"
    """As ordinary operations, on any platform."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """Static facts of a step."""

    config: GrokConfig
    mesh: MeshShape
    platform: str
    """`cpu`, `gpu` or `tpu`: decides the form of products."""
    compute: jnp.dtype
    """Type of the key-value cache, and of operands on platforms that multiply it fast: bfloat16 or
    float32. All else is float32, which costs little beside the weights."""
    has_fast_bfloat16: bool = False
    """Whether a CPU multiplies bfloat16 by itself, faster than float32 or as fast; accelerators
    do."""
    draws_on_device: bool = False
    """Whether devices look for the tokens to draw from, and rows of logits stay there."""
    has_native_kernel: bool = False
    """Whether the native library of CPUs is loaded."""
    has_kernel: bool = False
    """Whether a GPU runs few tokens through the kernels of `model/kernels` and its neighbours
    (`model/attention_kernel`, `model/cache_kernel`, `model/norm_kernel`)."""
    kernel_form: KernelForm = KernelForm.PTX
    """Of these kernels."""

    @property
    def operand(self) -> jnp.dtype:
        """Type of operands of matrix products."""
        is_fast = self.has_fast_bfloat16 or self.platform != "cpu"
        return self.compute if is_fast else jnp.dtype(jnp.float32)
