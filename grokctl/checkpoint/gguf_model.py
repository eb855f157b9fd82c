"""Grok-1 as llama.cpp's architecture `grok`: names, shapes and metadata.

Source: llama.cpp's `src/models/grok.cpp` and `gguf-py/gguf/constants.py`. Projections are
`(outputs, inputs)`; queries and keys need no permutation, as its rotary embedding pairs the two
halves of a head like the reference's. The head is the embedding, so there is no `output.weight`.
"""

from typing import Any, Final

import numpy as np

from grokctl.checkpoint.gguf import TensorType, Value
from grokctl.checkpoint.torrent import GROK_1_MAGNET
from grokctl.errors import PlacementError
from grokctl.model.config import GROK_1, GrokConfig
from grokctl.model.tensors import Axis, TensorSpec

ARCHITECTURE: Final = "grok"
STORAGE: Final = "grokctl.storage"
"""The key of what grokctl needs to read a file again."""
_NAMES: Final = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "norms.pre_attention": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.out": "attn_output",
    "norms.post_attention": "attn_output_norm",
    "norms.pre_moe": "ffn_norm",
    "router": "ffn_gate_inp",
    "moe.gate": "ffn_gate_exps",
    "moe.up": "ffn_up_exps",
    "moe.down": "ffn_down_exps",
    "norms.post_moe": "layer_output_norm",
}
"""Parameters in the order of the files: as a token passes them."""
_PLACES: Final = {name: place for place, name in enumerate(_NAMES)}
_FILE_TYPES: Final = {
    TensorType.F32: 0,
    TensorType.Q4_0: 2,
    TensorType.Q8_0: 7,
    TensorType.BF16: 32,
}
"""llama.cpp's numbers for what most tensors of a file are."""
_MOST_EXPERTS: Final = 512
"""llama.cpp's LLAMA_MAX_EXPERTS; of layers it takes more than any model of ours has."""


def slot_of(spec: TensorSpec) -> str:
    """The name of a parameter without its layer."""
    return spec.name if spec.layer is None else spec.name.split(".", 2)[2]


def order_of(spec: TensorSpec) -> tuple[int, int]:
    """A parameter's place in the files: layers in numeric order, not in that of the release."""
    return (-1 if spec.layer is None else spec.layer, _PLACES[slot_of(spec)])


def gguf_name(spec: TensorSpec) -> str:
    """The name of a parameter, such as `blk.10.ffn_down_exps.weight`."""
    layer = "" if spec.layer is None else f"blk.{spec.layer}."
    return f"{layer}{_NAMES[slot_of(spec)]}.weight"


def gguf_shape(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of a parameter: `(*experts, outputs, inputs)`; of the embedding, as released."""
    if len(spec.shape) == 1 or spec.axes[0] is Axis.VOCAB:
        return spec.shape
    return (*spec.shape[:-2], spec.shape[-1], spec.shape[-2])


def are_heads_possible(config: GrokConfig) -> bool:
    """Whether the heads together are as wide as the embedding, as llama.cpp takes for granted."""
    return config.q_size == config.emb_size


def refuse_impossible(config: GrokConfig, *, hint: str | None = None) -> None:
    """Refuse a model that llama.cpp cannot hold.

    Args:
        config: The model.
        hint: What holds it in spite of its heads.

    Raises:
        PlacementError: Its heads together are not as wide as its embedding, or it has too many
            experts.
    """
    if not are_heads_possible(config):
        found = f"{config.num_q_heads} of {config.key_size}, together {config.q_size}"
        raise PlacementError(
            f"llama.cpp: expected heads as wide together as the embedding, {config.emb_size}, "
            f"found {found}",
            hint,
        )
    if config.num_experts > _MOST_EXPERTS:
        raise PlacementError(
            f"llama.cpp: expected at most {_MOST_EXPERTS} experts, found {config.num_experts}"
        )


def model_metadata(config: GrokConfig, kind: TensorType, name: str) -> dict[str, Value]:
    """The metadata of a model, without its tokenizer.

    Args:
        config: The model.
        kind: The type of most tensors.
        name: Of the model, for people.
    """
    values: dict[str, Value] = {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": "Grok-1" if config == GROK_1 else name,
    }
    if config == GROK_1:
        values["general.license"] = "apache-2.0"
        values["general.organization"] = "xAI"
        values["general.source.url"] = GROK_1_MAGNET
    values["general.quantization_version"] = np.uint32(2)
    values["general.file_type"] = np.uint32(_FILE_TYPES[kind])
    numbers: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.sequence_len,
        "embedding_length": config.emb_size,
        "feed_forward_length": config.ffn_size,
        "attention.head_count": config.num_q_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_selected_experts,
        "rope.dimension_count": config.key_size,
        "vocab_size": config.vocab_size,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_base,
        "attn_logit_softcapping": config.attn_logit_cap,
        "router_logit_softcapping": 30.0,  # Grok-1's number in llama.cpp, which does not use it
        "attention.output_scale": float(config.attn_output_multiplier),
        "embedding_scale": float(config.embedding_multiplier_scale),
        "logit_scale": float(config.output_multiplier_scale),
    }
    for key, number in numbers.items():
        is_float = isinstance(number, float)
        values[f"{ARCHITECTURE}.{key}"] = np.float32(number) if is_float else np.uint32(number)
    return values
