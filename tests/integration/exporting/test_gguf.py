"""GGUF exports: the released integers and scales, under llama.cpp's names."""

import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from cuts import contents, cut
from exports import WIDE, exported, gguf_of, plain, tensors_in

from grokctl.checkpoint.blocks import BLOCK
from grokctl.checkpoint.frames import Compression
from grokctl.checkpoint.gguf import TensorType, read_gguf
from grokctl.checkpoint.gguf_checkpoint import open_gguf
from grokctl.checkpoint.miniature import write_miniature
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.ready import open_ready
from grokctl.checkpoint.release import open_release
from grokctl.errors import InvalidValueError, PlacementError, UsageError
from grokctl.exporting.options import EmbeddingType, ExportOptions, ExportType, Format
from grokctl.exporting.plan import plan_export
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision

NAMES = {
    "moe.gate": "ffn_gate_exps",
    "moe.down": "ffn_down_exps",
    "moe.up": "ffn_up_exps",
    "attention.key": "attn_k",
    "attention.out": "attn_output",
    "attention.query": "attn_q",
    "attention.value": "attn_v",
    "norms.pre_attention": "attn_norm",
    "norms.post_attention": "attn_output_norm",
    "norms.pre_moe": "ffn_norm",
    "norms.post_moe": "layer_output_norm",
    "router": "ffn_gate_inp",
}
"""As llama.cpp's own converter has them."""
SIZED = {"max_memory": 10**6, "jobs": 1}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = tmp_path_factory.mktemp("release") / "wide"
    write_miniature(root, WIDE)
    return open_release(root)


@pytest.fixture(scope="module")
def whole(release, tmp_path_factory):
    """The Q8_0 export, not to be changed."""
    return exported(release, tmp_path_factory.mktemp("whole") / "out")


def released(release):
    """What every parameter of a release means, by llama.cpp's name."""
    values = {}
    for tensor in release.tensors:
        weight, scales = tensor.map()
        spec = tensor.spec
        wide = np.array(weight).astype(np.float32)
        if scales is not None:
            repeats = weight.shape[-2] // scales.shape[-2]
            wide *= np.repeat(np.array(scales).astype(np.float32), repeats, axis=-2)
        if wide.ndim > 1 and spec.name != "embedding":
            wide = np.swapaxes(wide, -1, -2)
        name = {"embedding": "token_embd", "final_norm": "output_norm"}.get(spec.name)
        if name is None:
            _, layer, slot = spec.name.split(".", 2)
            name = f"blk.{layer}.{NAMES[slot]}"
        values[f"{name}.weight"] = wide
    return values


@pytest.mark.parametrize("mesh", [None, MeshShape(1, 1), MeshShape(1, 4)], ids=str)
@pytest.mark.parametrize("max_memory", [10**6, 10**9])
def test_few_outputs_at_a_time_make_the_same_file(
    release, whole, tmp_path, monkeypatch, mesh, max_memory
):
    source = release
    if mesh is not None:
        source = open_ready(cut(release, mesh, tmp_path / "ready").root, is_streamed=True)
    monkeypatch.setattr("grokctl.exporting.tensors._WIDE", 24)

    made = exported(source, tmp_path / "out", max_memory=max_memory, jobs=3)

    assert gguf_of(made)[0].read_bytes() == gguf_of(whole)[0].read_bytes()


def test_matrices_are_held_where_they_leave_half_of_the_memory(release, tmp_path):
    def planned(max_memory, jobs=2):
        return plan_export(
            release,
            ExportOptions(
                out=tmp_path / "out",
                format=Format.GGUF,
                type=ExportType.Q8_0,
                embedding=EmbeddingType.F32,
                name="wide",
                max_memory=max_memory,
                jobs=jobs,
            ),
        )

    largest = WIDE.emb_size * WIDE.ffn_size

    assert planned(4 * largest - 1).held_nbytes == 0
    assert planned(4 * largest).held_nbytes == 2 * largest
    assert planned(10**9, jobs=6).held_nbytes == 4 * largest
    # among these, what is held decides whether there is memory for a second thread
    plans = {memory: planned(memory) for memory in range(33 * 10**6, 38 * 10**6, 2 * 10**5)}
    assert {plan.jobs for plan in plans.values()} == {1, 2}
    for memory, plan in plans.items():
        assert plan.held_nbytes
        assert plan.peak_bytes <= memory


def test_every_value_is_the_released_integer_times_its_scale(release, whole):
    found, wanted = tensors_in(*gguf_of(whole)), released(release)

    assert found.keys() == wanted.keys()
    for name, (kind, stored) in found.items():
        np.testing.assert_array_equal(plain(kind, stored), wanted[name], err_msg=name)
        is_quantized = re.search(r"attn_[qkv]|attn_output\.|exps", name) is not None
        assert kind is (TensorType.Q8_0 if is_quantized else TensorType.F32), name
    assert whole.manifest.is_lossless


