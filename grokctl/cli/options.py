"""What people type, as values: the options that commands share, and texts, sizes and meshes."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from grokctl.errors import UsageError

if TYPE_CHECKING:
    from grokctl.model.placement import MeshShape
    from grokctl.model.precision import KvType

_MOST_TEXT: Final = 2**24
"""Characters, far more than any context holds."""

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


def check_prompts(**given: object) -> None:
    """Refuse more than one option that says what to continue; what was not given is None."""
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise UsageError(f"{', '.join(names)}: only one of them can be meant")


def check_many(prompts_file: str | None, *, batch: int | None, echo: bool, no_stream: bool) -> None:
    """Refuse options that mean nothing with, or without, a file of prompts."""
    if prompts_file is None:
        if batch is not None:
            raise UsageError("--batch: means something only with --prompts-file")
        return
    for name, is_given in (("--echo", echo), ("--no-stream", no_stream)):
        if is_given:
            raise UsageError(f"{name}: means nothing with --prompts-file, whose results are JSON")


def read_prompt(prompt: str | None, prompt_file: Path | None, token_ids: str | None) -> str | None:
    """The text to continue; None if token ids were given or a person is to be asked."""
    if prompt_file is not None:
        return read_text(prompt_file)
    if prompt == "-":
        return read_stdin()
    if prompt is None and token_ids is None and not (sys.stdin and sys.stdin.isatty()):
        raise UsageError("there is no prompt", "grokctl run -p 'Once upon a time'")
    return _utf8(prompt, "prompt")


def _utf8(text: str | None, name: str) -> str | None:
    """Refuse what the shell handed over as bytes that are no text."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name}: is no UTF-8 text") from error
    return text


def _limited(text: str, name: str) -> str:
    if len(text) == _MOST_TEXT:
        raise UsageError(f"{name}: is longer than {_MOST_TEXT:,} characters")
    return text


def read_stdin() -> str:
    """All of stdin, of bounded length."""
    if sys.stdin is None:
        raise UsageError("stdin is closed, so there is no text to read")
    try:
        return _limited(sys.stdin.read(_MOST_TEXT), "stdin")
    except UnicodeDecodeError as error:
        raise UsageError("stdin: is no UTF-8 text") from error


def read_text(path: Path) -> str:
    """A text file, of bounded length."""
    try:
        with path.open(encoding="utf-8") as file:
            return _limited(file.read(_MOST_TEXT), str(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is no UTF-8 text") from error


def read_token_ids(text: str) -> list[int]:
    """Read `1,2,3`; nothing is no ids."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        raise UsageError(f"token ids {text[:60]!r} are no numbers", "--token-ids 1,2,3")
    return list(map(int, parts))


def read_counts(text: str, name: str) -> tuple[int, ...]:
    """Read `64,512`: numbers from 1 to 9,999,999, each of them once.

    Raises:
        UsageError: It is something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("0*[1-9][0-9]{0,6}", part) for part in parts):
        raise UsageError(f"{name} {text[:60]!r} are no numbers from 1 to 9,999,999", f"{name} 1,4")
    return tuple(dict.fromkeys(map(int, parts)))


def read_layers(text: str | None) -> frozenset[int] | None:
    """Read `0-3,7`; None if nothing was said.

    Raises:
        UsageError: It is something else.
    """
    return _read_numbers(text, "layers", "--layers 0-3,7")


def _read_numbers(text: str | None, name: str, example: str) -> frozenset[int] | None:
    """Numbers and ranges of numbers; None if nothing was said."""
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})(?:-([0-9]{1,4}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UsageError(f"{name} {text[:60]!r} are no numbers or ranges", example)
        found.update(range(first, last + 1))
    return frozenset(found)


def read_devices(text: str | None) -> frozenset[int] | None:
    """Read `0-7` or `0,1,4-7`; None if nothing was said.

    Raises:
        UsageError: It is something else.
    """
    return _read_numbers(text, "devices", "--only-devices 0-7")


def read_mesh(devices: int | None, mesh: str | None) -> "MeshShape | None":
    """The mesh that the options name together; None if they name none."""
    from grokctl.model.placement import MeshShape

    if mesh is None:
        return None if devices is None else MeshShape(1, devices)
    shape = MeshShape.parse(mesh)
    if devices not in {None, shape.size}:
        raise UsageError(f"mesh {shape} has {shape.size} devices, --devices says {devices}")
    return shape


def read_kv(text: str) -> "KvType":
    """How keys and values are kept.

    Raises:
        UsageError: There is no such way.
    """
    from grokctl.model.precision import KvType

    if text not in set(KvType):
        raise UsageError(f"type of the cache {text!r} is neither compute nor int8", "--kv int8")
    return KvType(text)


def read_size(text: str | None) -> int | None:
    """Read `500kB`, `20MB`, `1.5GiB` or plain bytes.

    Raises:
        UsageError: It is something else, or not positive.
    """
    if text is None:
        return None
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    units |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
    lowered = text.strip().lower().removesuffix("/s").removesuffix("b")
    number = lowered.rstrip("kmgti")
    try:
        size = float(number) * units[lowered[len(number) :]]
    except (ValueError, KeyError):
        size = 0.0
    if not 1 <= size < 2**63:
        raise UsageError(f"size {text!r} is not one such as 500kB or 20MB")
    return int(size)
