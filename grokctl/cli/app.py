"""The `grokctl` command: registers every subcommand, and starts and ends the process."""

import io
import sys
import traceback
from typing import Annotated, Final, NoReturn

import typer

from grokctl import __version__, interrupts
from grokctl.cli import (
    bench,
    demo,
    doctor,
    export,
    fetch,
    inspect,
    remove,
    reshard,
    run,
    score,
    serve,
    up,
    verify,
)
from grokctl.cli.context import ErrorBoundary, exit_code_of, limit_of
from grokctl.cli.environment import one_thread_of_blas
from grokctl.cli.help import GroupedCommand
from grokctl.cli.list import list_
from grokctl.cli.options import HomeOption
from grokctl.errors import ExitCode

app = typer.Typer(
    cls=ErrorBoundary,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="From a magnet link to text from Grok-1, on the hardware you have.",
    epilog="Start with: grokctl demo",
)


def main() -> NoReturn:
    """The `grokctl` command."""
    one_thread_of_blas()
    try:
        interrupts.install()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a narrow locale is no failure
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        interrupts.leave()
    except SystemExit as end:
        if end.code == ExitCode.INTERRUPTED:
            interrupts.leave()
        if interrupts.is_abrupt():
            interrupts.leave(end.code if isinstance(end.code, int) else bool(end.code))
        interrupts.flush()
        raise
    except (MemoryError, RuntimeError, ImportError) as error:
        _end_by_limit(error)
    except Exception as error:  # noqa: BLE001 (a bug, reported as Python does)
        _end_by_bug(error)
    raise AssertionError  # app() exits


def _end_by_limit(error: Exception) -> NoReturn:
    """End because of a limit of this process that was met outside of every command.

    There may be no thread that watches for Ctrl-C, and no memory for a console.
    """
    failure = None if interrupts.is_abrupt() else limit_of(error)
    if failure is None:
        _end_by_bug(error)
    sys.stderr.write(f"error: {failure}\nhint: {failure.hint}\n")
    sys.exit(failure.exit_code)


def _end_by_bug(error: Exception) -> NoReturn:
    if not interrupts.is_abrupt():
        raise error
    traceback.print_exception(error)
    interrupts.leave(exit_code_of(error))


@app.callback(invoke_without_command=True)
def grokctl(
    context: typer.Context,
    version: Annotated[bool, typer.Option("-V", "--version", help="Print the version.")] = False,
    home: HomeOption = None,
) -> None:
    """From a magnet link to text from Grok-1, on the hardware you have."""
    if version:
        _print_version()
        raise typer.Exit
    if home is not None:  # before the command, as good as after it
        context.default_map = {name: {"home": str(home)} for name in _NAMES}


@app.command("version", hidden=True)
def _print_version() -> None:
    """Print the version."""
    sys.stdout.write(f"grokctl {__version__}\n")


@app.command("help", hidden=True)
def _print_help(context: typer.Context, command: Annotated[str, typer.Argument()] = "") -> None:
    """Show the help of a command."""
    app([command, "--help"] if command else ["--help"], prog_name=context.find_root().info_name)


_COMMANDS: Final = (
    (doctor.doctor, "grokctl doctor --accelerator h100-80gb --devices 8"),
    (up.up, "grokctl up --devices 8 -p 'The answer to life is'"),
    (fetch.fetch, "grokctl fetch --max-download 20MB"),
    (verify.verify, "grokctl verify grok-1 --repair"),
    (inspect.inspect, "grokctl inspect grok-1 --tensor 'layers.10.*' --stats"),
    (reshard.reshard, "grokctl reshard grok-1 --devices 16 --mesh expert=2,model=8"),
    (export.export, "grokctl export grok-1 --format gguf --split 48GB"),
    (run.run, "grokctl run -p 'The answer to life is' -n 32 --temperature 0"),
    (serve.serve, "grokctl serve --host 0.0.0.0 --api-key-file key.txt --slots 16"),
    (score.score, "grokctl score --text essay.txt --compute float32"),
    (bench.bench, "grokctl bench --prompt-tokens 64,512 --batch 1,4,16"),
    (list_, "grokctl list"),
    (remove.remove, "grokctl remove ready/grok-1-int8-8"),
    (demo.demo, "grokctl demo --keep ./demo"),
)
_NAMES: Final = tuple(command.__name__.rstrip("_") for command, _ in _COMMANDS)
for _command, _example in _COMMANDS:
    _name = _command.__name__.rstrip("_")
    app.command(_name, epilog=f"Example: {_example}", cls=GroupedCommand)(_command)
