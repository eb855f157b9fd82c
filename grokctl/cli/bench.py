"""`grokctl bench`."""

from typing import Annotated

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
    VerboseOption,
)
from grokctl.cluster.launcher import BOUND_S
from grokctl.parse import read_counts


def bench(
    checkpoint: CheckpointArgument = None,
    prompt_tokens: Annotated[
        str, typer.Option(metavar="64,512", help="Lengths of prompts.")
    ] = "64,512",
    max_tokens: Annotated[
        int, typer.Option("-n", "--max-tokens", metavar="N", min=2, help="Tokens after each.")
    ] = 32,
    batch: Annotated[str, typer.Option(metavar="1,4", help="Prompts at a time.")] = "1,4",
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
    """How fast it reads and writes, beside what this machine's memory allows."""
    by_hand = (coordinator, num_processes, process_id)
    with (
        command(as_json=as_json, quiet=quiet, verbose=verbose) as console,
        cluster_of(console, by_hand, timeout_s=cluster_timeout, verbose=verbose) as cluster,
    ):
        lengths = read_counts(prompt_tokens, "--prompt-tokens")
        batches = read_counts(batch, "--batch")

        from grokctl import bench as stage
        from grokctl.screen import bench as screen
        from grokctl.session.job import Wanted, open_job

        workloads = [stage.Workload(length, many) for length in lengths for many in batches]
        wanted = Wanted(
            *(checkpoint, devices, mesh),
            compute=compute,
            kv=kv,
            context=context,
            streams=max(batches),
        )
        if followed(console, home_of(home), wanted, cluster):
            return
        with console.observing() as observe:
            job = open_job(console, home_of(home), wanted, observe, cluster=cluster)
            stage.check_workloads(job.plan, workloads, max_tokens)
            found = stage.bench(
                job.start(observe), workloads, max_tokens=max_tokens, observe=observe
            )
        screen.bench(console, found, job.options)
