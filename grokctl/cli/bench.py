"""`grokctl bench`."""

from typing import Annotated

import typer

from grokctl.cli.context import cluster_of, command, followed, home_of, name_as_typed
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
)
from grokctl.cluster.launcher import BOUND_S
from grokctl.model.placement import read_mesh
from grokctl.model.precision import KvType
from grokctl.parse import read_counts, read_size


def bench(
    checkpoint: CheckpointArgument = None,
    prompt_tokens: Annotated[
        str, typer.Option(metavar="64,512", help="Lengths of the prompts.")
    ] = "64,512",
    max_tokens: Annotated[
        int,
        typer.Option("-n", "--max-tokens", metavar="N", min=2, help="Tokens after each prompt."),
    ] = 32,
    batch: Annotated[str, typer.Option(metavar="1,4", help="Batch sizes to measure.")] = "1,4",
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
    """Measure prefill and decode speed, compared with the memory bandwidth."""
    by_hand = (coordinator, num_processes, process_id)
    with (
        command(as_json=as_json, quiet=quiet, verbose=verbose) as console,
        jax_prepared(threads),
        cluster_of(
            console, by_hand, home=home, timeout_s=cluster_timeout, verbose=verbose
        ) as cluster,
    ):
        lengths = read_counts(prompt_tokens, "--prompt-tokens")
        batches = read_counts(batch, "--batch")

        from grokctl import bench as stage
        from grokctl.screen import bench as screen
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
            sequences=max(batches),
        )
        if followed(console, request, cluster):
            return
        workloads = [stage.Workload(length, size) for length in lengths for size in batches]
        with console.observing() as observe:
            job = open_job(request, cluster=cluster, observe=observe)
            stage.check_workloads(job.plan, workloads, max_tokens)
            engine = job.start(observe)
            result = stage.bench(engine, workloads, max_tokens=max_tokens, observe=observe)
        screen.bench(console, result, job.options)
