"""What people type, as values: the options that commands share, and texts, sizes and meshes."""

from pathlib import Path
from typing import Annotated

import typer

CheckpointArgument = Annotated[
    str | None,
    typer.Argument(metavar="CHECKPOINT", help="A name under home, or a path.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Only results and errors.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Log what happens.")]
HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home",
        metavar="DIR",
        parser=Path,  # typer's own would look at it, and wait for a disk that does not answer
        help="Where checkpoints are kept ($GROKCTL_HOME).",
        show_default=False,
    ),
]
PeerOption = Annotated[
    list[str] | None, typer.Option("--peer", metavar="HOST:PORT", help="Somebody who has it.")
]
WebSeedOption = Annotated[list[str] | None, typer.Option(metavar="URL", help="BEP 19 seed.")]
MirrorOption = Annotated[
    list[str] | None,
    typer.Option("--mirror", metavar="hf|URL", help="HTTP mirror, beside the swarm."),
]
TrackerOption = Annotated[list[str] | None, typer.Option(metavar="URL", help="Another tracker.")]
NoDhtOption = Annotated[bool, typer.Option("--no-dht", help="Do not use the DHT.")]
NoLsdOption = Annotated[bool, typer.Option("--no-lsd", help="Do not look for peers in the LAN.")]
BindOption = Annotated[str | None, typer.Option(metavar="ADDR", help="Local address to use.")]
PortOption = Annotated[int | None, typer.Option(metavar="N", help="Port to listen on.")]
ProxyOption = Annotated[str | None, typer.Option(metavar="URL", help="socks5:// or http://")]
StallOption = Annotated[
    float, typer.Option("--stall-timeout", metavar="S", help="Give up after S quiet seconds.")
]
DevicesOption = Annotated[
    int | None, typer.Option(metavar="N", help="1, 2, 4, 8 or 16.", show_default=False)
]
MeshOption = Annotated[
    str | None, typer.Option(metavar="MESH", help="Such as expert=2,model=8.", show_default=False)
]
ComputeOption = Annotated[
    str | None,
    typer.Option(metavar="TYPE", help="bfloat16 or float32.", show_default="by hardware"),
]
KvOption = Annotated[str, typer.Option("--kv", metavar="TYPE", help="Cache: compute or int8.")]
ContextOption = Annotated[
    int | None, typer.Option(metavar="N", help="Tokens of context.", show_default="the model's")
]
TokenIdsOption = Annotated[
    str | None, typer.Option(metavar="1,2,3", help="Token ids instead of text.")
]
CoordinatorOption = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Of process 0, by hand; see docs/cluster.md."),
]
NumProcessesOption = Annotated[int | None, typer.Option(metavar="N", help="How many, by hand.")]
ProcessIdOption = Annotated[int | None, typer.Option(metavar="I", help="This one, from 0.")]
ClusterTimeoutOption = Annotated[
    int,
    typer.Option(metavar="S", min=20, help="All end within S seconds of losing one."),
]
