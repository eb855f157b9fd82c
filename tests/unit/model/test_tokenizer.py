from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.miniature import MINIATURE, train_tokenizer
from grokctl.errors import CorruptCheckpointError, Reason
from grokctl.model.tokenizer import Tokenizer

VOCABULARY = 512
BROKEN = "\ufffd"
BYTE_0 = 4
"""The piece of byte 0; those of the other bytes follow."""


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(replace(MINIATURE, vocab_size=VOCABULARY)))
    return path


@pytest.fixture(scope="session")
def tokenizer(model) -> Tokenizer:
    return Tokenizer(model, vocab_size=VOCABULARY)


def byte_tokens(data: bytes) -> list[int]:
    return [BYTE_0 + byte for byte in data]


def streamed(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> tuple[list[str], str]:
    stream = tokenizer.stream(prompt)
    return [stream.push(token) for token in tokens], stream.finish()


def assert_streams_as_a_whole(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> None:
    """Prompt and continuation are the whole text, piece by piece."""
    pieces, rest = streamed(tokenizer, prompt, tokens)
    before = tokenizer.decode(prompt)
    whole = tokenizer.decode(prompt + tokens)
    certain = before.rstrip(BROKEN)
    assert whole.startswith(certain)
    if certain == before:
        assert before + "".join(pieces) + rest == whole


# --- encoding and decoding


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("The import statement", id="words"),
        pytest.param("def f(x):\n\n    return {'a': [x,  2]}\t# one\r\n", id="code"),
        pytest.param("😀 👩‍👩‍👧‍👦 🏳️‍🌈", id="emoji"),
        pytest.param("中文 日本語 한국어", id="cjk"),
        pytest.param("naïve Ærøskøbing žluťoučký", id="accents"),
        pytest.param("مرحبا שלום", id="right-to-left"),
        pytest.param("a\x00b", id="zero-byte"),
        pytest.param("\U0010fffd", id="last-plane"),
    ],
)
def test_text_comes_back_from_its_tokens(tokenizer, text):
    tokens = tokenizer.encode(text)

    assert tokenizer.decode(tokens) == text
    assert all(0 <= token < VOCABULARY for token in tokens)


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=40))
@settings(deadline=None, max_examples=300)
def test_every_text_comes_back_from_its_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_one_character_that_means_a_space_comes_back_as_one(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_tokens_are_plain_numbers_without_begin_or_end_marks(tokenizer):
    tokens = tokenizer.encode("The import statement")

    assert {type(token) for token in tokens} == {int}
    assert not {0, 1, 2, 3} & set(tokens)


def test_ids_without_a_piece_say_nothing(model):
    tokenizer = Tokenizer(model, vocab_size=1000)
    tokens = tokenizer.encode("some words")

    assert tokenizer.decode([*tokens, 512, 999]) == "some words"
    assert tokenizer.decode([777]) == ""


def test_marks_say_nothing(tokenizer):
    tokens = tokenizer.encode("some words")

    assert tokenizer.decode([0, 1, *tokens, 2, 0]) == "some words"


# --- streaming


@given(prompt=st.text(min_size=1, max_size=20), text=st.text(max_size=40))
@settings(deadline=None, max_examples=300)
def test_streamed_text_is_the_text_of_the_whole(tokenizer, prompt, text):
    assert_streams_as_a_whole(tokenizer, tokenizer.encode(prompt), tokenizer.encode(text))


@given(text=st.text(max_size=60), data=st.data())
@settings(deadline=None, max_examples=200)
def test_a_text_may_be_cut_into_prompt_and_continuation_anywhere(tokenizer, text, data):
    tokens = tokenizer.encode(text)
    place = data.draw(st.integers(0, len(tokens)))

    assert_streams_as_a_whole(tokenizer, tokens[:place], tokens[place:])


@given(
    prompt=st.lists(st.integers(0, VOCABULARY - 1), max_size=12),
    tokens=st.lists(
        st.one_of(
            st.integers(0, VOCABULARY - 1),
            st.integers(0, 3),
            st.integers(BYTE_0, BYTE_0 + 255),
            st.sampled_from(byte_tokens("😀中é".encode())),
        ),
        max_size=40,
    ),
)
@settings(deadline=None, max_examples=500)
def test_any_tokens_stream_as_the_text_of_the_whole(tokenizer, prompt, tokens):
    assert_streams_as_a_whole(tokenizer, prompt, tokens)


@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters=BROKEN), min_size=1, max_size=12)
)
@settings(deadline=None, max_examples=200)
def test_half_a_character_is_never_said(tokenizer, text):
    tokens = byte_tokens(text.encode())
    pieces, rest = streamed(tokenizer, tokenizer.encode("word"), tokens)

    assert "".join(pieces) == text
    assert rest == ""
    assert BROKEN not in "".join(pieces)


@pytest.mark.parametrize("character", ["é", "中", "😀"])
def test_a_character_is_said_with_its_last_byte(tokenizer, character):
    tokens = byte_tokens(character.encode())

    pieces, rest = streamed(tokenizer, tokenizer.encode("word"), tokens)

    assert pieces == [""] * (len(tokens) - 1) + [character]
    assert rest == ""


