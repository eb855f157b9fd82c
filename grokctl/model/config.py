"""The published numbers of Grok-1, and the same numbers for smaller models."""

import json
import reprlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from grokctl.errors import Reason, corrupt
from grokctl.os_errors import TooLargeError
from grokctl.paths import read_limited

_LARGEST_SIZE = 2**24
_LARGEST_COUNT = 4096
_MOST_LAYERS = 256
"""Each is twelve files, and as many messages about missing ones."""
_LARGEST_TENSOR = 2**32
_LARGEST_FILE = 2**20
"""Bounds on what an untrusted `config.json` may claim, well above any model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrokConfig:
    """Sizes of one Grok-1 shaped model; field names are the reference code's.

    Hashable, so that it is static under `jax.jit`.

    Raises:
        CorruptCheckpointError: A number is impossible for any model.
    """

    vocab_size: int
    pad_token: int
    eos_token: int
    sequence_len: int
    """Longest context, tokens."""
    embedding_multiplier_scale: float
    output_multiplier_scale: float
    emb_size: int
    widening_factor: int
    key_size: int
    """Width of one attention head."""
    num_q_heads: int
    num_kv_heads: int
    num_layers: int
    attn_output_multiplier: float
    num_experts: int
    num_selected_experts: int

    attn_logit_cap: ClassVar[float] = 30.0
    """Attention logits are squashed into ±this."""
    rms_norm_eps: ClassVar[float] = 1e-5
    rope_base: ClassVar[float] = 10000.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float:
                is_valid = type(value) in {int, float} and 0 < value < _LARGEST_SIZE
            else:
                smallest = 0 if field.name.endswith("_token") else 1
                largest = _LARGEST_COUNT if field.name.startswith("num_") else _LARGEST_SIZE
                largest = _MOST_LAYERS if field.name == "num_layers" else largest
                is_valid = type(value) is int and smallest <= value <= largest
            if not is_valid:
                raise _bad(f"{field.name} is {reprlib.repr(value)}")
        for name, whole, part in (
            ("num_q_heads over num_kv_heads", self.num_q_heads, self.num_kv_heads),
            ("key_size over 2", self.key_size, 2),
        ):
            if whole % part:
                raise _bad(f"{name} leaves a remainder ({whole} over {part})")
        if not 1 <= self.ffn_size <= _LARGEST_SIZE or self.q_size > _LARGEST_SIZE:
            raise _bad(f"experts are {self.ffn_size} and queries {self.q_size} wide")
        largest = self.emb_size * max(
            4 * self.vocab_size, self.num_experts * max(4, 2 * self.ffn_size), 2 * self.q_size
        )
        if largest >= _LARGEST_TENSOR:
            raise _bad(
                f"a tensor takes {largest:,} bytes, at most {_LARGEST_TENSOR:,} fit in a file"
            )
        if self.num_selected_experts > self.num_experts:
            raise _bad(f"{self.num_selected_experts} of {self.num_experts} experts selected")
        if max(self.pad_token, self.eos_token) >= self.vocab_size:
            raise _bad(f"special tokens lie outside the vocabulary of {self.vocab_size}")

    @property
    def ffn_size(self) -> int:
        """Width of one expert: two thirds of the widened embedding, rounded up to 8."""
        size = self.widening_factor * self.emb_size * 2 // 3
        return size + (8 - size) % 8

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_q_heads * self.key_size

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.key_size

    def to_dict(self) -> dict[str, int | float]:
        """The fields as `config.json` holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, *, file: str = "config.json") -> Self:
        """Read untrusted JSON values.

        Args:
            values: The result of `json.loads`.
            file: Name for the error.

        Raises:
            CorruptCheckpointError: A field is missing or has an impossible value. Unknown fields
                are ignored.
        """
        if not isinstance(values, dict):
            raise _bad("is no JSON object", file=file)
        names = {field.name for field in fields(cls)}
        missing = sorted(names - values.keys())
        if missing:
            raise _bad(f"lacks {', '.join(missing)}", file=file)
        return cls(**{name: values[name] for name in names})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a `config.json`.

        Raises:
            CorruptCheckpointError: It is no JSON, too large, or not a model's configuration.
        """
        try:
            values = json.loads(read_limited(path, _LARGEST_FILE).decode())
        except TooLargeError as error:
            raise _bad(f"{error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise _bad("is no JSON") from error
        return cls.from_dict(values)


def _bad(detail: str, *, file: str = "config.json") -> Exception:
    return corrupt(file, Reason.MALFORMED, detail)


GROK_1 = GrokConfig(
    vocab_size=131072,
    pad_token=0,
    eos_token=2,
    sequence_len=8192,
    embedding_multiplier_scale=78.38367176906169,
    output_multiplier_scale=0.5773502691896257,
    emb_size=6144,
    widening_factor=8,
    key_size=128,
    num_q_heads=48,
    num_kv_heads=8,
    num_layers=64,
    attn_output_multiplier=0.08838834764831845,
    num_experts=8,
    num_selected_experts=2,
)
"""The only place with the published numbers."""
