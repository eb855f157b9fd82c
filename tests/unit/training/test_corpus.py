import numpy as np
import pytest
import sentencepiece
from training import corpus
from training.corpus import Document, digest
from training.recipe import BATCH, LENGTHS, SHARES
from training.texts import Texts
from training.vocabulary import ODD_PIECES, train_tokenizer

SOURCE = '''"""What a module is for, in words."""


class Shape:
    """Has an area.

        Indented.
    """

    def area(self):
        """The area of a shape."""
        return 1 + 23
'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    (tmp_path / "email").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "email" / "shapes.py").write_text(SOURCE)
    (tmp_path / "silent.py").write_text("x = 1\n")
    (tmp_path / "test" / "other.py").write_text(SOURCE)
    monkeypatch.setattr(corpus, "LIBRARY", tmp_path)
    monkeypatch.setattr("pydoc_data.topics.topics", {"with": "The with statement.\n\n"})
    return corpus.documents()


def test_documents_are_topics_sources_and_their_docstrings(library):
    assert [(found.name, found.kind) for found in library] == [
        ("topics/with", "topic"),
        ("email/shapes.py", "source"),
        ("email/shapes.py", "docstrings"),
        ("silent.py", "source"),
    ]
    assert library[0].text == "The with statement.\n"
    assert library[2].text == (
        "What a module is for, in words.\n\nHas an area.\n\nIndented.\n\nThe area of a shape.\n"
    )


def test_a_file_is_held_out_with_its_docstrings_by_its_name_alone():
    names = [f"module{number}.py" for number in range(400)]

    held_out = {name for name in names if Document(name, "source", "x").is_held_out}

    assert held_out == {name for name in names if Document(name, "docstrings", "y").is_held_out}
    assert 8 <= len(held_out) <= 40


def test_another_text_has_another_digest():
    texts = [Document("a", "topic", "bc"), Document("ab", "topic", "c")]

    assert len({digest(texts), digest(texts[::-1]), digest(texts[:1])}) == 3


# --- the tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    words = "The import statement finds a module, and binds names to its values in a scope."
    lines = [f"    {word} = {words[place:]}" for place, word in enumerate(words.split())]
    return sentencepiece.SentencePieceProcessor(
        model_proto=train_tokenizer(["\n".join(lines)], 400)
    )


def test_the_tokenizer_has_the_odd_pieces_of_grok_1_in_their_places(tokenizer):
    pieces = [tokenizer.id_to_piece(token) for token in range(tokenizer.vocab_size())]

    assert pieces[:4] == ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
    assert pieces[4:69] == list(ODD_PIECES)
    assert pieces[69:325] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert pieces[4] == "\n"
    assert pieces[14] == "0"
    assert pieces[24] == "\t"
    assert pieces[32] == "  "
    assert pieces[47] == "<|separator|>"
    assert not any(set(piece) & set("\n\t 0123456789") for piece in pieces[325:])


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        pytest.param("a\nb", ["▁a", "\n", "b"], id="newline"),
        pytest.param("a\n\n\nb", ["▁a", "\n\n\n", "b"], id="three newlines"),
        pytest.param("a = 12", ["▁a", "▁", "=", "▁", "1", "2"], id="digits"),
    ],
)
def test_odd_pieces_are_single_tokens(tokenizer, text, pieces):
    found = tokenizer.encode(text, out_type=str)

    assert "".join(found) == "".join(pieces)
    assert [piece for piece in found if piece in ODD_PIECES] == [
        piece for piece in pieces if piece in ODD_PIECES
    ]


@pytest.mark.parametrize("text", ["    def f():\n\t\treturn 10", "é 日 🙂", "a  b", "x\n"])
def test_every_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


# --- batches


def test_a_batch_is_drawn_from_the_number_of_its_step_alone():
    train = {
        kind: np.arange(1000 * number, 1000 * number + 1000, dtype=np.uint16)
        for number, kind in enumerate(SHARES)
    }
    texts = Texts(train, np.zeros(1, np.uint16), 1)

    one, again, other = (texts.batch(step, LENGTHS[0][1]) for step in (7, 7, 8))

    assert one.shape == (BATCH // LENGTHS[0][1], LENGTHS[0][1] + 1)
    assert (one == again).all()
    assert (one != other).any()
    assert (np.diff(one, axis=1) == 1).all()
    shares = np.bincount(one[:, 0] // 1000) / len(one)
    np.testing.assert_allclose(shares, list(SHARES.values()), atol=0.15)
