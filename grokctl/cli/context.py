"""How a command begins and ends: its console, the processes of its run, and its exit code.

A command that fails raises, and three places act on that, from the inside out:

1. `cluster_of` ends the other processes of the run.
2. `command` prints the failure.
3. `ErrorBoundary` exits with the code that `exit_code_of` chooses.

Only the failure of another rank ends a process elsewhere: `cluster/ending`, with its own code.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer
from typer.core import TyperGroup

from grokctl import interrupts
from grokctl.cli.hints import again, arguments_typed, remember, to_paste
from grokctl.errors import ExitCode, GrokctlError, InvalidValueError, UsageError
from grokctl.os_errors import refusal
from grokctl.paths import Home, default_home

if TYPE_CHECKING:
    from grokctl.checkpoint.finding import Found
    from grokctl.cluster.process_group import Cluster
    from grokctl.screen.console import Console
    from grokctl.session.job import JobRequest

RESUMES: Final = "interrupted; the same command resumes where it stopped"

_ParseError: Final = typer.BadParameter.__base__
"""Raised by typer for an invalid command line; typer exports only this subclass of it."""
_TYPERS_WORDS: Final = {
    "^Input should be greater than or equal to ": "expected at least ",
    "^Input should be less than or equal to ": "expected at most ",
    "^Input should be a valid integer.*": "expected an integer",
    "^Input should be a valid number.*": "expected a number",
    "^('.*') is not one of (.*)": r"expected one of \2, found \1",
}
"""Typer's patterns, and our words; anything else stays as typer has it."""
_FIELDS: Final = {"stall_timeout_s": "--stall-timeout", "slots": "--batch"}
"""Fields of the library whose option has another name than theirs."""


class ReportedError(Exception):
    """A failure that the result, printed already, shows in full."""

    def __init__(self, error: GrokctlError) -> None:
        super().__init__(error)
        self.error = error


def exit_code_of(end: BaseException) -> ExitCode:
    """The exit code of a command that ended with an exception."""
    match end:
        case GrokctlError():
            return end.exit_code
        case BrokenPipeError():
            return ExitCode.OK  # whoever reads our output has closed it
        case KeyboardInterrupt():
            return ExitCode.INTERRUPTED
        case SystemError() if interrupts.has_arrived():
            return ExitCode.INTERRUPTED  # C code replaces the exception that it is hit by
        case _:
            return ExitCode.BUG


class ErrorBoundary(TyperGroup):
    """Turns what a command raises into the exit code of the process."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what precedes the command."""
        ctx.obj = "--json" in args
        remember(args, self.commands)
        if not args:
            return super().parse_args(ctx, args)  # prints the help
        if failure := _misencoded(args):
            from grokctl.screen.console import Console

            Console(as_json=ctx.obj).failure(failure)
            raise typer.Exit(exit_code_of(failure))
        with _parse_errors(as_json=ctx.obj):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with _parse_errors(as_json=ctx.obj):
                return super().invoke(ctx)
        except (GrokctlError, BrokenPipeError, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt):
                typer.echo("interrupted", err=True)
            raise typer.Exit(exit_code_of(error)) from error


@contextmanager
def _parse_errors(*, as_json: bool) -> Iterator[None]:
    """Report an invalid command line as every other failure is reported."""
    try:
        yield
    except _ParseError as error:  # type: ignore[misc]  # a class of exceptions, found at run time
        from grokctl.screen.console import Console

        failure = _usage_error(error)
        Console(as_json=as_json).failure(failure)
        raise typer.Exit(exit_code_of(failure)) from error


def _usage_error(error: Any) -> UsageError:
    """What typer refused, with a command that is likely meant, or else the help."""
    where = error.ctx.command_path if error.ctx else "grokctl"
    extra = re.fullmatch(r"Got unexpected extra argument\S* \((.*)\)\.?", error.format_message())
    if extra is None:
        return UsageError(_noun_first(error.format_message()), f"{where} --help")
    hint, words = f"{where} --help", arguments_typed()[1:]
    if where.endswith(" run") and words and words[0] not in arguments_typed()[:1]:
        hint = again("-p", " ".join(words), instead_of=words)
    return UsageError(f"{extra[1]}: unexpected argument", hint)


