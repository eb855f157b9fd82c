"""`grokctl doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from grokctl.cli.context import ReportedError, command, home_of
from grokctl.cli.options import (
    ContextOption,
    HomeOption,
    JsonOption,
    KvOption,
    QuietOption,
    path_of,
)
from grokctl.model.precision import KvType
from grokctl.parse import read_size


def doctor(
    accelerator: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Plan for other hardware, such as h100-80gb or cpu."),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(metavar="N", help="Number of devices to plan for.", show_default=False),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of each device, such as 80GB.")
    ] = None,
    context: ContextOption = None,
    batch: Annotated[
        int,
        typer.Option("--batch", "--slots", metavar="N", min=1, help="Number of prompts at a time."),
    ] = 1,
    kv: KvOption = KvType.COMPUTE,
    to: Annotated[
        Path | None,
        typer.Option(metavar="DIR", parser=path_of, help="Check this folder for the download."),
    ] = None,
    timeout: Annotated[
        int,
        typer.Option(metavar="S", min=1, max=600, help="Wait at most S seconds for a disk or GPU."),
    ] = 20,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: Annotated[
        bool,
        typer.Option("-v", "--verbose", help="Print all facts, redacted for a bug report."),
    ] = False,
    home: HomeOption = None,
) -> None:
    """Show what this machine can run, and a command to fix each problem."""
    with command(as_json=as_json, quiet=quiet, verbose=False) as console:  # a log is not redacted
        from grokctl import doctor as stage
        from grokctl.diagnosis.redaction import Redaction
        from grokctl.screen import doctor as screen

        question = stage.Question(
            accelerator=accelerator,
            devices=devices,
            memory=read_size(memory, "--memory", unit="GB"),
            context=context,
            batch=batch,
            kv=kv,
        )
        where = home_of(home)
        with console.observing() as observe:
            diagnosis, machine = stage.examine(
                where, question, download=to, timeout_s=timeout, observe=observe
            )
        redact = Redaction.here(where.root)
        if verbose:
            diagnosis = screen.redacted(diagnosis, redact)
        if not diagnosis.is_here and devices is None and diagnosis.hardware.count > 1:
            count = diagnosis.hardware.count
            console.note(f"planned for up to {count} devices; --devices N plans for exactly N")
        screen.show(console, diagnosis, machine, redact, is_full=verbose)
        if not diagnosis.is_ok:
            raise ReportedError(screen.failure(diagnosis))
