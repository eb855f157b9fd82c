"""`grokctl doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from grokctl.cli.context import ReportedError, command, home_of
from grokctl.cli.options import ContextOption, HomeOption, JsonOption, KvOption, QuietOption
from grokctl.model.precision import read_kv
from grokctl.parse import read_size


def doctor(
    accelerator: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="One that is not here, such as h100-80gb, or cpu."),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(metavar="N", help="How many of them.", show_default=False)
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of each, such as 80GB.")
    ] = None,
    context: ContextOption = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts at a time.")] = 1,
    kv: KvOption = "compute",
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", parser=Path, help="Folder to download to.")
    ] = None,
    timeout: Annotated[
        int, typer.Option(metavar="S", min=1, max=600, help="Wait S seconds for what is silent.")
    ] = 20,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="All that was found, to paste into an issue.")
    ] = False,
    home: HomeOption = None,
) -> None:
    """What this machine can do, or another, and the line that mends what it cannot."""
    with command(as_json=as_json, quiet=quiet, verbose=False) as console:  # a log is not redacted
        from grokctl import doctor as stage
        from grokctl.diagnosis.inventory import take_stock
        from grokctl.diagnosis.redaction import Redaction
        from grokctl.machine.look import look
        from grokctl.screen import doctor as screen

        question = stage.Question(
            accelerator=accelerator,
            devices=devices,
            memory=read_size(memory),
            context=context,
            batch=batch,
            kv=read_kv(kv),
        )
        where = home_of(home)
        machine = inventory = None
        if question.is_here:
            with console.observing() as observe:
                machine = look(where.root.absolute(), to, timeout_s=timeout, observe=observe)
            inventory = take_stock(where, timeout_s=timeout)
        found, redact = (
            stage.doctor(machine, inventory, question=question),
            Redaction.here(where.root),
        )
        if verbose:
            found = screen.redacted(found, redact)
        screen.show(console, found, machine, redact, is_full=verbose)
        if not found.is_ok:
            raise ReportedError(screen.failure(found))
