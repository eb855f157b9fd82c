"""llama.cpp's server in a process of its own: log-probabilities of the token after a prompt."""

import json
import sys
from pathlib import Path

import numpy as np
import xllamacpp as xlc


def main() -> None:
    """MODEL JSON OUT: the JSON has `prompts`, lists of tokens, and `vocab`, how many there are."""
    path, job, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8")), sys.argv[3]
    params = xlc.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
    params.warmup, params.fit_params = False, False
    params.cache_type_k = params.cache_type_v = xlc.ggml_type.GGML_TYPE_F32
    # several wait for one another by spinning
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xlc.Server(params)
    rows = np.full((len(job["prompts"]), job["vocab"]), -np.inf, np.float32)
    for row, prompt in zip(rows, job["prompts"], strict=True):
        answer = server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": 1,
                "temperature": 0,
                "n_probs": job["vocab"],
                "cache_prompt": False,
            }
        )
        (first,) = answer["choices"][0]["logprobs"]["content"]
        for entry in first["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
    np.save(out, rows)


if __name__ == "__main__":
    main()
