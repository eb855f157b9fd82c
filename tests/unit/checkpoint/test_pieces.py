"""The pieces of sentencepiece models, and what GGUF says about them."""

import io
from functools import cache

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from grokctl.checkpoint.gguf_tokenizer import tokenizer_metadata
from grokctl.checkpoint.pieces import PieceType, parse_pieces
from grokctl.errors import CorruptCheckpointError

LIKE_GROK_1 = ["\n" * 2, "\n", *"0123456789", "\t", "  ", "<|separator|>"]


@cache
def model() -> bytes:
    """A small model with user-defined pieces like Grok-1's."""
    out = io.BytesIO()
    words = ["a quick brown fox", "jumps over\tthe lazy dog", "while it rains", "é and ü"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20),
        model_writer=out,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=LIKE_GROK_1,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def test_pieces_are_those_of_sentencepiece():
    processor = sentencepiece.SentencePieceProcessor(model_proto=model())

    found = parse_pieces(model())

    assert len(found.pieces) == processor.vocab_size() == 340
    for number, piece in enumerate(found.pieces):
        assert piece.text == processor.id_to_piece(number)
        assert piece.score == pytest.approx(processor.get_score(number))
        assert (piece.type is PieceType.CONTROL) == processor.is_control(number)
        assert (piece.type is PieceType.UNKNOWN) == processor.is_unknown(number)
        assert (piece.type is PieceType.BYTE) == processor.is_byte(number)
        assert (piece.type is PieceType.USER_DEFINED) == (piece.text in LIKE_GROK_1)
    assert (found.pad_id, found.begin_id, found.end_id, found.unknown_id) == (0, 1, 2, 3)
    assert found.has_dummy_prefix


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"\x0a\xff", b"\x0a\x02\x0a\x05", b"\xff" * 20])
def test_other_bytes_are_no_model(data):
    with pytest.raises(CorruptCheckpointError, match="no sentencepiece model"):
        parse_pieces(data)


@given(st.data())
def test_damage_ends_in_a_sentence_or_in_pieces(data):
    content = bytearray(model()[:2000])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))

    try:
        found = parse_pieces(bytes(content))
    except CorruptCheckpointError:
        return
    assert found.pieces


def test_newlines_tabs_spaces_and_digits_are_normal_pieces_and_markers_stay():
    found = parse_pieces(model())

    values = tokenizer_metadata(found, 343)

    types = dict(
        zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"], strict=True)
    )
    assert {types[text] for text in LIKE_GROK_1[:-1]} == {PieceType.NORMAL}
    assert types["<|separator|>"] == PieceType.USER_DEFINED
    assert types[found.pieces[1].text] == PieceType.CONTROL
    assert types["<0x0A>"] == PieceType.BYTE
    assert [types[f"[PAD{n}]"] for n in (340, 341, 342)] == [PieceType.UNUSED] * 3
    assert len(values["tokenizer.ggml.scores"]) == len(types) == 343
    assert values["tokenizer.ggml.scores"].dtype == np.float32
    assert values["tokenizer.ggml.unknown_token_id"] == 3
    assert not values["tokenizer.ggml.add_bos_token"]
    assert values["tokenizer.ggml.add_space_prefix"]


def test_a_tokenizer_of_a_larger_model_is_refused():
    with pytest.raises(CorruptCheckpointError, match="340 pieces, the model has 339"):
        tokenizer_metadata(parse_pieces(model()), 339)


def test_a_piece_longer_than_sentencepiece_makes_is_no_piece():
    def of(count):
        text = b"\x0a" + bytes([count & 127 | 128, count >> 7]) + b"a" * count
        return b"\x0a" + bytes([len(text) & 127 | 128, len(text) >> 7]) + text

    assert len(parse_pieces(of(512)).pieces[0].text) == 512
    with pytest.raises(CorruptCheckpointError, match="no sentencepiece model"):
        parse_pieces(of(513))
