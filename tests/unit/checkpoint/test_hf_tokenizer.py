"""`tokenizer.json`: runs grow as sentencepiece matches them, and nothing but markers is cut out."""

import json

from grokctl.checkpoint.hf_tokenizer import tokenizer_config, tokenizer_json
from grokctl.checkpoint.pieces import Pieces, PieceType, TokenPiece

TEXTS = [
    *(("[PAD]", PieceType.CONTROL), ("[BOS]", PieceType.CONTROL), ("[EOS]", PieceType.CONTROL)),
    ("[UNK]", PieceType.UNKNOWN),
    *(("\n" * count, PieceType.USER_DEFINED) for count in (1, 2, 3)),
    *(("0", PieceType.USER_DEFINED), ("  ", PieceType.USER_DEFINED)),
    *(("\t", PieceType.USER_DEFINED), ("\t\t", PieceType.USER_DEFINED)),
    ("<|separator|>", PieceType.USER_DEFINED),
    ("<0x00>", PieceType.BYTE),
    *((text, PieceType.NORMAL) for text in ("▁▁", "▁a", "▁ab", "▁", "a", "b", "ab")),
]
FIRST_NORMAL = 13


def pieces(*, has_dummy_prefix=True) -> Pieces:
    return Pieces(
        pieces=tuple(
            TokenPiece(text, -float(max(0, number - FIRST_NORMAL)), kind)
            for number, (text, kind) in enumerate(TEXTS)
        ),
        unknown_id=3,
        begin_id=1,
        end_id=2,
        pad_id=0,
        has_dummy_prefix=has_dummy_prefix,
    )


def test_runs_grow_first_and_then_normal_pieces_by_their_scores():
    values = json.loads(tokenizer_json(pieces()))

    assert values["model"]["merges"] == [
        ["\t", "\t"],
        ["\n\n", "\n"],
        ["\n", "\n"],
        ["▁", "▁"],
        ["▁", "a"],
        ["▁a", "b"],
        ["▁", "ab"],
        ["a", "b"],
    ]
    assert values["model"]["vocab"] == {text: number for number, (text, _) in enumerate(TEXTS)}
    assert (values["model"]["unk_token"], values["model"]["byte_fallback"]) == ("[UNK]", True)


def test_only_control_pieces_and_markers_are_cut_out_of_a_text():
    added = json.loads(tokenizer_json(pieces()))["added_tokens"]

    assert [(one["id"], one["content"], one["special"]) for one in added] == [
        (0, "[PAD]", True),
        (1, "[BOS]", True),
        (2, "[EOS]", True),
        (3, "[UNK]", True),
        (11, "<|separator|>", False),
    ]


def test_a_text_begins_with_a_space_if_the_model_says_so():
    for has_dummy_prefix in (True, False):
        values = json.loads(tokenizer_json(pieces(has_dummy_prefix=has_dummy_prefix)))
        kinds = [one["type"] for one in values["normalizer"]["normalizers"]]
        assert kinds == ["Prepend"] * has_dummy_prefix + ["Replace"]
        decoders = [one["type"] for one in values["decoder"]["decoders"]]
        assert ("Strip" in decoders) == has_dummy_prefix


def test_nothing_adds_a_beginning():
    values = json.loads(tokenizer_config(pieces(), 8192))

    assert values == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
    }
    assert json.loads(tokenizer_json(pieces()))["post_processor"] is None
