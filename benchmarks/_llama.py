"""llama.cpp on a layer of ours, as GGUF without a loss: Q8_0 holds the released integers."""

import json
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.checkpoint.tensor_source import LogicalTensor

Peer = Callable[[], float] | None
"""Measures tokens a second of another program, if it is there."""
BLOCK: Final = 32
"""Integers that share a scale in Q8_0."""
Q8_0: Final = np.dtype([("scale", "<f2"), ("codes", "i1", BLOCK)])
FLOAT32, QUANTIZED = 0, 8
"""Types of tensors."""
UINT32, REAL32, TEXT = 4, 6, 8
"""Types of metadata."""
ALIGNMENT: Final = 32
STRIP: Final = 2048
"""Outputs that are turned at a time."""
NAMES: Final = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "norms.pre_attention": "attn_norm",
    "norms.post_attention": "attn_output_norm",
    "norms.pre_moe": "ffn_norm",
    "norms.post_moe": "layer_output_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.out": "attn_output",
    "router": "ffn_gate_inp",
    "moe.gate": "ffn_gate_exps",
    "moe.up": "ffn_up_exps",
    "moe.down": "ffn_down_exps",
}


def llama(program: Path, ready: ReadyCheckpoint, model: Path) -> tuple[Peer, Peer]:
    """What measures its tokens a second, for decoding and for a prompt of 64.

    llama-bench, which is built beside every llama-cli, needs no tokenizer. Embeddings are asked for
    because otherwise all tokens but the last skip the experts of the last layer.

    Args:
        program: llama-cli, or llama-bench itself.
        ready: An int8 checkpoint of one device.
        model: Where to write it again.

    Returns:
        Nothing if it cannot be run, which is then said.
    """
    bench = program.with_name("llama-bench")
    command = [str(bench), "-m", str(model), "-r", "1", "-o", "json"]
    command += ["-t", str(os.cpu_count()), "-lm", "none"]

    def measure(*test: str) -> float:
        process = subprocess.run([*command, *test], capture_output=True, check=True)
        (found,) = json.loads(process.stdout)
        return float(found["avg_ts"])

    decodes = partial(measure, "-p", "0", "-n", "16")
    try:
        subprocess.run([bench, "--help"], capture_output=True, check=True)
        write_gguf(model, ready)
        decodes()
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", b"") or b"").decode().splitlines()
        print(f"llama.cpp is left out: {error}", *lines[-1:])
        return None, None
    return decodes, partial(measure, "-p", "64", "-n", "0", "-embd", "1")


def write_gguf(path: Path, ready: ReadyCheckpoint) -> None:
    """Write all layers of a checkpoint of one device.

    llama.cpp has `(outputs, inputs)` with a float16 scale for every 32 inputs: that of the group
    in which they lie. Activations are not the same as the reference's: it renormalises gates.
    """
    weights = [tensor for tensor in ready.storage.tensors if not tensor.is_scales]
    with path.open("xb") as file:
        pairs, offset = list(_metadata(ready)), 0
        header = [struct.pack("<4sIQQ", b"GGUF", 3, len(weights), len(pairs)), *pairs]
        for spec in (tensor.spec for tensor in weights):
            kind = QUANTIZED if spec.is_quantized else FLOAT32
            lead, turned = spec.shape[:-2], spec.shape[-2:][::-1]
            shape = spec.shape if spec.name == "embedding" else (*lead, *turned)
            sizes = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)
            header.append(_text(_name(spec.name)) + sizes)
            count = int(np.prod(shape))
            nbytes = count // BLOCK * Q8_0.itemsize if spec.is_quantized else 4 * count
            offset += nbytes + -nbytes % ALIGNMENT
        file.write(b"".join(header))
        for tensor in weights:
            file.write(bytes(-file.tell() % ALIGNMENT))
            for part in _parts(ready, tensor):
                file.write(part)
        file.write(bytes(-file.tell() % ALIGNMENT))


def _parts(ready: ReadyCheckpoint, tensor: LogicalTensor) -> Iterator[NDArray[Any]]:
    weight = _whole(ready, tensor)
    if not tensor.spec.is_quantized:
        is_turned = tensor.spec.name.endswith("router")
        yield np.ascontiguousarray(weight.T if is_turned else weight)
        return
    scales = _whole(ready, ready.storage.scales(tensor.spec))
    outputs = weight.shape[-1]
    experts = zip(
        weight.reshape(-1, weight.shape[-2], outputs),
        scales.reshape(-1, scales.shape[-2], outputs),
        strict=True,
    )
    for codes, scale in experts:
        for low in range(0, outputs, STRIP):
            yield _blocks(codes[:, low : low + STRIP], scale[:, low : low + STRIP])


def _blocks(codes: NDArray[np.int8], scales: NDArray[Any]) -> NDArray[Any]:
    """Q8_0 of some outputs."""
    blocks = np.empty((codes.shape[1], codes.shape[0] // BLOCK), Q8_0)
    blocks["codes"] = np.asarray(_turned(np.ascontiguousarray(codes)))
    blocks["scale"] = np.repeat(scales.T.astype(np.float16), blocks.shape[1] // len(scales), axis=1)
    return blocks


@jax.jit
def _turned(codes: jax.Array) -> jax.Array:
    """Blocks of every output; ten times as fast as numpy's."""
    return codes.T.reshape(codes.shape[1], -1, BLOCK)


def _whole(ready: ReadyCheckpoint, tensor: LogicalTensor) -> NDArray[Any]:
    return ready.read(tensor, tuple((0, length) for length in tensor.shape))


def _name(name: str) -> str:
    if not name.startswith("layers."):
        return f"{NAMES[name]}.weight"
    _, layer, slot = name.split(".", 2)
    return f"blk.{layer}.{NAMES[slot]}.weight"


def _metadata(ready: ReadyCheckpoint) -> Iterator[bytes]:
    config = ready.config
    yield _pair("general.architecture", "grok")
    yield _pair("tokenizer.ggml.model", "none")
    for name, value in {
        "vocab_size": config.vocab_size,
        "context_length": config.sequence_len,
        "embedding_length": config.emb_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.ffn_size,
        "attention.head_count": config.num_q_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_selected_experts,
    }.items():
        yield _pair(f"grok.{name}", value)


def _pair(key: str, value: str | float) -> bytes:
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", TEXT) + _text(value)
    kind, code = (REAL32, "f") if isinstance(value, float) else (UINT32, "I")
    return _text(key) + struct.pack(f"<I{code}", kind, value)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()
