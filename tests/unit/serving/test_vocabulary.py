"""Names of tokens are unique enough to tell them apart, and offsets lead to their texts."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokctl.checkpoint.miniature import MINIATURE, train_tokenizer
from grokctl.inference.generation import PromptScores, Token
from grokctl.model.tokenizer import Tokenizer
from grokctl.serving.logprobs import Logprobs, TokenNames, of_prompt, of_token
from grokctl.serving.vocabulary import Vocabulary, aligned

SIZE = 600
TEXTS = st.text(st.sampled_from("the sa\n é😀日<▁"), max_size=20)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Vocabulary:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(replace(MINIATURE, vocab_size=512)))
    return Vocabulary(path, Tokenizer(path, vocab_size=SIZE), size=SIZE)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("<0x0A>", "\n"),
        ("<0x41>", "A"),
        ("<0xE2>", "bytes:\\xe2"),
        ("</s>", "</s>"),
        ("▁the", " the"),
    ],
)
def test_a_token_has_the_name_of_its_piece(words, text, name):
    token = words._pieces.index(text)

    assert words.name(token) == name


def test_an_id_without_a_piece_is_its_number(words):
    assert words.name(SIZE - 1) == f"token_id:{SIZE - 1}"
    assert words.bytes_of(SIZE - 1) == words.bytes_of(2) == []
    assert words.bytes_of(words._pieces.index("▁the")) == list(b" the")


@given(text=TEXTS)
def test_bytes_of_tokens_are_those_of_the_text(words, text):
    ids = words.tokenizer.encode(text)

    assert bytes(byte for token in ids for byte in words.bytes_of(token)).decode().lstrip() == (
        text.replace("▁", " ").lstrip()
    )


@given(text=TEXTS)
def test_offsets_are_where_tokens_begin(words, text):
    ids = words.tokenizer.encode(text)
    offsets = words.offsets(ids, text)

    assert len(offsets) == len(ids)
    assert offsets == sorted(offsets)
    ends = [*offsets, len(text)][1:]
    for token, begin, end in zip(ids, offsets, ends, strict=True):
        piece = words.name(token).strip()
        if not piece.startswith("bytes:") and end > begin and "▁" not in text:
            assert text[begin:end].strip() == piece


@pytest.mark.parametrize(
    ("text", "decoded", "places"),
    [
        ("  the sea", "the sea", [2, 3, 4, 5, 6, 7, 8, 9]),
        ("a  b", "a b", [0, 1, 3, 4]),
        ("ab", "a b", [0, 1, 2, 2]),
    ],
)
def test_offsets_count_the_spaces_that_tokens_have_lost(text, decoded, places):
    assert aligned(decoded, text) == places


def test_a_control_token_is_encoded_by_its_name_alone(words):
    assert words.encode("</s>") == [2]
    assert len(words.encode("</s>a")) > 1
    assert words.encode("a") == words.tokenizer.encode("a")


def test_text_that_may_still_change_is_not_certain(words):
    ids = words.tokenizer.encode("a😀")

    assert words.certain_text(ids) == "a😀"
    assert words.certain_text(ids[:-1]) == "a"


def test_equal_names_are_told_apart(words):
    piece = words._pieces.index("a")
    byte = words._pieces.index("<0x61>")
    names = TokenNames(vocabulary=words, with_ids=True)
    token = Token(byte, "a", -3.0, ((piece, -1.0), (byte, -2.0)))

    columns = names.add(Logprobs(), [of_token(token, 7)])

    assert columns.tokens == ["a"]
    assert columns.top_logprobs == [{"a": -1.0, f"token_id:{byte}": -2.0}]
    assert columns.token_logprobs == [-2.0]  # that of the list, to the last digit
    assert columns.text_offset == [7]
    (entry,) = columns.content
    assert (entry["id"], entry["logprob"], entry["bytes"]) == (byte, -2.0, [97])
    assert [each["id"] for each in entry["top_logprobs"]] == [piece, byte]


def test_a_token_that_is_none_of_the_likeliest_is_added():
    names = TokenNames(vocabulary=None)
    token = Token(9, "", float("-inf"), ((4, -1.0),))

    columns = names.add(Logprobs(), [of_token(token, 0)])

    assert columns.top_logprobs == [{"token_id:4": -1.0, "token_id:9": -9999.0}]
    assert columns.token_logprobs == [-9999.0]
    assert columns.content == []


def test_scores_of_a_prompt_come_in_parts():

    def part(start, values):
        count = len(values)
        return PromptScores(
            start,
            np.array(values, np.float32),
            np.arange(3 * count, dtype=np.int32).reshape(count, 3),
            np.full((count, 3), -1, np.float32),
        )

    scored = of_prompt([5, 6, 7, 8], [part(1, [-1, -2]), part(3, [-4])], [0, 2, 4, 6], count=2)

    assert [each.id for each in scored] == [5, 6, 7, 8]
    assert [each.logprob for each in scored] == [None, -1, -2, -4]
    assert [each.offset for each in scored] == [0, 2, 4, 6]
    assert scored[2].top == [(3, -1.0), (4, -1.0)]
