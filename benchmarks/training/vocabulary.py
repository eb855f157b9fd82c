"""A sentencepiece tokenizer with byte fallback, and with the odd pieces of Grok-1's."""

import io
from collections.abc import Iterable, Iterator

import sentencepiece

ODD_PIECES = (
    *("\n" * count for count in range(1, 11)),
    *"0123456789",
    *("\t" * count for count in range(1, 9)),
    *(" " * count for count in range(2, 17)),
    "<|separator|>",
    "<|mask|>",
    *(f"<|control{number}|>" for number in range(1, 21)),
)
"""Ids 4 to 68, as in Grok-1's tokenizer. The spaces never match: text has `▁` in their place."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> bytes:
    """A serialized model of exactly `vocabulary` pieces, trained on the lines of some texts."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=list(ODD_PIECES),
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[BOS]",
        eos_piece="[EOS]",
        unk_piece="[UNK]",
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from filter(str.strip, text.splitlines())
