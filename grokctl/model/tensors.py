"""One `TensorSpec` per parameter: index, names, shape and axes, in the order of the release."""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from grokctl.model.config import GrokConfig

SHARDS = 8
"""Devices of the mesh that the release was quantised on: scale rows of a row-parallel tensor."""


class Axis(StrEnum):
    """Meaning of an axis of a tensor; placement maps it to a mesh axis."""

    EMBED = "embed"
    VOCAB = "vocab"
    Q_HEADS = "q_heads"
    KV_HEADS = "kv_heads"
    FFN = "ffn"
    EXPERTS = "experts"
    ROUTES = "routes"
    """One output of the router per expert: never split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One parameter of the model as the release stores it: `(*lead, inputs, outputs)`."""

    index: int
    """Number of the file in `ckpt-0`, 0 to 769 for Grok-1."""
    path: str
    """The reference code's module path and parameter, such as `…/moe/linear_1/w`."""
    name: str
    """grokctl's name, such as `layers.10.moe.down`."""
    layer: int | None
    """Decoder layer; None for the embedding and the final norm."""
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    scale_groups: int
    """Scale rows expected in the release: 0 for float32 tensors, else 1 or 8."""

    @property
    def is_quantized(self) -> bool:
        """Whether the release holds int8 with scales, not float32."""
        return self.scale_groups > 0

    @property
    def file(self) -> str:
        """File name in `ckpt-0`."""
        return _file(self.index)

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """Shape of the scales: `(*lead, groups, outputs)`."""
        return (*self.shape[:-2], self.scale_groups, self.shape[-1])


@dataclass(frozen=True, slots=True)
class _Slot:
    """One of the twelve tensors of a decoder layer."""

    path: str
    name: str
    axes: tuple[Axis, ...]
    scale_groups: int = 0


_E, _F, _X = Axis.EMBED, Axis.FFN, Axis.EXPERTS

_LAYER: tuple[_Slot, ...] = (
    _Slot("moe/linear/w", "moe.gate", (_X, _E, _F), 1),
    _Slot("moe/linear_1/w", "moe.down", (_X, _F, _E), SHARDS),
    _Slot("moe/linear_v/w", "moe.up", (_X, _E, _F), 1),
    _Slot("multi_head_attention/key/w", "attention.key", (_E, Axis.KV_HEADS), 1),
    _Slot("multi_head_attention/linear/w", "attention.out", (Axis.Q_HEADS, _E), SHARDS),
    _Slot("multi_head_attention/query/w", "attention.query", (_E, Axis.Q_HEADS), 1),
    _Slot("multi_head_attention/value/w", "attention.value", (_E, Axis.KV_HEADS), 1),
    _Slot("rms_norm/scale", "norms.pre_attention", (_E,)),
    _Slot("rms_norm_1/scale", "norms.post_attention", (_E,)),
    _Slot("rms_norm_2/scale", "norms.pre_moe", (_E,)),
    _Slot("rms_norm_3/scale", "norms.post_moe", (_E,)),
    _Slot("router/w", "router", (_E, Axis.ROUTES)),
)
"""Sorted by path, as the reference code's pytree is."""
_BEFORE_LAYERS = 2
"""The embedding and the final norm."""


def layer_order(num_layers: int) -> tuple[int, ...]:
    """Decoder layers in the order of the release: sorted as *strings*, 0, 1, 10, 11, …, 2, 20, ….

    Numeric order passes every shape check and gives a wrong model.
    """
    return tuple(sorted(range(num_layers), key=str))


def num_layers_of(num_tensors: int) -> int:
    """Decoder layers of a release with so many files; 0 if no model has that number."""
    num_layers, rest = divmod(num_tensors - _BEFORE_LAYERS, len(_LAYER))
    return 0 if rest else max(num_layers, 0)


def layer_files(num_tensors: int, layers: Collection[int]) -> set[str]:
    """File names in `ckpt-0` of the tensors of some decoder layers.

    Args:
        num_tensors: Number of files of the release.
        layers: Decoder layers, by number.

    Raises:
        ValueError: No model has this number of tensors, or a layer is missing from it.
    """
    num_layers = num_layers_of(num_tensors)
    if num_layers < 1:
        raise ValueError(f"{num_tensors} tensors are no whole layers")
    order = layer_order(num_layers)
    if not set(layers) <= set(order):
        raise ValueError(f"layers are 0 to {num_layers - 1}")
    first = {layer: _BEFORE_LAYERS + place * len(_LAYER) for place, layer in enumerate(order)}
    return {_file(first[layer] + slot) for layer in layers for slot in range(len(_LAYER))}


def _file(index: int) -> str:
    return f"tensor{index:05d}_000"


@cache
def tensor_specs(config: GrokConfig) -> tuple[TensorSpec, ...]:
    """Every parameter of the model, in the order of `spec.index`.

    Source: the reference code's `jax.tree_util.tree_flatten` of its initial parameters (sorted
    module paths), which `tests/data/tensors.json` records for Grok-1.
    """
    sizes = {
        Axis.EMBED: config.emb_size,
        Axis.VOCAB: config.vocab_size,
        Axis.Q_HEADS: config.q_size,
        Axis.KV_HEADS: config.kv_size,
        Axis.FFN: config.ffn_size,
        Axis.EXPERTS: config.num_experts,
        Axis.ROUTES: config.num_experts,
    }
    slots: list[tuple[int | None, _Slot]] = [
        (None, _Slot("language_model/in_out_embed/embeddings", "embedding", (Axis.VOCAB, _E))),
        (None, _Slot("language_model/rms_norm/scale", "final_norm", (_E,))),
    ]
    slots += [(layer, slot) for layer in layer_order(config.num_layers) for slot in _LAYER]
    return tuple(
        TensorSpec(
            index=index,
            path=slot.path if layer is None else f"transformer/decoder_layer_{layer}/{slot.path}",
            name=slot.name if layer is None else f"layers.{layer}.{slot.name}",
            layer=layer,
            shape=tuple(sizes[axis] for axis in slot.axes),
            axes=slot.axes,
            scale_groups=slot.scale_groups,
        )
        for index, (layer, slot) in enumerate(slots)
    )
