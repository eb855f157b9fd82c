"""`grokctl serve`."""

import os
import signal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer

from grokctl import interrupts
from grokctl.cli.context import (
    ReportedError,
    cluster_of,
    command,
    followed,
    home_of,
    name_as_typed,
    require_checkpoint,
)
from grokctl.cli.environment import jax_prepared
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
    VerboseOption,
    path_of,
)
from grokctl.cluster.launcher import BOUND_S
from grokctl.errors import ExitCode, GrokctlError, UsageError
from grokctl.model.placement import read_mesh
from grokctl.model.precision import KvType
from grokctl.parse import read_size

_KEY: Final = "GROKCTL_API_KEY"
_SLOTS: Final = 8
"""Unless they would cost context."""


class Chat(StrEnum):
    """How a base model answers conversations."""

    TRANSCRIPT = "transcript"


def serve(
    checkpoint: CheckpointArgument = None,
    host: Annotated[str, typer.Option(metavar="ADDR", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port; 0 takes a free one.")
    ] = 8080,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            parser=path_of, metavar="FILE", help=f"File with the key of clients (${_KEY})."
        ),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let other machines ask without a key.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name of this server, in the Host header."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Other servers' pages that may ask, as https://host."),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(parser=path_of, metavar="FILE", help="Certificate, in PEM.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(parser=path_of, metavar="FILE", help="Its private key.")
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Another name of the model.")
    ] = None,
    chat: Annotated[
        Chat | None,
        typer.Option(metavar="transcript", help="Complete conversations, written as a transcript."),
    ] = None,
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Serve no page to play with.")] = False,
    queue: Annotated[
        int, typer.Option(metavar="N", min=1, help="Completions that may wait for a slot.")
    ] = 1024,
    request_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="S", min=0.1, help="End requests after S seconds.", show_default="never"
        ),
    ] = None,
    stall_timeout: Annotated[
        float, typer.Option(metavar="S", min=1, help="Not healthy if a step takes S seconds.")
    ] = 120,
    drain: Annotated[
        float, typer.Option(metavar="S", min=0, help="After a signal, go on for S seconds.")
    ] = 30,
    no_warm_up: Annotated[
        bool, typer.Option("--no-warm-up", help="Compile steps when requests need them.")
    ] = False,
    slots: Annotated[
        int | None,
        typer.Option(
            "--batch",
            "--slots",
            metavar="N",
            min=1,
            help="Completions at a time.",
            show_default="8, or as many as fit",
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
    """Answer completions over HTTP, as OpenAI's clients ask for them."""
    by_hand = (coordinator, num_processes, process_id)
    with (
        command(as_json=as_json, quiet=quiet, verbose=verbose) as console,
        jax_prepared(threads),
        cluster_of(
            console, by_hand, home=home, timeout_s=cluster_timeout, verbose=verbose
        ) as cluster,
    ):
        from grokctl import serve as stage
        from grokctl.screen import serve as screen
        from grokctl.serving.guard import GuardOptions
        from grokctl.serving.server import ServerOptions
        from grokctl.serving.service import ServiceOptions
        from grokctl.session.job import JobRequest

        name_as_typed(console, home_of(home), checkpoint)
        job = JobRequest(
            home=home_of(home),
            checkpoint=checkpoint,
            mesh=read_mesh(devices, mesh),
            compute=compute,
            kv=kv,
            context=context,
            sequences=slots or _SLOTS,
            may_be_fewer=slots is None,
            threads=threads,
            max_memory=read_size(max_memory, "--max-memory", unit="GB"),
        )
        if cluster is not None and cluster.rank:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers send it to all: rank 0 drains
        if followed(console, job, cluster):
            return
        if (tls_cert is None) != (tls_key is None):
            raise UsageError("--tls-cert, --tls-key: expected both or neither")
        if no_auth and api_key_file is not None:
            raise UsageError("--no-auth, --api-key-file: expected only one of them")
        options = stage.ServeOptions(
            server=ServerOptions(
                host=host, port=port, certificate=tls_cert, private_key=tls_key, drain_s=drain
            ),
            service=ServiceOptions(
                queue=queue,
                stall_s=stall_timeout,
                request_s=request_timeout,
                has_page=not no_ui,
                is_chatting=chat is Chat.TRANSCRIPT,
            ),
            guard=GuardOptions(
                key=None if no_auth else stage.read_key(api_key_file, os.environ.get(_KEY)),
                hosts=tuple(name.lower() for name in allowed_host or ()),
                origins=tuple(cors_origin or ()),
            ),
            aliases=tuple(alias or ()),
            needs_key=not no_auth,
            warms_up=not no_warm_up,
            logs_all=verbose,
        )
        require_checkpoint(home_of(home), checkpoint)
        is_ready = False

        def on_ready(ready: screen.Ready) -> None:
            nonlocal is_ready
            is_ready = True
            screen.ready(console, ready)

        with console.observing() as observe:
            end = stage.serve(job, options, cluster=cluster, observe=observe, on_ready=on_ready)
        if end.failure is not None:
            if isinstance(end.failure, GrokctlError) and is_ready:
                raise ReportedError(end.failure) from end.failure
            raise end.failure
        screen.ended(console, end.cut_off)
    if end.cut_off:
        raise typer.Exit(ExitCode.INTERRUPTED)
    if not end.is_engine_idle:
        interrupts.leave(ExitCode.OK)  # its thread is in the middle of a step
