"""`grokctl score`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grokctl.cli.options import (
    CheckpointArgument,
    ClusterTimeoutOption,
    ComputeOption,
    ContextOption,
    CoordinatorOption,
    DevicesOption,
    HomeOption,
    JsonOption,
    KvOption,
    MeshOption,
    NumProcessesOption,
    ProcessIdOption,
    QuietOption,
    TokenIdsOption,
    VerboseOption,
)
from grokctl.cluster.launcher import BOUND_S
from grokctl.errors import UsageError
from grokctl.parse import read_stdin, read_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

from grokctl.cli.context import cluster_of, command, followed, home_of


def score(
    checkpoint: CheckpointArgument = None,
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text to score, or - for stdin.")
    ] = None,
    token_ids: TokenIdsOption = None,
    logits: Annotated[
        Path | None, typer.Option(metavar="OUT.npy", help="Write float32 (tokens, vocab).")
    ] = None,
    devices: DevicesOption = None,
    mesh: MeshOption = None,
    compute: ComputeOption = None,
    kv: KvOption = "compute",
    context: ContextOption = None,
    coordinator: CoordinatorOption = None,
    num_processes: NumProcessesOption = None,
    process_id: ProcessIdOption = None,
    cluster_timeout: ClusterTimeoutOption = BOUND_S,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """How likely the model finds a text: negative log-likelihood and perplexity."""
    by_hand = (coordinator, num_processes, process_id)
    with (
        command(as_json=as_json, quiet=quiet, verbose=verbose) as console,
        cluster_of(console, by_hand, timeout_s=cluster_timeout, verbose=verbose) as cluster,
    ):
        from grokctl.screen import score as screen
        from grokctl.session.job import Wanted, open_job

        wanted = Wanted(checkpoint, devices, mesh, compute=compute, kv=kv, context=context)
        if followed(console, home_of(home), wanted, cluster):
            return
        if (text is None) == (token_ids is None):
            raise UsageError("score takes either --text or --token-ids", "--text essay.txt")
        content = None
        if text is not None:
            content = read_stdin() if text == "-" else read_text(Path(text))
        with console.observing() as observe:
            job = open_job(console, home_of(home), wanted, observe, cluster=cluster)
            ids = job.tokens(content, token_ids)
            with _logits_file(logits, (len(ids), job.plan.config.vocab_size)) as out:
                found = job.start(observe).score(ids, logits_out=out)
        screen.score(console, found, logits)


@contextmanager
def _logits_file(
    path: Path | None, shape: tuple[int, int]
) -> Iterator["NDArray[np.float32] | None"]:
    """An array file that appears whole, or not at all."""
    if path is None:
        yield None
        return
    import numpy as np

    if path.is_dir() or not path.name:
        raise UsageError(f"{path}: is a folder", "--logits logits.npy")
    partial = path.with_name(f".{path.name}.partial")
    try:
        out = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
        with partial.open("r+b") as file:  # now, because a mapping that runs full kills us
            os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        yield out
        out.flush()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
