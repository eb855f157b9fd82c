"""`grokctl run`."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Final

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
from grokctl.errors import UsageError, invalid
from grokctl.model.placement import read_mesh
from grokctl.model.precision import KvType
from grokctl.parse import plain_text, read_size, read_stdin, read_text, read_token_ids
from grokctl.paths import Home

_SEEDS: Final = 10**6
"""A random seed is below this: short enough to type again."""
_BATCH: Final = 8
_BIAS: Final = re.compile(r"(?P<id>[0-9]{1,9})=(?P<bias>[+-]?[0-9]{1,9}(\.[0-9]{1,9})?)")
_WORDS: Final = 2
"""A text has so many, and the name of a checkpoint hardly ever."""


def run(
    checkpoint: CheckpointArgument = None,
    prompt: Annotated[
        str | None,
        typer.Option("-p", "--prompt", metavar="TEXT", help="Text to continue; - reads stdin."),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            parser=path_of, metavar="FILE", help="File with the text to continue; - reads stdin."
        ),
    ] = None,
    token_ids: TokenIdsOption = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Many prompts as JSON lines; - reads stdin."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            "--slots",
            metavar="N",
            min=1,
            help="Prompts to run at a time.",
            show_default="8",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("-n", "--max-tokens", metavar="N", min=0, help="Stop after N tokens.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="Sampling temperature; 0 is greedy.")
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Nucleus sampling; 1 keeps all.")
    ] = 0.95,
    top_k: Annotated[
        int, typer.Option(metavar="K", help="Keep the K most likely; 0 keeps all.")
    ] = 0,
    min_p: Annotated[
        float, typer.Option(metavar="P", help="Drop tokens below P times the most likely.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(metavar="F", help="Lower a token's logit by F each time it occurred.")
    ] = 0.0,
    presence_penalty: Annotated[
        float, typer.Option(metavar="F", help="Lower the logit of a token that occurred by F.")
    ] = 0.0,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(metavar="ID=BIAS", help="Add to the logit of a token, -100 to 100."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Random seed.", show_default="random")
    ] = None,
    min_tokens: Annotated[
        int, typer.Option(metavar="N", min=0, help="Do not stop at a token before N tokens.")
    ] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Stop before this text.")
    ] = None,
    stop_token_ids: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="Stop at these tokens.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Continue after the end token.")
    ] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt first.")] = False,
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Print the text when it is complete.")
    ] = False,
    no_cache_prompt: Annotated[
        bool, typer.Option("--no-cache-prompt", help="Read every prompt from its beginning.")
    ] = False,
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
    stats: Annotated[
        bool, typer.Option("--stats", help="Measure the memory bandwidth, and print all speeds.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """Continue a text. Grok-1 is a base model: it completes, it does not chat."""
    by_hand, is_stopped = (coordinator, num_processes, process_id), False
    with command(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        with (
            jax_prepared(threads),
            cluster_of(
                console, by_hand, home=home, timeout_s=cluster_timeout, verbose=verbose
            ) as cluster,
        ):
            from grokctl.inference.generation import Request
            from grokctl.model.sampling import Sampling
            from grokctl.session import settings
            from grokctl.session.job import JobRequest
            from grokctl.session.prompts import Prompt, read_prompts

            check_name(checkpoint, home_of(home))
            name_as_typed(console, home_of(home), checkpoint)
            job = JobRequest(
                home=home_of(home),
                checkpoint=checkpoint,
                mesh=read_mesh(devices, mesh),
                compute=compute,
                kv=kv,
                context=context,
                threads=threads,
                max_memory=read_size(max_memory, "--max-memory", unit="GB"),
                sequences=1 if prompts_file is None else batch or _BATCH,
            )
            if followed(console, job, cluster, (prompt, prompt_file, token_ids, prompts_file)):
                return
            check_prompts(
                prompt=prompt,
                prompt_file=prompt_file,
                token_ids=token_ids,
                prompts_file=prompts_file,
            )
            check_many(prompts_file, batch=batch, echo=echo, no_stream=no_stream)
            sampling = Sampling(
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                frequency_penalty=frequency_penalty,
                presence_penalty=presence_penalty,
                logit_bias=read_bias(logit_bias or [], most=settings.MOST_IDS),
                seed=int.from_bytes(os.urandom(4)) % _SEEDS if seed is None else seed,
            )
            request = Request(
                prompt=(),
                sampling=sampling,
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                ignore_eos=ignore_eos,
                cache_prompt=not no_cache_prompt,
            )
            request = settings.change(request, "stop", stop or [])
            ids = list(read_stop_tokens(stop_token_ids))
            request = settings.change(request, "stop_token_ids", ids)
            prompts = read_prompts(prompts_file, request) if prompts_file else None
            is_text = any(each is not None for each in (prompt, prompt_file, token_ids))
            if prompts is None and not is_text:
                require_checkpoint(home_of(home), checkpoint)
            content = None if prompts else read_prompt(prompt, prompt_file, token_ids)
            if as_json and prompts is None and content is None:
                raise UsageError("a prompt is required", again("-p", "Once upon a time"))

            from grokctl.session.complete import Output, complete, complete_many
            from grokctl.session.repl import converse

            if prompts is not None:
                complete_many(console, job, prompts, all_stats=stats, cluster=cluster)
            elif content is None:
                converse(console, job, request, all_stats=stats, cluster=cluster)
            else:
                is_stopped = complete(
                    console,
                    job,
                    Prompt(content=content, settings=request),
                    output=Output(echo=echo, stream=not no_stream, all_stats=stats),
                    cluster=cluster,
                )
        if is_stopped:  # here, because the other processes have not failed
            raise KeyboardInterrupt


def check_name(checkpoint: str | None, home: Home) -> None:
    """Refuse a text in the place of a checkpoint, and show where it belongs."""
    if checkpoint is None or len(checkpoint.split()) < _WORDS:
        return
    places = (Path(checkpoint), home.releases / checkpoint, home.ready / checkpoint)
    if not any(map(os.path.lexists, places)):
        raise UsageError(
            f"{checkpoint}: expected a checkpoint, found a text",
            again("-p", checkpoint, instead_of=(checkpoint,)),
        )


def check_prompts(**given: object) -> None:
    """Refuse more than one option with a prompt; None is an option that was not given."""
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise UsageError(f"{', '.join(names)}: expected only one of them")


def check_many(prompts_file: str | None, *, batch: int | None, echo: bool, no_stream: bool) -> None:
    """Refuse options that have no effect with, or without, a file of prompts."""
    if prompts_file is None:
        if batch is not None:
            raise UsageError("--batch: has an effect with --prompts-file only")
        return
    for name, is_given in (("--echo", echo), ("--no-stream", no_stream)):
        if is_given:
            raise UsageError(f"{name}: has no effect with --prompts-file, which prints JSON")


def read_bias(texts: list[str], *, most: int) -> tuple[tuple[int, float], ...]:
    """Parse `--logit-bias`."""
    bias = []
    if len(texts) > most:
        raise UsageError(f"--logit-bias: expected at most {most:,}, found {len(texts):,}")
    for text in texts:
        if not (found := _BIAS.fullmatch(text)):
            raise invalid("--logit-bias", text, "expected ID=BIAS, such as 42=-100")
        bias.append((int(found["id"]), float(found["bias"])))
    return tuple(bias)


def read_stop_tokens(text: str | None) -> tuple[int, ...]:
    """Parse `--stop-token-ids`."""
    return () if text is None else read_token_ids(text, "--stop-token-ids")


def read_prompt(
    prompt: str | None, prompt_file: Path | None, token_ids: str | None
) -> str | tuple[int, ...] | None:
    """The text or the token ids to continue; None for the interactive loop."""
    if token_ids is not None:
        return read_token_ids(token_ids, "--token-ids")
    if prompt_file is not None:
        return read_stdin() if prompt_file == Path("-") else read_text(prompt_file)
    if prompt == "-":
        return read_stdin()
    if prompt is None:
        if not (sys.stdin and sys.stdin.isatty()):
            if is_piped():
                raise UsageError("a prompt is required: stdin needs -p -", again("-p", "-"))
            raise UsageError("a prompt is required", again("-p", "Once upon a time"))
        return None
    return plain_text(prompt, "--prompt")
