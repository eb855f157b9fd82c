"""`grokctl score`."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from grokctl.cli.context import (
    cluster_of,
    command,
    followed,
    home_of,
    name_as_typed,
    require_checkpoint,
)
from grokctl.cli.environment import jax_prepared
from grokctl.cli.hints import again, is_piped
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
    MaxMemoryOption,
    MeshOption,
    NumProcessesOption,
    ProcessIdOption,
    QuietOption,
    ThreadsOption,
    TokenIdsOption,
    VerboseOption,
    path_of,
)
from grokctl.cluster.launcher import BOUND_S
from grokctl.errors import UsageError
from grokctl.model.placement import read_mesh
from grokctl.model.precision import KvType
from grokctl.parse import read_size, read_stdin, read_text, read_token_ids
from grokctl.paths import expanded


def score(
    checkpoint: CheckpointArgument = None,
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with the text; - reads stdin.")
    ] = None,
    token_ids: TokenIdsOption = None,
    logits: Annotated[
        Path | None,
        typer.Option(
            parser=path_of, metavar="OUT.npy", help="Write the logits: float32 (tokens, vocab)."
        ),
    ] = None,
    devices: DevicesOption = None,
    mesh: MeshOption = None,
    compute: ComputeOption = None,
    kv: KvOption = KvType.COMPUTE,
    context: ContextOption = None,
    threads: ThreadsOption = None,
    max_memory: MaxMemoryOption = None,
    coordinator: CoordinatorOption = None,
    num_processes: NumProcessesOption = None,
    process_id: ProcessIdOption = None,
    cluster_timeout: ClusterTimeoutOption = BOUND_S,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """Score a text: its negative log-likelihood and perplexity."""
    by_hand = (coordinator, num_processes, process_id)
    with (
        command(as_json=as_json, quiet=quiet, verbose=verbose) as console,
        jax_prepared(threads),
        cluster_of(
            console, by_hand, home=home, timeout_s=cluster_timeout, verbose=verbose
        ) as cluster,
    ):
        from grokctl.inference.logits_file import logits_file
        from grokctl.screen import score as screen
        from grokctl.session.job import JobRequest, open_job

        name_as_typed(console, home_of(home), checkpoint)
        request = JobRequest(
            home=home_of(home),
            checkpoint=checkpoint,
            mesh=read_mesh(devices, mesh),
            compute=compute,
            kv=kv,
            context=context,
            threads=threads,
            max_memory=read_size(max_memory, "--max-memory", unit="GB"),
        )
        if followed(console, request, cluster, (text, token_ids)):
            return
        if text is None and token_ids is None:
            require_checkpoint(home_of(home), checkpoint)
        content = read_content(text, token_ids)
        check_output(logits, text)
        with console.observing() as observe:
            job = open_job(request, cluster=cluster, observe=observe)
            ids = job.tokens(content)
            shape = (len(ids), job.plan.config.vocab_size)
            with logits_file(logits, shape, observe=observe) as out:
                result = job.start(observe).score(ids, logits_out=out)
        screen.score(console, result, logits)


def check_output(logits: Path | None, text: str | None) -> None:
    """Refuse to replace the text by its logits."""
    with suppress(OSError):  # one of them is not there
        if logits is not None and text not in {None, "-"} and logits.samefile(expanded(str(text))):
            raise UsageError(f"--logits: {logits} is the text of this command", "--logits out.npy")


def read_content(text: str | None, token_ids: str | None) -> str | tuple[int, ...]:
    """The text or the token ids to score."""
    if text is not None and token_ids is None:
        return read_stdin() if text == "-" else read_text(expanded(text))
    if token_ids is not None and text is None:
        return read_token_ids(token_ids, "--token-ids")
    if text is not None:
        raise UsageError(
            "expected --text or --token-ids, found both", again(without=("--token-ids",))
        )
    hint = again("--text", "-" if is_piped() else "essay.txt")
    raise UsageError("expected --text or --token-ids, found neither", hint)