def test_the_file_is_as_llama_cpp_wants_it(whole):
    (path,) = gguf_of(whole)
    header = read_gguf(path)

    assert path.name == "wide-q8_0.gguf"
    names = [tensor.name for tensor in header.tensors]
    assert names[:3] == ["token_embd.weight", "output_norm.weight", "blk.0.attn_norm.weight"]
    layers = [int(name.split(".")[1]) for name in names[2:]]
    assert layers == sorted(layers)
    metadata = header.metadata
    assert next(iter(metadata)) == "general.architecture"
    expected = {
        "general.architecture": "grok",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "grok.block_count": 11,
        "grok.context_length": WIDE.sequence_len,
        "grok.embedding_length": 256,
        "grok.feed_forward_length": 512,
        "grok.attention.head_count": 16,
        "grok.attention.head_count_kv": 8,
        "grok.expert_count": 2,
        "grok.expert_used_count": 2,
        "grok.rope.dimension_count": 16,
        "grok.vocab_size": 512,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
    }
    assert {key: metadata[key] for key in expected} == expected
    for key, value in {
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000,
        "attn_logit_softcapping": 30,
        "attention.output_scale": WIDE.attn_output_multiplier,
        "embedding_scale": WIDE.embedding_multiplier_scale,
        "logit_scale": WIDE.output_multiplier_scale,
    }.items():
        assert metadata[f"grok.{key}"] == np.float32(value), key
    assert len(metadata["tokenizer.ggml.tokens"]) == 512
    absent = {"general.license", "tokenizer.chat_template", "grok.attention.key_length"}
    assert not absent & metadata.keys()


@pytest.mark.parametrize(
    ("kind", "dtype"), [("bf16", BFLOAT16), ("f32", np.float32)], ids=["bf16", "f32"]
)
def test_floats_are_rounded_once_or_never(release, tmp_path, kind, dtype):
    made = exported(release, tmp_path / "out", kind)

    wanted = released(release)
    for name, (own, stored) in tensors_in(*gguf_of(made)).items():
        is_weight = own is TensorType.BF16
        values = wanted[name].astype(dtype if is_weight else np.float32).astype(np.float32)
        np.testing.assert_array_equal(plain(own, stored), values, err_msg=name)
        assert is_weight == (name in made.manifest.errors)
    assert made.manifest.is_lossless == (kind == "f32")


def test_q4_0_from_int4_is_exact(release, tmp_path):
    ready = cut(
        release, MeshShape(1, 2), tmp_path / "int4", precision=Precision.INT4, group_size=32
    )

    made = exported(open_ready(ready.root, is_streamed=True), tmp_path / "out", "q4_0")
    direct = exported(release, tmp_path / "direct", "q4_0")

    found = tensors_in(*gguf_of(made))
    assert made.manifest.is_lossless
    assert TensorType.Q4_0 in {kind for kind, _ in found.values()}
    for spec in (tensor.spec for tensor in release.tensors if tensor.spec.is_quantized):
        weight = ready.storage.weight(spec)
        codes = ready.read(weight, tuple((0, n) for n in weight.shape))
        own = ready.storage.scales(spec)
        scales = ready.read(own, tuple((0, n) for n in own.shape)).astype(np.float32)
        pairs = np.stack([codes & 15, codes >> 4], axis=-2).astype(np.int8) - 8
        integers = pairs.reshape(*spec.shape).astype(np.float32)
        values = np.swapaxes(integers * np.repeat(scales, 32, axis=-2), -1, -2)
        _, layer, slot = spec.name.split(".", 2)
        kind, stored = found[f"blk.{layer}.{NAMES[slot]}.weight"]
        np.testing.assert_array_equal(plain(kind, stored), values)
    assert [hashlib.sha256(path.read_bytes()).digest() for path in gguf_of(direct)] == [
        hashlib.sha256(path.read_bytes()).digest() for path in gguf_of(made)
    ]
    assert all(0 < error < 0.15 for error in direct.manifest.errors.values())
    assert len(direct.manifest.errors) == 7 * 11


@pytest.mark.parametrize("embedding", ["bf16", "q8_0"])
def test_another_type_of_the_embedding_says_what_it_loses(release, tmp_path, embedding):
    made = exported(release, tmp_path / "out", embedding=embedding)

    kind, stored = tensors_in(*gguf_of(made))["token_embd.weight"]
    values = released(release)["token_embd.weight"]
    found = plain(kind, stored)
    error = float(np.sqrt(((found - values) ** 2).sum() / (values**2).sum()))
    assert kind.name == embedding.upper()
    assert made.manifest.errors == {"token_embd.weight": pytest.approx(error, rel=0.01)}


@pytest.mark.parametrize(
    "options", [SIZED, {"max_memory": 10**8, "jobs": 3}], ids=["small", "large"]
)
def test_the_bytes_do_not_depend_on_memory_or_threads(release, whole, tmp_path, options):
    made = exported(release, tmp_path / "out", **options)

    assert contents(made.root) == contents(whole.root)


