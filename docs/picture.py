"""Take a picture of `grokctl demo` in a real terminal (tmux) and write it to docs/demo.svg."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS, LINES = 100, 60
PATIENCE_S = 300.0
SESSION = f"grokctl-picture-{os.getpid()}"


def tmux(*arguments: str) -> str:
    command = ["tmux", "-L", SESSION, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    grokctl = Path(sys.executable).with_name("grokctl")
    done = "picture taken"
    script = f"{grokctl} demo; echo {done}; sleep 60"
    size = ("-x", str(COLUMNS), "-y", str(LINES))
    tmux("new-session", "-d", *size, "env", "TERM=xterm-256color", "sh", "-c", script)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while done not in (screen := tmux("capture-pane", "-e", "-p")):
            if time.monotonic() > deadline:
                sys.exit("the demo did not end in time")
            time.sleep(0.5)
    finally:
        tmux("kill-server")
    console = Console(record=True, width=COLUMNS, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(Text("$ grokctl demo", style="bold"))
    console.print(Text.from_ansi(screen.split(done)[0].rstrip()))
    svg = console.export_svg(title="grokctl demo")
    # the reader's own monospace font will do; a picture fetches nothing
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    Path(__file__).with_name("demo.svg").write_text(svg)


if __name__ == "__main__":
    main()
