"""The recipe of the miniature that ships: its shape, its text, and the numbers of its training."""

from dataclasses import replace
from typing import Any, Final

import jax.numpy as jnp

from grokctl.model.config import GROK_1

CONFIG: Final = replace(
    GROK_1,
    vocab_size=2048,
    sequence_len=512,
    embedding_multiplier_scale=256**0.5,
    emb_size=256,
    widening_factor=3,
    key_size=16,
    num_q_heads=16,
    num_layers=3,
    attn_output_multiplier=16**-0.5,
)
"""Multiples of 256, so that every mesh, scale group and other engine can hold it."""
SHARES: Final = {"topic": 0.25, "docstrings": 0.35, "source": 0.4}
"""Of the sequences of a batch, by kind of text."""
BATCH: Final = 8192
"""Tokens of a step."""
LENGTHS: Final = ((0.0, 64), (0.5, 128), (0.85, 256))
"""Tokens of a sequence from a share of the steps on."""
STEPS: Final = 1150
"""9.4 million tokens: about an hour of two cores with AMX."""
RATE: Final = 4e-3
WEIGHT_DECAY: Final = 0.02
WARMUP: Final = 40
DECAY: Final = 0.4
"""The last share of the steps, over which the rate falls to zero."""
BALANCE: Final = 0.01
SEED: Final = 20
EVERY: Final = 20
"""Steps between measurements of the held-out loss, and between saved states."""


def rate(step: Any, *, steps: int) -> Any:
    """A warm-up, a plateau, and a fall to zero: the plateau can be prolonged afterwards."""
    falling = (steps - step) / (DECAY * steps)
    return RATE * jnp.clip(jnp.minimum((step + 1) / WARMUP, falling), 0, 1)