@pytest.mark.parametrize("mesh", [MeshShape(1, 1), MeshShape(2, 4)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"compression": Compression(1)}], ids=["plain", "compressed"]
)
def test_a_ready_checkpoint_of_any_mesh_gives_the_same_bytes(
    release, whole, tmp_path, mesh, options
):
    ready = cut(release, mesh, tmp_path / "ready", **options)

    made = exported(open_ready(ready.root, is_streamed=True), tmp_path / "out", **SIZED)

    assert [path.read_bytes() for path in gguf_of(made)] == [
        path.read_bytes() for path in gguf_of(whole)
    ]
    assert made.source.name == "wide"


def test_several_files_have_the_same_tensors(release, whole, tmp_path):
    made = exported(release, tmp_path / "out", split=3 * 10**6)

    paths = gguf_of(made)
    count = len(paths)
    assert count > 3
    assert [path.name for path in paths] == [
        f"wide-q8_0-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)
    ]
    (single,) = gguf_of(whole)
    found, wanted = tensors_in(*paths), tensors_in(single)
    assert list(found) == list(wanted)
    for name, (kind, stored) in found.items():
        assert (kind, stored.tobytes()) == (wanted[name][0], wanted[name][1].tobytes())
    for number, path in enumerate(paths):
        header = read_gguf(path)
        assert sum(tensor.padded_nbytes for tensor in header.tensors) <= 3 * 10**6
        for key, value in (
            ("split.no", np.uint16(number)),
            ("split.count", np.uint16(count)),
            ("split.tensors.count", np.int32(len(wanted))),
        ):
            assert (header.metadata[key], header.metadata[key].dtype) == (value, value.dtype)
        assert ("general.architecture" in header.metadata) == (number == 0)


def test_a_file_is_not_smaller_than_a_tensor(release, tmp_path):
    with pytest.raises(InvalidValueError, match="the size of token_embd"):
        exported(release, tmp_path / "out", split=1000)

    assert not list(tmp_path.iterdir())


def test_the_folder_has_sums_a_manifest_and_the_tokenizer(whole):
    assert {path.name for path in whole.root.iterdir()} == {
        "wide-q8_0.gguf",
        "tokenizer.model",
        "SHA256SUMS",
        "grokctl-export.json",
        ".grokctl",
    }
    sums = dict(
        reversed(line.split("  ")) for line in (whole.root / "SHA256SUMS").read_text().splitlines()
    )
    own = contents(whole.root)
    del own["SHA256SUMS"]
    assert sums == own
    values = json.loads((whole.root / "grokctl-export.json").read_text())
    assert values["source"]["name"] == "wide"
    assert not values["source"]["proven"]
    assert values["lossless"] is True
    assert values["config"] == WIDE.to_dict()


def test_an_existing_folder_is_never_replaced(release, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis").write_text("mine")

    with pytest.raises(UsageError, match="exists") as caught:
        exported(release, out)

    assert contents(out) == {"thesis": hashlib.sha256(b"mine").hexdigest()}
    assert caught.value.hint is not None
    assert f"--out {tmp_path / 'out-2'}" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_is_never_replaced(release, whole):
    before = contents(whole.root)

    with pytest.raises(UsageError, match="exists"):
        exported(release, whole.root)

    assert contents(whole.root) == before


def test_a_model_that_llama_cpp_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    write_miniature(tmp_path / "narrow", replace(WIDE, num_layers=1, key_size=32), tokenizer=False)

    with pytest.raises(PlacementError, match="expected heads as wide together as the embedding"):
        exported(open_release(tmp_path / "narrow"), tmp_path / "out")

    assert [path.name for path in tmp_path.iterdir()] == ["narrow"]


def test_inputs_that_are_no_whole_blocks_are_float32(tmp_path):
    config = replace(WIDE, num_layers=1, emb_size=128, key_size=8, vocab_size=50)
    write_miniature(tmp_path / "narrow", config, tokenizer=False)
    release = open_release(tmp_path / "narrow")
    assert config.ffn_size // 8 % BLOCK == 0

    made = exported(release, tmp_path / "out")

    assert made.manifest.float32 == ("layers.0.attention.out",)
    assert made.manifest.is_lossless
    found, wanted = tensors_in(*gguf_of(made)), released(release)
    assert found["blk.0.attn_output.weight"][0] is TensorType.F32
    for name, (kind, stored) in found.items():
        np.testing.assert_array_equal(plain(kind, stored), wanted[name], err_msg=name)
    with pytest.raises(PlacementError, match=r"found layers\.0\.attention\.out as float32"):
        open_gguf(made.root)


def test_q8_0_needs_the_released_integers(release, tmp_path):
    ready = cut(release, MeshShape(1, 1), tmp_path / "bf16", precision=Precision.BFLOAT16)

    with pytest.raises(PlacementError, match="no longer hold them"):
        exported(open_ready(ready.root), tmp_path / "out", "q8_0")
    assert exported(open_ready(ready.root), tmp_path / "out", "bf16").manifest.is_lossless


def test_a_part_of_a_checkpoint_is_not_exported(release, tmp_path):
    part = cut(release, MeshShape(1, 2), tmp_path / "part", devices=frozenset({0}))

    with pytest.raises(UsageError, match="device"):
        exported(open_ready(part.root, is_streamed=True), tmp_path / "out")
