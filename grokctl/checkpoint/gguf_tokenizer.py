"""A sentencepiece model as GGUF metadata, with the types that let llama.cpp tokenise like it."""

from typing import Final

import numpy as np

from grokctl.checkpoint.gguf import Value
from grokctl.checkpoint.pieces import Pieces, PieceType, TokenPiece
from grokctl.errors import Reason, corrupt
from grokctl.paths import TOKENIZER

_UNUSED_SCORE: Final = -10000.0


def tokenizer_metadata(pieces: Pieces, vocab_size: int) -> dict[str, Value]:
    """The metadata of a vocabulary.

    llama.cpp cuts user-defined pieces out of the raw text first, and then puts the dummy space
    before every fragment after one; so with Grok-1's own types, nine of ten texts are tokenised
    wrongly. Its user-defined newlines, tabs, spaces and digits are therefore written as normal
    pieces: by their scores they are merged exactly as sentencepiece matches them.

    Args:
        pieces: The vocabulary.
        vocab_size: Of the model, at least as large; the rest is filled with unused tokens.

    Raises:
        CorruptCheckpointError: The model has fewer tokens than pieces, or two are the same.
    """
    own = pieces.pieces
    if len(own) > vocab_size:
        raise _bad(f"has {len(own)} pieces, the model has {vocab_size}")
    texts = tuple(piece.text for piece in own)
    texts += tuple(f"[PAD{number}]" for number in range(len(own), vocab_size))
    if len(set(texts)) < len(texts):
        raise _bad("has the same piece twice")
    missing = vocab_size - len(own)
    scores = [piece.score for piece in own] + [_UNUSED_SCORE] * missing
    types = [_type(piece) for piece in own] + [PieceType.UNUSED] * missing
    values: dict[str, Value] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": np.array(scores, "<f4"),
        "tokenizer.ggml.token_type": np.array(types, "<i4"),
        "tokenizer.ggml.unknown_token_id": np.uint32(pieces.unknown_id),
    }
    for name, number in (
        ("bos", pieces.begin_id),
        ("eos", pieces.end_id),
        ("padding", pieces.pad_id),
    ):
        if number is not None:
            values[f"tokenizer.ggml.{name}_token_id"] = np.uint32(number)
    values["tokenizer.ggml.add_bos_token"] = np.bool_(False)  # the reference adds none
    values["tokenizer.ggml.add_eos_token"] = np.bool_(False)
    values["tokenizer.ggml.add_space_prefix"] = np.bool_(pieces.has_dummy_prefix)
    return values


def no_tokenizer_metadata() -> dict[str, Value]:
    """The metadata of a model without a tokenizer, which only takes token ids."""
    return {"tokenizer.ggml.model": "none"}


def _type(piece: TokenPiece) -> PieceType:
    is_cut_out = piece.type is PieceType.USER_DEFINED
    if is_cut_out and (piece.text.isspace() or piece.text.isdigit()):
        return PieceType.NORMAL
    return piece.type


def _bad(detail: str) -> Exception:
    return corrupt(TOKENIZER, Reason.MALFORMED, detail)