def _misencoded(args: list[str]) -> UsageError | None:
    """The error for an argument that is not UTF-8, such as a name from an older system."""
    for before, arg in pairwise(["", *args]):
        try:
            arg.encode()
        except UnicodeEncodeError:
            option = arg.partition("=")[0] if arg.startswith("--") else before
            name = option if option.startswith("-") else "argument"
            shown = repr(arg.encode(errors="surrogateescape"))[1:]
            return UsageError(f"{name}: expected UTF-8, found {shown}")
    return None


def _noun_first(message: str) -> str:
    """Typer's `Invalid value for '-n' / '--max-tokens': Input …` as `--max-tokens: expected …`."""
    message = message.replace("Value error, ", "").rstrip(".")
    match = re.fullmatch(r"Invalid value for .*?'([^' ]+)': (.*)", message, re.DOTALL)
    option, problem = (f"{match[1]}: ", match[2]) if match else ("", message)
    for pattern, words in _TYPERS_WORDS.items():
        problem = re.sub(pattern, words, problem)
    return option + problem[:1].lower() + problem[1:]


@contextmanager
def command(
    *, as_json: bool, quiet: bool, verbose: bool, interrupted: str = "interrupted"
) -> Iterator["Console"]:
    """The console of a command; prints how the command failed.

    Args:
        as_json: Print one JSON object on stdout, and events on stderr.
        quiet: Print results and errors only.
        verbose: Log to stderr.
        interrupted: Printed after Ctrl-C or SIGTERM.
    """
    from grokctl.machine.limits import require_memory
    from grokctl.screen.console import Console

    if verbose:
        import logging

        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", force=True)
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs signed addresses
    console = Console(as_json=as_json, quiet=quiet)
    try:
        require_memory()
        with _options_as_typed():
            yield console
    except ReportedError as reported:
        reported.error.hint = to_paste(reported.error.hint)
        console.failure(reported.error, has_result=True)
        raise reported.error from None
    except GrokctlError as error:
        error.hint = to_paste(error.hint)
        console.failure(error)
        raise
    except BrokenPipeError:
        raise
    except (MemoryError, RuntimeError, ImportError) as error:
        limited = limit_of(error)
        if limited is None:
            raise
        console.failure(limited)
        raise limited from error
    except OSError as error:
        failure = refusal(error)  # no stage translated it
        console.failure(failure)
        raise failure from error
    except (KeyboardInterrupt, SystemError) as error:
        code = exit_code_of(error)
        if code is not ExitCode.INTERRUPTED:
            raise
        console.note(interrupted)
        raise typer.Exit(code) from error


def limit_of(error: Exception) -> GrokctlError | None:
    """The error for a limit of this process that Python ran into; None if it is another."""
    from grokctl.machine.limits import limit_in, little_memory

    return little_memory() if isinstance(error, MemoryError) else limit_in(str(error))


@contextmanager
def cluster_of(
    console: "Console",
    by_hand: tuple[str | None, int | None, int | None],
    *,
    home: Path | None,
    timeout_s: int,
    verbose: bool,
) -> Iterator["Cluster | None"]:
    """The processes of this run; None if this one is alone.

    Args:
        console: Of this process; prints no results if it has another rank than 0.
        by_hand: `--coordinator`, `--num-processes` and `--process-id`, instead of a launcher.
        home: `--home`, where the secret of the job may be.
        timeout_s: After the loss of one process, all others end within this many seconds.
        verbose: Print the notes of every rank.
    """
    from grokctl.cluster.launcher import find_launch

    coordinator, count, rank = by_hand
    launch = find_launch(os.environ, coordinator=coordinator, num_processes=count, process_id=rank)
    if launch is None:
        yield None
        return
    from grokctl.cluster.process_group import joined
    from grokctl.cluster.secret import find_secret

    secret = find_secret(os.environ, home_of(home))
    if launch.rank:
        console.step_back(f"rank {launch.rank}", verbose=verbose)
    with (
        joined(
            launch,
            secret,
            bound_s=timeout_s,
            report=console.failure,
            note=console.note,
            verbose=verbose,
        ) as cluster,
        _options_as_typed(),  # inside, because the other ranks print the failure, too
    ):
        yield cluster


