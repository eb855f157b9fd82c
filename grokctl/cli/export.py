"""`grokctl export`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from grokctl.cli.context import RESUMES, ReportedError, command, found_checkpoint, home_of
from grokctl.cli.options import (
    CheckpointArgument,
    HomeOption,
    JobsOption,
    JsonOption,
    QuietOption,
    VerboseOption,
    path_of,
)
from grokctl.errors import GrokctlError
from grokctl.exporting.options import EmbeddingType, ExportType, Format
from grokctl.parse import read_size


def export(
    checkpoint: CheckpointArgument = None,
    form: Annotated[
        Format,
        typer.Option("--format", help="gguf: llama.cpp and others; hf: SGLang, vLLM up to 0.24."),
    ] = Format.GGUF,
    kind: Annotated[
        ExportType | None,
        typer.Option(
            "--type",
            help="Of the weights; q8_0 holds the released integers, f32 everything.",
            show_default="lossless: q8_0, q4_0 from int4; hf: bf16",
        ),
    ] = None,
    embedding: Annotated[
        EmbeddingType | None,
        typer.Option(help="Of the embedding, also the head.", show_default="f32; hf: bf16"),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Several files, none with more bytes of tensors.",
            show_default="one; hf: 48GB each",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=path_of,
            metavar="DIR",
            help="New folder.",
            show_default="exports/NAME-TYPE-FORMAT",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan only, and estimate its time.")
    ] = False,
    jobs: JobsOption = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory for buffers.", show_default="a quarter of the free memory"
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """Write the same weights for other engines, such as llama.cpp; resumes as reshard does."""
    with command(as_json=as_json, quiet=quiet, verbose=verbose, interrupted=RESUMES) as console:
        from grokctl import export as stage
        from grokctl.checkpoint.sums import proof_kind
        from grokctl.exporting.request import ExportRequest, check_export, plan_export_request
        from grokctl.machine.memory import peak_rss
        from grokctl.resharding.estimate import estimate
        from grokctl.screen import export as screen

        where = home_of(home)
        is_named = checkpoint is not None
        found = found_checkpoint(console, where, checkpoint, ready=is_named, exports=is_named)
        request = ExportRequest(
            root=found.root.absolute(),
            folder=where.exports,
            format=form,
            type=kind,
            embedding=embedding,
            out=out,
            split=read_size(split, "--split", unit="GB"),
            jobs=jobs,
            max_memory=read_size(max_memory, "--max-memory", unit="GB"),
        )
        with console.observing() as observe:
            planned = plan_export_request(request, observe=observe)
        plan = planned.plan
        if dry_run:
            estimated = estimate(plan)
            screen.export_plan(console, plan, estimated)
            try:
                check_export(plan, estimated)
            except GrokctlError as error:
                raise ReportedError(error) from error
            return
        console.note(planned.provenance)
        started = time.perf_counter()
        with console.observing() as observe:
            made = stage.export(plan, proof=planned.proof, observe=observe)
        screen.exported(
            console,
            made,
            plan,
            proven_by=proof_kind(made),
            seconds=time.perf_counter() - started,
            peak_rss=peak_rss(),
        )
