"""Draw grokctl in a real terminal (tmux) as docs/*.svg: `python docs/picture.py [NAME]…`."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from grokctl.checkpoint.miniature import write_miniature
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.torrent import build_metainfo
from grokctl.fetch import seeding
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard

COLUMNS, LINES = 100, 80
DONE = "echo picture taken; sleep 60"
PATIENCE_S = 300.0
SESSION = f"grokctl-picture-{os.getpid()}"
GROKCTL = Path(sys.executable).with_name("grokctl")
FILES, FILE_NBYTES, RATE = 24, 8_000_000, "12MB"


def tmux(*arguments: str) -> str:
    command = ["tmux", "-L", SESSION, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def take(command: str, until: str, picture: str, *, shown: str) -> None:
    """Run a command in a terminal until a pattern appears, then save the screen.

    Args:
        command: The shell command to run.
        until: Regular expression that the screen must match.
        picture: File name beside this script.
        shown: The command line in the picture.
    """
    size = ("-x", str(COLUMNS), "-y", str(LINES))
    tmux("new-session", "-d", *size, "env", "TERM=xterm-256color", "sh", "-c", command)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not re.search(until, screen := tmux("capture-pane", "-e", "-p")):
            if time.monotonic() > deadline:
                sys.exit(f"{shown} did not show {until} in time")
            time.sleep(0.2)
    finally:
        tmux("kill-server")
    console = Console(record=True, width=COLUMNS, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(Text(f"$ {shown}", style="bold"))
    console.print(Text.from_ansi(screen.split("picture taken")[0].rstrip()))
    svg = console.export_svg(title=shown)
    # the reader's own monospace font will do; a picture fetches nothing
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    Path(__file__).with_name(picture).write_text(svg)


def fetch_from_a_neighbour() -> None:
    """A download halfway, from a peer on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "source")
        names = [f"ckpt-0/tensor{index:05d}_000" for index in range(FILES)]
        (root / "ckpt-0").mkdir(parents=True)
        for name in names:
            (root / name).write_bytes(os.urandom(FILE_NBYTES))
        torrent = build_metainfo(root, names, name="grok-1", piece_length=2**18)
        Path(folder, "x.torrent").write_bytes(torrent)
        with seeding(root, torrent) as (host, port):
            command = [GROKCTL, "fetch", "x.torrent", "--to", "got", "--peer", f"{host}:{port}"]
            command += ["--no-dht", "--no-lsd", "--bind", host, "--port", 0, "--max-download", RATE]
            script = f"cd {shlex.quote(folder)}; {shlex.join(map(str, command))}"
            shown = f"grokctl fetch x.torrent --peer {host}:{port} --max-download {RATE}"
            take(script, r" 6\d%", "fetch.svg", shown=shown)


def bench_a_layer() -> None:
    """The speed of one layer of full width; needs 10 GB of disk meanwhile."""
    config = replace(GROK_1, num_layers=1, vocab_size=8192)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "release")
        write_miniature(root, config, tokenizer=False)
        name = "one-layer-int8-1"
        ready = Path(folder, "ready", name)
        options = ReshardOptions(mesh=MeshShape(1, 1), out=ready)
        reshard(plan_reshard(open_release(root), options))
        options = ["--prompt-tokens", "64,512", "--batch", "1,4", "-n", "16", "--context", "1024"]
        shown = shlex.join(["grokctl", "bench", name, *options])
        command = [GROKCTL, "bench", name, *options, "--home", folder]
        take(
            f"{shlex.join(map(str, command))}; {DONE}",
            "picture taken",
            "bench.svg",
            shown=shown,
        )


def demo() -> None:
    """The README's first command."""
    take(f"{GROKCTL} demo; {DONE}", "picture taken", "demo.svg", shown="grokctl demo")


def doctor_of_a_server() -> None:
    """Plans for eight accelerators that are not in this machine."""
    command = "doctor --accelerator h100-80gb --devices 8"
    take(f"{GROKCTL} {command}; {DONE}", "picture taken", "doctor.svg", shown=f"grokctl {command}")


PICTURES = {
    "demo": demo,
    "doctor": doctor_of_a_server,
    "fetch": fetch_from_a_neighbour,
    "bench": bench_a_layer,
}


def main() -> None:
    names = sys.argv[1:] or list(PICTURES)
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        sys.exit(f"{', '.join(unknown)}: expected one of {', '.join(PICTURES)}")
    for name in names:
        PICTURES[name]()


if __name__ == "__main__":
    main()
