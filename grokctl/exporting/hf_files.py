"""safetensors files of a model, as SGLang and vLLM up to 0.24 read them, and their configuration.

Names are those of Grok-2 in SGLang's `srt/models/grok.py`: weights are `(outputs, inputs)`, experts
lie apart, and the head is a copy of the embedding. vLLM 0.24 picks its class for them by
`moe_intermediate_size`, and renames them. The attention's scale is in no file: both take
`head_dim ** -0.5`.
"""

import json
from collections.abc import Sequence
from typing import Any, Final

from grokctl.checkpoint.gguf import TensorType
from grokctl.checkpoint.gguf_model import order_of, slot_of
from grokctl.checkpoint.hf_tokenizer import tokenizer_config, tokenizer_json
from grokctl.checkpoint.layout import ALIGNMENT
from grokctl.checkpoint.pieces import Pieces
from grokctl.checkpoint.tensor_source import Storage
from grokctl.errors import PlacementError
from grokctl.exporting.files import ExportFile, distributed, numbered
from grokctl.exporting.tensors import ExportTensor
from grokctl.model.config import GrokConfig
from grokctl.model.tensors import Axis, TensorSpec, tensor_specs

INDEX: Final = "model.safetensors.index.json"
_SUFFIX: Final = ".safetensors"
_LARGEST: Final = 48 * 10**9
"""Bytes of a file by default: hubs take less than 50 GB."""
_CLOSE: Final = 1e-6
"""Relative difference of numbers that are the same."""
_NAMES: Final = {
    "norms.pre_attention": "pre_attn_norm.weight",
    "attention.query": "self_attn.q_proj.weight",
    "attention.key": "self_attn.k_proj.weight",
    "attention.value": "self_attn.v_proj.weight",
    "attention.out": "self_attn.o_proj.weight",
    "norms.post_attention": "post_attn_norm.weight",
    "norms.pre_moe": "pre_moe_norm.weight",
    "router": "block_sparse_moe.gate.weight",
    "moe.gate": "block_sparse_moe.experts.{expert}.w1.weight",
    "moe.up": "block_sparse_moe.experts.{expert}.w3.weight",
    "moe.down": "block_sparse_moe.experts.{expert}.w2.weight",
    "norms.post_moe": "post_moe_norm.weight",
}


def is_scale_usual(config: GrokConfig) -> bool:
    """Whether the attention's scale is `key_size ** -0.5`, as SGLang and vLLM take for granted."""
    usual: float = config.key_size**-0.5
    return abs(config.attn_output_multiplier - usual) <= _CLOSE * usual


def refuse_other_scale(config: GrokConfig, *, hint: str | None = None) -> None:
    """Refuse a model whose attention the engines would scale otherwise.

    Args:
        config: The model.
        hint: What holds it in spite of its scale.

    Raises:
        PlacementError: Its scale is not `key_size ** -0.5`.
    """
    if not is_scale_usual(config):
        raise PlacementError(
            f"SGLang and vLLM: expected attn_output_multiplier {config.key_size**-0.5:.6g}, found "
            f"{config.attn_output_multiplier:.6g}",
            hint,
        )


def hf_tensors(
    storage: Storage, kind: TensorType, embedding: TensorType
) -> tuple[ExportTensor, ...]:
    """The tensors of a model in the order of the files; norms and routers stay float32.

    Args:
        storage: How the weights are converted.
        kind: The type of the parameters that the release quantizes.
        embedding: The type of the embedding and its copy, the head.
    """
    tensors, head = [], []
    for spec in sorted(tensor_specs(storage.config), key=order_of):
        own = storage.weight(spec)
        if spec.axes[0] is Axis.VOCAB:
            tensors.append(
                ExportTensor(name="model.embed_tokens.weight", tensor=own, type=embedding)
            )
            head.append(ExportTensor(name="lm_head.weight", tensor=own, type=embedding))
            continue
        own_kind = kind if spec.is_quantized else TensorType.F32
        for lead in _leads(spec):
            name = _name(spec, lead)
            tensors.append(ExportTensor(name=name, tensor=own, type=own_kind, lead=lead))
    return (*tensors, *head)


def _leads(spec: TensorSpec) -> Sequence[tuple[int, ...] | None]:
    """The indices of experts, which lie apart; None for what is no stack."""
    if spec.axes[0] is not Axis.EXPERTS:
        return [None]
    return [(expert,) for expert in range(spec.shape[0])]


