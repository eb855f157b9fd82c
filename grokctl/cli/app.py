"""Declare commands, call one library function each, and turn errors into exit statuses."""

import io
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final, NoReturn

import typer
from typer.core import TyperGroup

from grokctl import __version__, interrupts
from grokctl.cli import bench, demo, doctor, fetch, inspect, reshard, run, score, verify
from grokctl.errors import ExitCode, GrokctlError, UsageError

_ParseError: Final = typer.BadParameter.__base__
"""What typer raises for a command line that it cannot read; it exports only the subclass."""


class ErrorBoundary(TyperGroup):
    """The only place where a `GrokctlError` becomes an exit status."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read what stands before the command."""
        ctx.obj = "--json" in args
        if not args:
            return super().parse_args(ctx, args)  # prints the help
        with _parse_errors(as_json=ctx.obj):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            with _parse_errors(as_json=ctx.obj):
                return super().invoke(ctx)
        except GrokctlError as error:
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(ExitCode.INTERRUPTED) from error
        except BrokenPipeError as error:
            raise typer.Exit(ExitCode.OK) from error  # whoever read our output has enough


@contextmanager
def _parse_errors(*, as_json: bool) -> Iterator[None]:
    """Say what is wrong with a command line as every other failure is said."""
    try:
        yield
    except _ParseError as error:  # type: ignore[misc]  # a class of exceptions, found at run time
        from grokctl.screen.console import Console

        message = error.format_message().replace("Value error, ", "").rstrip(".")
        where = error.ctx.command_path if error.ctx else "grokctl"
        failure = UsageError(message[:1].lower() + message[1:], f"{where} --help")
        Console(as_json=as_json).failure(failure)
        raise typer.Exit(failure.exit_code) from error


app = typer.Typer(
    cls=ErrorBoundary,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="From a magnet link to text from Grok-1, on the hardware you have.",
    epilog="Start with: grokctl demo",
)


def main() -> NoReturn:
    """The `grokctl` command."""
    try:
        interrupts.install()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a narrow locale is no reason to fail
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
    except Exception:
        if not interrupts.is_abrupt():
            raise
        traceback.print_exc()
        interrupts.leave(ExitCode.BUG)
    raise AssertionError  # app() exits


@app.callback(invoke_without_command=True)
def grokctl(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """From a magnet link to text from Grok-1, on the hardware you have."""
    if version:
        sys.stdout.write(f"grokctl {__version__}\n")
        raise typer.Exit


for _command, _example in (
    (doctor.doctor, "grokctl doctor --accelerator h100-80gb --devices 8"),
    (fetch.fetch, "grokctl fetch --max-download 20MB"),
    (verify.verify, "grokctl verify grok-1 --repair"),
    (inspect.inspect, "grokctl inspect grok-1 --tensor 'layers.10.*' --stats"),
    (reshard.reshard, "grokctl reshard grok-1 --devices 16 --mesh expert=2,model=8"),
    (run.run, "grokctl run -p 'The answer to life is' -n 32 --temperature 0"),
    (score.score, "grokctl score --text essay.txt --compute float32"),
    (bench.bench, "grokctl bench --prompt-tokens 64,512 --batch 1,4,16"),
    (demo.demo, "grokctl demo --keep ./demo"),
):
    app.command(epilog=f"Example: {_example}")(_command)
