"""ik_llama.cpp in a process of its own: logits of all positions, or tokens of texts.

Its library prints to stdout, and ends the process where it fails an assertion.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
from ik_llama_cpp import _ctypes_api as api
from ik_llama_cpp._internals import IkModel


def logits_of(model: IkModel, tokens: list[int]) -> np.ndarray:
    """float32 `(tokens, vocabulary)`."""
    params = api.llama_context_default_params()
    params.n_ctx, params.n_threads, params.flash_attn = 256, 2, False
    context = api.llama_init_from_model(model.model, params)
    batch = api.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
        batch.seq_id[place][0], batch.logits[place] = 0, 1
    assert api.llama_decode(context, batch) == 0
    rows = []
    for place in range(len(tokens)):
        row = api.llama_get_logits_ith(context, place)
        row = ctypes.cast(row, ctypes.POINTER(ctypes.c_float))
        rows.append(np.ctypeslib.as_array(row, (model.n_vocab,)).copy())
    return np.stack(rows)


def main() -> None:
    """MODEL JSON OUT: the JSON has `tokens` to score, or `texts` to tokenise."""
    path, job, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8")), sys.argv[3]
    model = IkModel(path)
    if "tokens" in job:
        np.save(out, logits_of(model, job["tokens"]))
    else:
        found = [model.tokenize(text, add_bos=False) for text in job["texts"]]
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
