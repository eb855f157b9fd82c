"""Exports in Hugging Face's layout: names, shapes and configuration that SGLang and vLLM expect."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from cuts import contents
from exports import WIDE, exported
from safetensors import safe_open

from grokctl.checkpoint.miniature import write_miniature
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.release import open_release
from grokctl.errors import PlacementError
from grokctl.inspect import inspect
from grokctl.model.config import GROK_1
from grokctl.model.tensors import tensor_specs
from grokctl.verify import verify

CONFIG = replace(WIDE, num_layers=11, key_size=32, attn_output_multiplier=32**-0.5)
"""Heads need not be as wide as the embedding here."""
LAYER = {
    "self_attn.q_proj.weight": ("attention.query", (512, 256)),
    "self_attn.k_proj.weight": ("attention.key", (256, 256)),
    "self_attn.v_proj.weight": ("attention.value", (256, 256)),
    "self_attn.o_proj.weight": ("attention.out", (256, 512)),
    "block_sparse_moe.gate.weight": ("router", (2, 256)),
    "block_sparse_moe.experts.E.w1.weight": ("moe.gate", (512, 256)),
    "block_sparse_moe.experts.E.w3.weight": ("moe.up", (512, 256)),
    "block_sparse_moe.experts.E.w2.weight": ("moe.down", (256, 512)),
    "pre_attn_norm.weight": ("norms.pre_attention", (256,)),
    "post_attn_norm.weight": ("norms.post_attention", (256,)),
    "pre_moe_norm.weight": ("norms.pre_moe", (256,)),
    "post_moe_norm.weight": ("norms.post_moe", (256,)),
}
"""As SGLang 0.5.23's `srt/models/grok.py` names them, and the parameter and shape of each."""


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = tmp_path_factory.mktemp("release") / "wide"
    write_miniature(root, CONFIG)
    return open_release(root)


