"""How a command begins and ends: the console, the processes of a run, and the exit status."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

from grokctl import interrupts
from grokctl.errors import ExitCode, GrokctlError
from grokctl.os_errors import refusal
from grokctl.paths import Home, default_home

if TYPE_CHECKING:
    from grokctl.cluster.process_group import Cluster
    from grokctl.screen.console import Console
    from grokctl.session.job import Wanted


GOES_ON: Final = "interrupted; the same command goes on where it stopped"


class ReportedError(Exception):
    """A failure whose result was rendered in full already."""

    def __init__(self, error: GrokctlError) -> None:
        super().__init__(error)
        self.error = error


@contextmanager
def command(
    *, as_json: bool, quiet: bool, verbose: bool, interrupted: str = "interrupted"
) -> Iterator["Console"]:
    """A console that says how the command ended."""
    from grokctl.screen.console import Console

    if verbose:
        import logging

        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", force=True)
    console = Console(as_json=as_json, quiet=quiet)
    try:
        yield console
    except ReportedError as reported:
        console.failure(reported.error, has_result=True)
        raise reported.error from None
    except GrokctlError as error:
        console.failure(error)
        raise
    except BrokenPipeError:
        raise
    except OSError as error:
        failure = refusal(error)  # no stage translated it
        console.failure(failure)
        raise failure from error
    except (KeyboardInterrupt, SystemError) as error:
        if isinstance(error, SystemError) and not interrupts.has_arrived():
            raise
        console.note(interrupted)
        raise typer.Exit(ExitCode.INTERRUPTED) from error


@contextmanager
def cluster_of(
    console: "Console",
    by_hand: tuple[str | None, int | None, int | None],
    *,
    timeout_s: int,
    verbose: bool,
) -> Iterator["Cluster | None"]:
    """The processes that this one was started with; None if it is alone."""
    from grokctl.cluster.launcher import find_launch

    coordinator, count, rank = by_hand
    launch = find_launch(os.environ, coordinator=coordinator, num_processes=count, process_id=rank)
    if launch is None:
        yield None
        return
    from grokctl.cluster.process_group import joined

    if launch.rank:
        console.step_back(f"rank {launch.rank}", verbose=verbose)
    with joined(
        launch, bound_s=timeout_s, report=console.failure, note=console.note, verbose=verbose
    ) as cluster:
        yield cluster


def followed(console: "Console", home: Home, wanted: "Wanted", cluster: "Cluster | None") -> bool:
    """Do what rank 0 does, unless this is rank 0 or alone; whether that was so."""
    if cluster is None or not cluster.rank:
        return False
    from grokctl.session.complete import follow

    follow(console, home, wanted, cluster)
    return True


def home_of(path: Path | None) -> Home:
    """The home that `--home` names, or the default."""
    return Home(path if path is not None else default_home())