@pytest.mark.parametrize("character", ["é", "中", "😀"])
def test_a_character_that_begins_in_the_prompt_is_not_lost(tokenizer, character):
    first, *others = byte_tokens(character.encode())

    pieces, rest = streamed(tokenizer, [*tokenizer.encode("word"), first], others)

    assert "".join(pieces) + rest == character


def test_a_broken_character_at_the_end_is_a_replacement_character(tokenizer):
    pieces, rest = streamed(tokenizer, tokenizer.encode("word"), byte_tokens("ok😀".encode()[:-1]))

    assert "".join(pieces) == "ok"
    assert rest == BROKEN * 3


@pytest.mark.parametrize("byte", [0x80, 0xFF, 0xC0])
def test_a_run_of_invalid_bytes_does_not_hold_text_back(tokenizer, byte):
    stream = tokenizer.stream(tokenizer.encode("word"))
    said = ""
    for count in range(1, 41):
        said += stream.push(BYTE_0 + byte)
        assert count - len(said) <= 3
    said += stream.push(BYTE_0 + ord("x"))

    assert said == BROKEN * 40 + "x"
    assert stream.finish() == ""


def test_a_character_after_invalid_bytes_is_whole(tokenizer):
    data = b"\x80\x80\x80" + "😀".encode() + b"\xff" + "中".encode()

    pieces, rest = streamed(tokenizer, tokenizer.encode("word"), byte_tokens(data))

    assert "".join(pieces) + rest == f"{BROKEN * 3}😀{BROKEN}中"


def test_the_space_between_prompt_and_continuation_is_kept(tokenizer):
    tokens = tokenizer.encode("some more words")
    prompt = tokenizer.encode("some")
    assert tokens[: len(prompt)] == prompt

    pieces, rest = streamed(tokenizer, prompt, tokens[len(prompt) :])

    assert "".join(pieces) + rest == " more words"


@pytest.mark.parametrize("silent", [0, 2], ids=["pads", "ends"])
@pytest.mark.parametrize("count", [1, 7, 8, 20])
def test_the_space_after_silent_tokens_is_kept(tokenizer, silent, count):
    word = tokenizer.encode("more")

    pieces, _ = streamed(tokenizer, tokenizer.encode("some"), [silent] * count + word)

    assert "".join(pieces) == " more"


def test_the_space_after_many_spaces_is_kept(tokenizer):
    (space,) = tokenizer.encode("中")[:1]
    word = tokenizer.encode("more")
    assert tokenizer.decode([*word, space, *word]) == "more  more"

    pieces, _ = streamed(tokenizer, word, [space] * 10 + word)

    assert "".join(pieces) == " " * 11 + "more"


def test_a_long_text_streams_in_small_steps(tokenizer):
    text = "The import statement combines two operations;\n    中文 and 😀 too." * 8
    prompt, tokens = tokenizer.encode("Words:"), tokenizer.encode(text)

    pieces, rest = streamed(tokenizer, prompt, tokens)

    assert "".join(pieces) + rest == " " + text
    assert sum(piece == "" for piece in pieces) < len(pieces) / 3


def test_streams_do_not_know_of_each_other(tokenizer):
    prompt = tokenizer.encode("some")
    one, other = tokenizer.stream(prompt), tokenizer.stream(prompt)
    first, *others = byte_tokens("中".encode())

    one.push(first)
    said = other.push(tokenizer.encode("more")[0])

    assert said.startswith(" ")
    assert "".join(one.push(token) for token in others) == "中"
    assert prompt == tokenizer.encode("some")


# --- bad models


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda _: b"", id="empty"),
        pytest.param(lambda _: b"tokenizer", id="text"),
        pytest.param(lambda _: bytes(4096), id="zeros"),
        pytest.param(lambda data: data[:1000], id="beginning"),
        pytest.param(lambda data: data[:-1], id="one-byte-short"),
        pytest.param(lambda data: b"\xff" + data[1:], id="first-byte"),
    ],
)
def test_a_damaged_model_is_named(model, tmp_path, change):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(change(model.read_bytes()))

    with pytest.raises(CorruptCheckpointError, match=r"tokenizer\.model: malformed") as caught:
        Tokenizer(path, vocab_size=VOCABULARY)

    assert caught.value.damage[0].file == "tokenizer.model"
    assert caught.value.damage[0].reason is Reason.MALFORMED


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda _: None], ids=["dir", "no"])
def test_what_cannot_be_read_is_no_model(tmp_path, make):
    path = tmp_path / "tokenizer.model"
    make(path)

    with pytest.raises(CorruptCheckpointError, match="is no sentencepiece model"):
        Tokenizer(path, vocab_size=VOCABULARY)


@given(place=st.integers(0, 247_000), byte=st.integers(0, 255))
@example(place=116, byte=0x80)  # inside a piece
@settings(deadline=None, max_examples=60)
def test_a_damaged_byte_is_an_error_of_ours_or_none(model, tmp_path_factory, place, byte):
    data = bytearray(model.read_bytes())
    data[place % len(data)] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.model"
    path.write_bytes(data)

    try:
        tokenizer = Tokenizer(path, vocab_size=VOCABULARY)
    except CorruptCheckpointError:
        return
    assert isinstance(tokenizer.decode(tokenizer.encode("some words")), str)


def test_another_model_s_vocabulary_is_refused(model):
    with pytest.raises(CorruptCheckpointError, match="has 512 pieces, the model has 511"):
        Tokenizer(model, vocab_size=VOCABULARY - 1)
