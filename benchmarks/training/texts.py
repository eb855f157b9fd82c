"""The texts as tokens, and the batches of a training."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from training.corpus import Document, digest, documents
from training.recipe import BATCH, CONFIG, SEED, SHARES
from training.vocabulary import train_tokenizer


@dataclass(frozen=True, slots=True)
class Texts:
    """Tokens of each kind of text, one text after the other, each closed by the end token."""

    train: dict[str, NDArray[np.uint16]]
    held_out: NDArray[np.uint16]
    held_out_bytes: int

    @classmethod
    def of(cls, found: list[Document], tokenizer: sentencepiece.SentencePieceProcessor) -> "Texts":
        """All texts as tokens."""

        def tokens(chosen: list[Document]) -> NDArray[np.uint16]:
            parts = [[*tokenizer.encode(text.text), CONFIG.eos_token] for text in chosen]
            return np.array([token for part in parts for token in part], np.uint16)

        held_out = [text for text in found if text.is_held_out]
        train = {
            kind: tokens([text for text in found if text.kind == kind and not text.is_held_out])
            for kind in SHARES
        }
        return cls(train, tokens(held_out), sum(len(text.text.encode()) for text in held_out))

    def batch(self, step: int, length: int) -> NDArray[np.int32]:
        """`(sequences, length + 1)` tokens, drawn from the number of the step alone."""
        rng = np.random.default_rng((SEED, step))
        rows = []
        kinds = rng.choice(list(SHARES), BATCH // length, p=list(SHARES.values()))
        for kind in kinds:
            tokens = self.train[kind]
            start = int(rng.integers(len(tokens) - length - 1))
            rows.append(tokens[start : start + length + 1])
        return np.stack(rows).astype(np.int32)


def prepared(work: Path) -> Texts:
    """The tokenizer and the tokens, made once and kept in the folder.

    Raises:
        SystemExit: A training in this folder began with other texts.
    """
    work.mkdir(parents=True, exist_ok=True)
    model, kept = work / "tokenizer.model", work / "texts.npz"
    found = documents()
    name = digest(found)
    if kept.exists():
        with np.load(kept) as saved:
            if str(saved["digest"]) == name:
                train = {kind: saved[kind] for kind in SHARES}
                return Texts(train, saved["held_out"], int(saved["held_out_bytes"]))
        if (work / "state.npz").exists():
            raise SystemExit(f"{work}: was trained on other texts than this Python has; begin anew")
    training = (text.text for text in found if not text.is_held_out)
    model.write_bytes(train_tokenizer(training, CONFIG.vocab_size))
    texts = Texts.of(found, sentencepiece.SentencePieceProcessor(model_file=str(model)))
    np.savez(
        kept,
        digest=name,
        held_out=texts.held_out,
        held_out_bytes=texts.held_out_bytes,
        **texts.train,
    )
    counts = {kind: f"{len(tokens):,}" for kind, tokens in texts.train.items()}
    print(f"texts {name}, tokens {counts}, held out {len(texts.held_out):,}", flush=True)
    return texts
