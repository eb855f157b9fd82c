"""`grokctl up`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grokctl.cli.context import RESUMES, command, home_of
from grokctl.cli.environment import certificates_named, hub_to_try, mirrors_named
from grokctl.cli.hints import again
from grokctl.cli.options import (
    DevicesOption,
    HomeOption,
    JsonOption,
    MaxDownloadOption,
    MeshOption,
    MirrorOption,
    NoDhtOption,
    NoLsdOption,
    NoMirrorOption,
    PeerOption,
    QuietOption,
    StallOption,
    ToOption,
    VerboseOption,
    dtype_of,
)
from grokctl.errors import HardwareError, UsageError
from grokctl.model.placement import MeshShape, read_mesh
from grokctl.model.precision import Precision
from grokctl.parse import read_size
from grokctl.paths import Home

if TYPE_CHECKING:
    from grokctl.screen.console import Console


def up(
    source: Annotated[
        str, typer.Argument(help="grok-1, a magnet link (quoted), or a .torrent file.")
    ] = "grok-1",
    devices: DevicesOption = None,
    mesh: MeshOption = None,
    precision: Annotated[
        Precision | None,
        typer.Option(
            parser=dtype_of(Precision),
            metavar="TYPE",
            help="int8, int4, bf16 or float32.",
            show_default="doctor's plan, or int8",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("-p", "--prompt", metavar="TEXT", help="Text to continue at the end."),
    ] = None,
    to: ToOption = None,
    peer: PeerOption = None,
    mirror: MirrorOption = None,
    no_mirror: NoMirrorOption = False,
    no_dht: NoDhtOption = False,
    no_lsd: NoLsdOption = False,
    max_download: MaxDownloadOption = None,
    stall_timeout: StallOption = 300.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """Fetch, verify and reshard in one command, then run; resumes after an interruption."""
    with (
        command(as_json=as_json, quiet=quiet, verbose=verbose, interrupted=RESUMES) as console,
        certificates_named(),
    ):
        from grokctl import up as stage
        from grokctl.fetch import default_root
        from grokctl.screen import up as screen
        from grokctl.transfer.sources import FetchOptions

        if mirror and no_mirror:
            problem = "--mirror, --no-mirror: expected one of them"
            raise UsageError(problem, again(without=("--no-mirror",)))
        if as_json and prompt is not None:
            problem = "--json, --prompt: expected one of them"
            raise UsageError(f"{problem}; `run --json` prints text", again(without=("--json",)))
        where = home_of(home)
        options = FetchOptions(
            peers=tuple(peer or ()),
            mirrors=mirrors_named(mirror),
            hub=None if no_mirror else hub_to_try(),
            max_download=read_size(max_download, "--max-download", unit="MB"),
            dht=not no_dht,
            lsd=not no_lsd,
            stall_timeout_s=stall_timeout,
        )
        root = (to or default_root(source, where.releases)).absolute()
        shape = read_mesh(devices, mesh)
        if shape is None:
            shape, precision = _planned(console, where, root, precision)
        request = stage.UpRequest(
            source=source,
            root=root,
            ready=where.ready,
            mesh=shape,
            precision=precision,
            options=options,
        )
        with console.observing() as observe:
            result = stage.up(request, observe=observe)
        if prompt is None:
            screen.got_ready(console, result)
    if prompt is not None:
        from grokctl.cli.run import run

        run(str(result.ready.root), prompt=prompt, quiet=quiet, verbose=verbose, home=home)


def _planned(
    console: "Console", home: Home, root: Path, precision: Precision | None
) -> tuple[MeshShape, Precision]:
    """The mesh and precision of doctor's best plan for this machine.

    Raises:
        HardwareError: Nothing fits it.
    """
    from grokctl.doctor import Question, examine

    with console.observing() as observe:
        diagnosis, _ = examine(home, Question(), download=root, observe=observe)
    if diagnosis.best is None:
        raise HardwareError("no plan fits this machine", "grokctl doctor  # or up --devices N")
    best = diagnosis.best
    console.note(f"planned for {best.mesh.size} devices ({best.mesh}), {best.precision}")
    return best.mesh, precision or best.precision