def _name(spec: TensorSpec, lead: tuple[int, ...] | None) -> str:
    if spec.layer is None:
        return "model.norm.weight"
    name = _NAMES[slot_of(spec)]
    expert = "" if lead is None else str(lead[0])
    return f"model.layers.{spec.layer}.{name.format(expert=expert)}"


def hf_files(tensors: Sequence[ExportTensor], split: int | None) -> tuple[ExportFile, ...]:
    """The files that hold the tensors.

    Args:
        tensors: In order.
        split: Bytes of tensors in a file at most; 48 GB by default.

    Raises:
        InvalidValueError: A tensor is larger than that.
    """
    parts = distributed(tensors, lambda one: one.nbytes, split or _LARGEST)
    many = len(parts) > 1
    return tuple(
        ExportFile(
            number=number,
            name=numbered("model", number, len(parts), _SUFFIX) if many else f"model{_SUFFIX}",
            header=_header(part),
            sizes=_sizes(tensors, part),
        )
        for number, part in enumerate(parts)
    )


def _sizes(tensors: Sequence[ExportTensor], part: Sequence[ExportTensor]) -> tuple[int, ...]:
    own = {one.name for one in part}
    return tuple(one.nbytes if one.name in own else 0 for one in tensors)


def _header(part: Sequence[ExportTensor]) -> bytes:
    """The header of a safetensors file with its length before it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for one in part:
        end = begin + one.nbytes
        shape = list(one.shape)
        entries[one.name] = {"dtype": one.type.name, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def hf_small_files(
    config: GrokConfig,
    tensors: Sequence[ExportTensor],
    files: Sequence[ExportFile],
    pieces: Pieces | None,
    kind: TensorType,
) -> dict[str, bytes]:
    """The files beside the tensors, by name.

    Args:
        config: The model.
        tensors: Of the model.
        files: That have the tensors.
        pieces: The vocabulary, if there is a tokenizer.
        kind: The type of most tensors.
    """
    where = {
        tensor.name: file.name
        for file in files
        for tensor, nbytes in zip(tensors, file.sizes, strict=True)
        if nbytes
    }
    total = sum(one.nbytes for one in tensors)
    small = {
        INDEX: _json({"metadata": {"total_size": total}, "weight_map": where}),
        "config.json": _json(_config(config, pieces, kind)),
        "generation_config.json": _json(_special(config, pieces)),
    }
    if pieces is not None:
        small["tokenizer.json"] = tokenizer_json(pieces)
        small["tokenizer_config.json"] = tokenizer_config(pieces, config.sequence_len)
    return small


def _special(config: GrokConfig, pieces: Pieces | None) -> dict[str, Any]:
    begin = 1 if pieces is None or pieces.begin_id is None else pieces.begin_id
    return {
        "bos_token_id": begin,
        "eos_token_id": config.eos_token,
        "pad_token_id": config.pad_token,
    }


def _config(config: GrokConfig, pieces: Pieces | None, kind: TensorType) -> dict[str, Any]:
    """What SGLang and vLLM read; every key is needed by one of them, or keeps one from a mistake.

    `load_presharded_moe` false lets SGLang cut whole experts itself. The router of vLLM is the
    reference's with `router_logit_softcapping` 0 and `moe_router_renormalize` false. With
    `attn_output_multiplier`, vLLM would scale the attention twice.
    """
    return {
        "architectures": ["Grok1ModelForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": config.vocab_size,
        "hidden_size": config.emb_size,
        "intermediate_size": config.ffn_size,
        "moe_intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.key_size,
        "max_position_embeddings": config.sequence_len,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_base,
        "attn_logit_softcapping": config.attn_logit_cap,
        "max_attn_value": config.attn_logit_cap,
        "embedding_multiplier_scale": config.embedding_multiplier_scale,
        "output_multiplier_scale": config.output_multiplier_scale,
        "num_experts": config.num_experts,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_selected_experts,
        "router_logit_softcapping": 0,
        "moe_router_renormalize": False,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "load_presharded_moe": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        **_special(config, pieces),
        "torch_dtype": "bfloat16" if kind is TensorType.BF16 else "float32",
    }


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=1).encode() + b"\n"
