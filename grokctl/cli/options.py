"""Options that several commands share."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from grokctl.errors import UsageError
from grokctl.model.precision import Compute, KvType
from grokctl.paths import Home, default_home, folders_in, typed_path


def path_of(text: str) -> Path:
    """The path of an option, with the user's home for `~`.

    Typer's own looks at the path, and blocks on a disk that does not answer.
    """
    try:
        return typed_path(text, "")
    except UsageError as error:
        raise typer.BadParameter(str(error).removeprefix(": ")) from error


_Dtype = TypeVar("_Dtype", bound=StrEnum)


def dtype_of(kind: type[_Dtype]) -> Callable[[str], _Dtype]:
    """A parser of dtypes by any spelling, such as `bf16` or `bfloat16`."""

    def read(text: str) -> _Dtype:
        try:
            return kind(text)
        except ValueError:
            names = ", ".join(kind)
            raise typer.BadParameter(f"expected one of {names}, found {text!r}") from None

    return read


def checkpoint_names(context: typer.Context, incomplete: str) -> list[str]:
    """Names of checkpoints under home that begin so: for the completion of a shell."""
    home = _home_in(context)
    folders = () if home is None else (home.ready, home.releases, home.exports)
    names = {path.name for folder in folders for path in folders_in(folder)}
    return sorted(name for name in names if name.startswith(incomplete))


def kept_names(context: typer.Context, incomplete: str) -> list[str]:
    """The same of all that can be removed, with the folder that it is in."""
    home = _home_in(context)
    if home is None:
        return []
    above = (home.ready, home.releases, home.exports, home.root / "cache")
    names = [f"{folder.name}/{path.name}" for folder in above for path in folders_in(folder)]
    return sorted(name for name in names if name.startswith(incomplete))


def _home_in(context: typer.Context) -> Home | None:
    try:
        return Home(context.params.get("home") or default_home())
    except UsageError:
        return None


CheckpointArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A checkpoint's name under home, or a path.",
        show_default=False,
        autocompletion=checkpoint_names,
    ),
]

# every command

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Print results and errors only.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Print a log.")]
HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home",
        metavar="DIR",
        parser=path_of,
        help="Folder for checkpoints ($GROKCTL_HOME).",
        show_default=False,
    ),
]
JobsOption = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Number of threads.", show_default="cores"),
]

# where a release is downloaded from

PeerOption = Annotated[
    list[str] | None,
    typer.Option("--peer", metavar="HOST:PORT", help="A peer that has the files."),
]
MirrorOption = Annotated[
    list[str] | None,
    typer.Option("--mirror", metavar="hf|URL", help="An HTTP mirror, used beside the swarm."),
]
WebSeedOption = Annotated[list[str] | None, typer.Option(metavar="URL", help="A BEP 19 web seed.")]
TrackerOption = Annotated[
    list[str] | None, typer.Option(metavar="URL", help="An additional tracker.")
]
PortOption = Annotated[int | None, typer.Option(metavar="N", help="Port to listen on.")]
BindOption = Annotated[str | None, typer.Option(metavar="ADDR", help="Local address to use.")]
ProxyOption = Annotated[
    str | None, typer.Option(metavar="URL", help="Proxy for all traffic: socks5:// or http://.")
]
NoDhtOption = Annotated[bool, typer.Option("--no-dht", help="Do not use the DHT.")]
NoLsdOption = Annotated[bool, typer.Option("--no-lsd", help="Do not search for peers on the LAN.")]
NoTrackersOption = Annotated[
    bool, typer.Option("--no-trackers", help="Ask no trackers but those of --tracker.")
]
StallOption = Annotated[
    float,
    typer.Option("--stall-timeout", metavar="S", help="Fail after S seconds without data."),
]

# how a checkpoint runs

DevicesOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Number of devices: 1, 2, 4, 8 or 16.", show_default=False),
]
MeshOption = Annotated[
    str | None,
    typer.Option(
        metavar="MESH", help="Shape of the mesh, such as expert=2,model=8.", show_default=False
    ),
]
ComputeOption = Annotated[
    Compute | None,
    typer.Option(
        parser=dtype_of(Compute),
        metavar="TYPE",
        help="Compute in bfloat16 or float32.",
        show_default="by hardware",
    ),
]
ToOption = Annotated[
    Path | None,
    typer.Option(
        parser=path_of,
        metavar="DIR",
        help="Folder for the release.",
        show_default="releases/NAME",
    ),
]
NoMirrorOption = Annotated[
    bool, typer.Option("--no-mirror", help="Ask no hub if no peer sends the metadata.")
]
MaxDownloadOption = Annotated[
    str | None, typer.Option(metavar="RATE", help="Download limit per second, such as 20MB.")
]
KvOption = Annotated[
    KvType,
    typer.Option("--kv", metavar="TYPE", help="KV cache: int8, or as --compute."),
]
ContextOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Context length in tokens.", show_default="what fits"),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Threads of the CPU.", show_default="cores"),
]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="Most memory; experts beyond it stream.",
        show_default="free",
    ),
]
TokenIdsOption = Annotated[
    str | None, typer.Option(metavar="1,2,3", help="Token ids instead of text.")
]

# a run of several processes

CoordinatorOption = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Address of rank 0 (manual launch, docs/cluster.md)."),
]
NumProcessesOption = Annotated[
    int | None, typer.Option(metavar="N", help="Number of processes (manual launch).")
]
ProcessIdOption = Annotated[
    int | None, typer.Option(metavar="I", help="Rank of this process (manual launch).")
]
ClusterTimeoutOption = Annotated[
    int,
    typer.Option(metavar="S", min=20, help="Exit within S seconds after a process is lost."),
]