def followed(
    console: "Console",
    request: "JobRequest",
    cluster: "Cluster | None",
    prompt: tuple[object, ...] = (),
) -> bool:
    """Run what rank 0 runs, to its end, if this process has another rank.

    Args:
        console: Of this process.
        request: What it was asked to run.
        cluster: The processes of the run.
        prompt: What each process was asked to continue: rank 0's counts.

    Returns:
        Whether it has; then the command is done.
    """
    if cluster is None:
        return False
    own = [None if value is None else str(value) for value in prompt]
    first = cluster.share(None if cluster.rank else {"prompt": own})["prompt"]
    if not cluster.rank:
        return False
    if any(value is not None for value in own) and own != first:
        console.note("the prompt of this rank is ignored: rank 0's is continued", always=True)
    from grokctl.session.complete import follow

    follow(console, request, cluster)
    return True


@contextmanager
def _options_as_typed() -> Iterator[None]:
    """Name options in errors that the library raises about its fields."""
    try:
        yield
    except InvalidValueError as error:
        raise error.renamed(option_of(error.name)) from error


def option_of(name: str) -> str:
    """The option for a field of the library; variables and options keep their names."""
    if name in _FIELDS:
        return _FIELDS[name]
    is_field = name.isidentifier() and name.islower()
    return f"--{name.replace('_', '-')}" if is_field else name


def home_of(path: Path | None) -> Home:
    """The home that `--home` names, or the default."""
    return Home(path if path is not None else default_home())


def name_as_typed(console: "Console", home: Home, name: str | None) -> None:
    """Let no message name the folder of links under home instead of the release that is meant.

    Args:
        console: Prints the messages.
        home: Has the folder of links.
        name: Of the checkpoint, as it was typed; None if it was not.
    """
    from grokctl.checkpoint.finding import shown_places

    with suppress(OSError, UsageError):  # the command itself says so
        for place, shown in shown_places(home, name):
            console.places.add(place, shown)


def require_checkpoint(home: Home, name: str | None) -> None:
    """Refuse a checkpoint that is not there before anything else is asked of the user.

    Raises:
        UsageError: A name was typed, and nothing has it.
    """
    from grokctl.checkpoint.finding import find_checkpoint

    if name is not None:
        find_checkpoint(home, name)


def found_checkpoint(
    console: "Console",
    home: Home,
    name: str | None,
    *,
    ready: bool = True,
    exports: bool = False,
    in_any_folder: bool = False,
) -> "Found":
    """The checkpoint that is meant; prints what was taken if that is not what was typed.

    Args:
        console: Gets the line.
        home: Where checkpoints are kept.
        name: Under home, or a path; None for the usual one.
        ready: Whether the command works on a ready checkpoint.
        exports: Whether it works on an export.
        in_any_folder: Whether a folder need not have the shape of a checkpoint.
    """
    from grokctl.checkpoint.finding import find_checkpoint
    from grokctl.checkpoint.proving import any_folder

    name_as_typed(console, home, name)
    try:
        found = find_checkpoint(home, name, ready=ready, exports=exports)
    except UsageError:
        loose = any_folder(name) if in_any_folder and name is not None else None
        if loose is None:
            raise
        found = loose
    if found.note is not None:
        console.note(found.note)
    return found