@pytest.fixture(scope="module")
def whole(release, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    return exported(release, out, "bf16", form="hf", embedding="bf16", split=5 * 10**6)


def expected(release):
    """Every tensor by its name: what it means, and its shape."""
    values = {}
    for tensor in release.tensors:
        weight, scales = tensor.map()
        wide = np.array(weight).astype(np.float32)
        if scales is not None:
            repeats = weight.shape[-2] // scales.shape[-2]
            wide *= np.repeat(np.array(scales).astype(np.float32), repeats, axis=-2)
        values[tensor.spec.name] = wide
    named = {
        "model.embed_tokens.weight": values["embedding"],
        "lm_head.weight": values["embedding"],
        "model.norm.weight": values["final_norm"],
    }
    for layer in range(CONFIG.num_layers):
        for name, (slot, shape) in LAYER.items():
            own = values[f"layers.{layer}.{slot}"]
            for expert in range(CONFIG.num_experts) if "E" in name else [None]:
                one = own if expert is None else own[expert]
                one = one.T if one.ndim > 1 else one
                assert one.shape == shape
                named[f"model.layers.{layer}.{name.replace('E', str(expert))}"] = one
    return named


def as_float32(path, name):
    """One tensor, read without torch."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])[name]
    begin, end = (8 + length + place for place in entry["data_offsets"])
    dtype = {"BF16": BFLOAT16, "F32": np.dtype("<f4")}[entry["dtype"]]
    return np.frombuffer(data[begin:end], dtype).reshape(entry["shape"]).astype(np.float32)


def test_every_tensor_has_its_name_and_is_rounded_once(release, whole):
    index = json.loads((whole.root / "model.safetensors.index.json").read_text())
    wanted = expected(release)

    assert index["weight_map"].keys() == wanted.keys()
    total = 0
    for name, file in index["weight_map"].items():
        values = wanted[name]
        is_float32 = re.search("norm|moe.gate", name) is not None
        if not is_float32:
            values = values.astype(BFLOAT16).astype(np.float32)
        np.testing.assert_array_equal(as_float32(whole.root / file, name), values, err_msg=name)
        total += values.size * (4 if is_float32 else 2)
    assert index["metadata"]["total_size"] == total


def test_the_files_are_plain_safetensors_files_by_number(whole):
    files = sorted(path.name for path in whole.root.glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]

    names = []
    for file in files:
        with safe_open(whole.root / file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
            names += opened.keys()
        assert (whole.root / file).stat().st_size < 5.1 * 10**6
    assert len(names) == len(set(names)) == 3 + 11 * (9 + 3 * 2)


def test_one_file_has_the_usual_name(release, tmp_path):
    made = exported(release, tmp_path / "out", "f32", form="hf")

    assert [path.name for path in made.root.glob("*.safetensors")] == ["model.safetensors"]
    assert made.manifest.is_lossless
    config = json.loads((made.root / "config.json").read_text())
    assert config["torch_dtype"] == "float32"


def test_the_configuration_is_what_the_loaders_read(whole):
    config = json.loads((whole.root / "config.json").read_text())

    expected = {
        "architectures": ["Grok1ModelForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 11,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 32,
        "num_local_experts": 2,
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "vocab_size": 512,
        "max_position_embeddings": CONFIG.sequence_len,
        "attn_logit_softcapping": 30.0,
        "router_logit_softcapping": 0,
        "moe_router_renormalize": False,
        "load_presharded_moe": False,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "embedding_multiplier_scale": CONFIG.embedding_multiplier_scale,
        "output_multiplier_scale": CONFIG.output_multiplier_scale,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    assert {key: config[key] for key in expected} == expected
    assert not {"attn_output_multiplier", "residual_moe", "auto_map"} & config.keys()
    generation = json.loads((whole.root / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def test_the_folder_has_what_loaders_and_people_need(whole):
    names = {path.name for path in whole.root.iterdir() if path.suffix != ".safetensors"}

    assert names == {
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "README.md",
        "SHA256SUMS",
        "grokctl-export.json",
        ".grokctl",
    }
    card = (whole.root / "README.md").read_text()
    assert "# wide" in card
    assert "license: other" in card
    verdict = verify(whole.root, rehash=True)
    assert (verdict.damage, verdict.hashed) == ((), whole.nbytes)


def test_inspect_lists_every_tensor(whole):
    rows = {row.name: row for row in inspect(whole.root).rows}

    assert len(rows) == 3 + 11 * (9 + 3 * 2)
    row = rows["model.layers.10.block_sparse_moe.experts.1.w2.weight"]
    assert (row.shape, row.dtype, row.kind) == ((256, 512), "BF16", "experts")
    assert rows["lm_head.weight"].kind == "embedding"
    total = sum(math.prod(spec.shape) for spec in tensor_specs(CONFIG))
    assert sum(row.parameters for row in rows.values()) == total  # the head is a copy


def test_the_bytes_do_not_depend_on_memory_or_threads(release, whole, tmp_path):
    made = exported(
        release,
        tmp_path / "out",
        "bf16",
        form="hf",
        embedding="bf16",
        split=5 * 10**6,
        max_memory=10**6,
        jobs=1,
    )

    assert contents(made.root) == contents(whole.root)


def test_another_scale_of_the_attention_is_refused(tmp_path):
    write_miniature(tmp_path / "other", replace(WIDE, num_layers=1), tokenizer=False)

    with pytest.raises(PlacementError, match=r"expected attn_output_multiplier 0\.25, found"):
        exported(open_release(tmp_path / "other"), tmp_path / "out", "bf16", form="hf")

    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(("kind", "embedding"), [("q8_0", "bf16"), ("bf16", "q8_0")])
def test_blocks_are_refused(release, tmp_path, kind, embedding):
    with pytest.raises(PlacementError, match="expected bf16 or f32"):
        exported(release, tmp_path / "out", kind, form="hf", embedding=embedding)


def test_the_scale_of_grok_1_is_the_usual_one():
    assert GROK_1.attn_output_multiplier == pytest.approx(GROK_1.key_size**-0.5, rel=1e-9)
