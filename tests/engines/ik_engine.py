"""ik_llama.cpp in a process of its own: logits of all positions, texts, or tokens of texts.

Its library prints to stdout, and ends the process where it fails an assertion.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
from ik_llama_cpp import _ctypes_api as api
from ik_llama_cpp._internals import IkModel


class Context:
    """A sequence that a model has read, and reads on."""

    def __init__(self, model: IkModel) -> None:
        params = api.llama_context_default_params()
        params.n_ctx, params.flash_attn = 256, False
        params.n_threads = params.n_threads_batch = 1  # several wait for one another by spinning
        self.model = model
        self.context = api.llama_init_from_model(model.model, params)
        self.length = 0

    def read(self, tokens: list[int]) -> np.ndarray:
        """The logits after each token, float32 `(tokens, vocabulary)`."""
        batch = api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, self.length + place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        assert api.llama_decode(self.context, batch) == 0
        self.length += len(tokens)
        rows = []
        for place in range(len(tokens)):
            row = api.llama_get_logits_ith(self.context, place)
            row = ctypes.cast(row, ctypes.POINTER(ctypes.c_float))
            rows.append(np.ctypeslib.as_array(row, (self.model.n_vocab,)).copy())
        return np.stack(rows)


def continued(model: IkModel, prompt: list[int], length: int) -> list[int]:
    """The likeliest tokens after a prompt."""
    context, tokens = Context(model), list(prompt)
    last = prompt
    for _ in range(length):
        last = [int(context.read(last)[-1].argmax())]
        tokens += last
    return tokens[len(prompt) :]


def main() -> None:
    """MODEL JSON OUT: the JSON has `tokens` to score, `prompts` and the `length` of what follows
    them, or `texts` to tokenise."""
    path, job, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8")), sys.argv[3]
    model = IkModel(path)
    if "tokens" in job:
        np.save(out, Context(model).read(job["tokens"]))
        return
    if "prompts" in job:
        found = [continued(model, prompt, job["length"]) for prompt in job["prompts"]]
    else:
        found = [model.tokenize(text, add_bos=False) for text in job["texts"]]
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
