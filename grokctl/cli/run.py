"""`grokctl run`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from grokctl.cli.context import cluster_of, command, followed, home_of
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
from grokctl.errors import ExitCode, UsageError
from grokctl.parse import read_stdin, read_text, utf8

_SEEDS: Final = 10**6
"""One of so many is drawn where none is given: few enough to type again."""
_BATCH: Final = 8


def run(
    checkpoint: CheckpointArgument = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="Text, or - for stdin.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text from a file.")
    ] = None,
    token_ids: TokenIdsOption = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Many, as JSON lines; - for stdin."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="N of these at a time.", show_default="8"),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("-n", "--max-tokens", metavar="N", min=0, help="Stop after N tokens.")
    ] = 128,
    temperature: Annotated[float, typer.Option(metavar="T", help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(metavar="P", help="Nucleus; 1 keeps all.")] = 0.95,
    top_k: Annotated[int, typer.Option(metavar="K", help="0 keeps all.")] = 0,
    min_p: Annotated[float, typer.Option(metavar="P", help="Against the likeliest.")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="For the draws.", show_default="random")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Stop before it.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end.")] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt first.")] = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print only at the end.")] = False,
    devices: DevicesOption = None,
    mesh: MeshOption = None,
    compute: ComputeOption = None,
    kv: KvOption = "compute",
    context: ContextOption = None,
    coordinator: CoordinatorOption = None,
    num_processes: NumProcessesOption = None,
    process_id: ProcessIdOption = None,
    cluster_timeout: ClusterTimeoutOption = BOUND_S,
    stats: Annotated[
        bool, typer.Option("--stats", help="Measure the memory, and say all of how fast it was.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """Continue a text. Grok-1 is a base model: it completes, it does not chat."""
    by_hand, is_cut = (coordinator, num_processes, process_id), False
    with (
        command(as_json=as_json, quiet=quiet, verbose=verbose) as console,
        cluster_of(console, by_hand, timeout_s=cluster_timeout, verbose=verbose) as cluster,
    ):
        from grokctl.inference.generation import Request
        from grokctl.model.sampling import Sampling
        from grokctl.session import settings
        from grokctl.session.job import Wanted
        from grokctl.session.prompts import read_prompts

        wanted = Wanted(checkpoint, devices, mesh, compute=compute, kv=kv, context=context)
        where = home_of(home)
        if followed(console, where, wanted, cluster):
            return
        check_prompts(
            prompt=prompt, prompt_file=prompt_file, token_ids=token_ids, prompts_file=prompts_file
        )
        check_many(prompts_file, batch=batch, echo=echo, no_stream=no_stream)
        drawn = int.from_bytes(os.urandom(4)) % _SEEDS if seed is None else seed
        sampling = Sampling(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=drawn
        )
        request = Request(
            prompt=(), sampling=sampling, max_tokens=max_tokens, ignore_eos=ignore_eos
        )
        request = settings.change(request, "stop", stop or [])
        many = read_prompts(prompts_file, request) if prompts_file else None
        text = None if many else read_prompt(prompt, prompt_file, token_ids)
        is_asked = many is None and text is None and token_ids is None
        if as_json and is_asked:
            raise UsageError("there is no prompt", "grokctl run --json -p 'Once upon a time'")

        from grokctl.session.complete import complete, complete_many
        from grokctl.session.repl import converse

        if many is not None:
            size = batch or _BATCH
            complete_many(
                *(console, where, wanted, many), batch=size, all_stats=stats, cluster=cluster
            )
        elif is_asked:
            converse(console, where, wanted, request, all_stats=stats, cluster=cluster)
        else:
            is_cut = complete(
                *(console, where, wanted, request),
                text=text,
                token_ids=token_ids,
                echo=echo,
                stream=not no_stream,
                all_stats=stats,
                cluster=cluster,
            )
    if is_cut:  # which is no failure of the other processes
        console.note("interrupted")
        raise typer.Exit(ExitCode.INTERRUPTED)


def check_prompts(**given: object) -> None:
    """Refuse more than one option that says what to continue; what was not given is None."""
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise UsageError(f"{', '.join(names)}: only one of them can be meant")


def check_many(prompts_file: str | None, *, batch: int | None, echo: bool, no_stream: bool) -> None:
    """Refuse options that mean nothing with, or without, a file of prompts."""
    if prompts_file is None:
        if batch is not None:
            raise UsageError("--batch: means something only with --prompts-file")
        return
    for name, is_given in (("--echo", echo), ("--no-stream", no_stream)):
        if is_given:
            raise UsageError(f"{name}: means nothing with --prompts-file, whose results are JSON")


def read_prompt(prompt: str | None, prompt_file: Path | None, token_ids: str | None) -> str | None:
    """The text to continue; None if token ids were given or a person is to be asked."""
    if prompt_file is not None:
        return read_text(prompt_file)
    if prompt == "-":
        return read_stdin()
    if prompt is None and token_ids is None and not (sys.stdin and sys.stdin.isatty()):
        raise UsageError("there is no prompt", "grokctl run -p 'Once upon a time'")
    return utf8(prompt, "prompt")
