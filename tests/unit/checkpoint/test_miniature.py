import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from grokctl.checkpoint.miniature import MINIATURE, train_tokenizer, write_miniature
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.release_files import file_nbytes
from grokctl.errors import UsageError
from grokctl.events import Advanced, Event, Finished, Stage, Started
from grokctl.model.config import GROK_1, GrokConfig
from grokctl.model.tensors import tensor_specs

SMALL = replace(MINIATURE, num_layers=1, emb_size=32, vocab_size=400)


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("home") / "miniature"
    write_miniature(root)
    return root


@pytest.fixture(scope="module")
def tokenizer(miniature) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(miniature / "tokenizer.model"))


def test_a_miniature_opens_as_a_release(miniature):
    opened = open_release(miniature)

    assert opened.config == MINIATURE
    assert len(opened.tensors) == 2 + 12 * 3
    assert opened.tokenizer == miniature / "tokenizer.model"
    assert opened.nbytes == sum(path.stat().st_size for path in (miniature / "ckpt-0").iterdir())


def test_the_files_returned_are_the_files_written(tmp_path):
    files = write_miniature(tmp_path, SMALL)

    assert sorted(files) == sorted(digests(tmp_path))
    assert len(files) == 14 + 2


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    write_miniature(tmp_path / "a", SMALL, seed=7)
    write_miniature(tmp_path / "b", SMALL, seed=7)

    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_another_seed_gives_other_weights_and_the_same_tokenizer(tmp_path):
    write_miniature(tmp_path / "a", SMALL, seed=7)
    write_miniature(tmp_path / "b", SMALL, seed=8)

    ours, theirs = digests(tmp_path / "a"), digests(tmp_path / "b")

    same = {name for name in ours if ours[name] == theirs[name]}
    assert same == {"config.json", "tokenizer.model"}


def test_row_parallel_tensors_have_eight_scale_rows(miniature):
    rows = {
        tensor.spec.name.split(".", 2)[-1]: tensor.scales.shape[-2]
        for tensor in open_release(miniature).tensors
        if tensor.scales is not None
    }

    assert rows == {
        "moe.gate": 1,
        "moe.down": 8,
        "moe.up": 1,
        "attention.key": 1,
        "attention.out": 8,
        "attention.query": 1,
        "attention.value": 1,
    }


def test_weights_and_scales_give_unit_outputs(miniature):
    for tensor in open_release(miniature).tensors:
        weight, scales = tensor.map()
        assert np.isfinite(weight.astype(np.float32)).all()
        if scales is None:
            continue
        *lead, inputs, outputs = weight.shape
        groups = scales.shape[-2]
        grouped = weight.astype(np.float32).reshape(*lead, groups, inputs // groups, outputs)
        matrix = (grouped * scales.astype(np.float32)[..., :, None, :]).reshape(weight.shape)

        gain = np.sqrt((matrix**2).sum(axis=-2).mean())

        assert 0.8 < gain < 1.2, tensor.spec.name
        assert (weight != weight[..., :1]).any()


def test_experts_and_layers_differ(miniature):
    tensors = {tensor.spec.name: tensor for tensor in open_release(miniature).tensors}

    first, _ = tensors["layers.0.moe.gate"].map()
    second, _ = tensors["layers.1.moe.gate"].map()

    assert (first != second).mean() > 0.9
    assert (first[0] != first[1]).mean() > 0.9


def test_config_json_uses_the_reference_codes_names(miniature):
    values = json.loads((miniature / "config.json").read_text())

    assert GrokConfig.from_dict(values) == MINIATURE
    assert values["emb_size"] == 128


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path):
    (tmp_path / "precious").write_text("x")

    with pytest.raises(UsageError, match="expected an empty folder"):
        write_miniature(tmp_path, SMALL)

    assert list(digests(tmp_path)) == ["precious"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")

    with pytest.raises(UsageError):
        write_miniature(tmp_path / "file", SMALL)


def test_an_empty_folder_is_written_into(tmp_path):
    write_miniature(tmp_path, SMALL, tokenizer=False)

    assert open_release(tmp_path).tokenizer is None


def test_progress_counts_the_bytes_of_the_tensors(tmp_path):
    seen: list[Event] = []
    total = sum(map(file_nbytes, tensor_specs(SMALL)))

    write_miniature(tmp_path, SMALL, tokenizer=False, observe=seen.append)

    assert seen[0] == Started(stage=Stage.MINIATURE, total=total)
    assert seen[-2:] == [
        Advanced(stage=Stage.MINIATURE, done=total),
        Finished(stage=Stage.MINIATURE),
    ]
    assert len(seen) == 2 + 14


# --- the tokenizer


def test_the_tokenizer_has_grok_1s_special_ids(tokenizer):
    assert tokenizer.vocab_size() == MINIATURE.vocab_size
    assert tokenizer.pad_id() == GROK_1.pad_token
    assert tokenizer.eos_id() == GROK_1.eos_token
    assert (
        len({tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()}) == 4
    )


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("The answer is forty-two.", id="english"),
        pytest.param("def f(x): return x + 1", id="code"),
        pytest.param("na\u00efve caf\u00e9 \u2013 d\u00e9j\u00e0 vu", id="accents"),
        pytest.param("\u4f60\u597d\uff0c\u4e16\u754c"[:2], id="chinese"),
        pytest.param("\u041f\u0440\u0438\u0432\u0435\u0442", id="cyrillic"),
        pytest.param("\U0001f680", id="emoji"),
        pytest.param("\u05e9\u05dc\u05d5\u05dd", id="hebrew"),
        pytest.param("", id="nothing"),
    ],
)
def test_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text)

    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_id() not in ids
    assert all(0 <= token < MINIATURE.vocab_size for token in ids)


def test_english_takes_fewer_tokens_than_characters(tokenizer):
    text = "The statement is executed when the module is imported."

    assert len(tokenizer.encode(text)) < len(text) / 2


def test_a_tokenizer_is_trained_to_the_size_of_the_vocabulary():
    model = train_tokenizer(SMALL)

    assert sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size() == 400
    assert model == train_tokenizer(SMALL)


def test_a_vocabulary_too_small_for_every_byte_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="vocabulary"):
        write_miniature(tmp_path / "miniature", replace(SMALL, vocab_size=300))

    assert not (tmp_path / "miniature").exists()
