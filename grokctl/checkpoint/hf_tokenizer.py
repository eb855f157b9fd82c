"""A sentencepiece model as `tokenizer.json`, which tokenises like it.

The usual conversion of such models takes user-defined pieces for added tokens, which are cut out of
the raw text first; with Grok-1's newlines, tabs, spaces and digits nearly every text is then wrong.
Here they are ordinary pieces, reached by merges.
"""

import json
from collections.abc import Iterator
from typing import Any

from grokctl.checkpoint.pieces import Pieces, PieceType

_SPACE = "▁"


def tokenizer_json(pieces: Pieces) -> bytes:
    """The tokenizer for the `tokenizers` library."""
    vocab = {piece.text: number for number, piece in enumerate(pieces.pieces)}
    unknown = pieces.pieces[pieces.unknown_id].text
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if pieces.has_dummy_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prepend else []
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(pieces),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *prepend,
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [[left, right] for left, right in _merges(pieces)],
        },
    }
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()


def tokenizer_config(pieces: Pieces, longest: int) -> bytes:
    """What transformers reads beside `tokenizer.json`.

    Args:
        pieces: The vocabulary.
        longest: Tokens of the longest context.
    """
    numbers = {
        "bos_token": pieces.begin_id,
        "eos_token": pieces.end_id,
        "unk_token": pieces.unknown_id,
        "pad_token": pieces.pad_id,
    }
    texts = {key: pieces.pieces[one].text for key, one in numbers.items() if one is not None}
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **texts,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    }
    return json.dumps(values, ensure_ascii=False, indent=1).encode() + b"\n"


def _added(pieces: Pieces) -> list[dict[str, Any]]:
    """Control pieces, and markers such as `<|separator|>`: the only ones that are cut out."""
    special = {PieceType.CONTROL, PieceType.UNKNOWN}
    return [
        {
            "id": number,
            "content": piece.text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": piece.type in special,
        }
        for number, piece in enumerate(pieces.pieces)
        if piece.type in special
        or (piece.type is PieceType.USER_DEFINED and not _is_matched(piece.text))
    ]


def _is_matched(text: str) -> bool:
    """Whether a user-defined piece is of digits or white space, which merges reach."""
    return text.isspace() or text.isdigit()


def _merges(pieces: Pieces) -> Iterator[tuple[str, str]]:
    """Pairs that are joined, the most urgent first.

    Runs of a user-defined character grow one by one, the longest first, as sentencepiece takes the
    longest that matches. Normal pieces are joined by their scores: of any two normal halves.
    """
    own = [piece.text for piece in pieces.pieces if piece.type is PieceType.USER_DEFINED]
    known = set(own)
    runs = [text for text in own if len(text) > 1 and len(set(text)) == 1 and text[0] != " "]
    for text in sorted(runs, key=lambda run: (run[0], -len(run))):
        if text[1:] in known and text[0] in known:
            yield text[1:], text[0]
    normal = {
        piece.text: number
        for number, piece in enumerate(pieces.pieces)
        if piece.type is PieceType.NORMAL
    }
    urgent = sorted(normal.values(), key=lambda number: (-pieces.pieces[number].score, number))
    for number in urgent:
        text = pieces.pieces[number].text
        halves = [
            (normal[text[:place]], normal[text[place:]])
            for place in range(1, len(text))
            if text[:place] in normal and text[place:] in normal
        ]
        for left, right in sorted(halves):
            yield pieces.pieces[left].text, pieces.pieces[right].text
