"""llama.cpp on a layer of ours, as GGUF without a loss: Q8_0 holds the released integers."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.export import export
from grokctl.exporting.options import EmbeddingType, ExportOptions, ExportType, Format
from grokctl.exporting.plan import plan_export

Peer = Callable[[], float] | None
"""Measures tokens a second of another program, if it is there."""


def llama(program: Path, ready: ReadyCheckpoint, model: Path) -> tuple[Peer, Peer]:
    """What measures its tokens a second, for decoding and for a prompt of 64.

    llama-bench, which is built beside every llama-cli, needs no tokenizer. Embeddings are asked for
    because otherwise all tokens but the last skip the experts of the last layer.

    Args:
        program: llama-cli, or llama-bench itself.
        ready: An int8 checkpoint of one device.
        model: Where to write it again.

    Returns:
        Nothing if it cannot be run, which is then said.
    """
    bench = program.with_name("llama-bench")
    command = [str(bench), "-m", str(model), "-r", "1", "-o", "json"]
    command += ["-t", str(os.cpu_count()), "-lm", "none"]

    def measure(*test: str) -> float:
        process = subprocess.run([*command, *test], capture_output=True, check=True)
        (found,) = json.loads(process.stdout)
        return float(found["avg_ts"])

    decodes = partial(measure, "-p", "0", "-n", "16")
    try:
        subprocess.run([bench, "--help"], capture_output=True, check=True)
        write_gguf(model, ready)
        decodes()
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", b"") or b"").decode().splitlines()
        print(f"llama.cpp is left out: {error}", *lines[-1:])
        return None, None
    return decodes, partial(measure, "-p", "64", "-n", "0", "-embd", "1")


def write_gguf(path: Path, ready: ReadyCheckpoint) -> None:
    """Export a checkpoint as one file, without tokens.

    Activations are not the same as the reference's: llama.cpp renormalises gates.
    """
    options = ExportOptions(
        out=path.with_suffix(".export"),
        format=Format.GGUF,
        type=ExportType.Q8_0,
        embedding=EmbeddingType.F32,
        name="layer",
    )
    made = export(plan_export(ready, options))
    (made.root / "layer-q8_0.gguf").rename(path)
    shutil.rmtree(made.root)
