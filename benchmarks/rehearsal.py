"""Every command on a release of Grok-1's true size without its data: seconds and peak memory."""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Nothing heavy is imported here: Linux counts the memory of a process that starts another one as
# the other one's, so this one has to stay smaller than what it measures.

GROK_1_BYTES = 318_239_886_140
NEEDED_FREE = 2 * 10**9
NO_ROOM = 12
"""The exit code where the disk is too small."""
DISCARDING = Path(__file__).with_name("_discarding.py")
BEGIN = "<!-- made by the command above; do not edit -->"
END = "<!-- end -->"


@dataclass(frozen=True)
class Step:
    """One command, how it went, and what it took."""

    command: str
    result: str
    seconds: float
    peak_rss: int


class Rehearsal:
    """Commands on one release, each as a process of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.steps: list[Step] = []

    def run(
        self,
        *arguments: str,
        ends: Collection[int] = (0,),
        at: Path | None = None,
        program: Sequence[str] = ("-m", "grokctl"),
    ) -> dict[str, Any]:
        """Run a command on the release, or on something else, and return its JSON object."""
        verb, *options = arguments
        root = at or self.root
        command = [sys.executable, *program, verb, str(root), *options, "--json"]
        environment = {**os.environ, "GROKCTL_HOME": str(self.root.parent)}
        with tempfile.TemporaryFile() as out:
            began = time.perf_counter()
            process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=subprocess.DEVNULL
            )
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
            process.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            said = out.read()
        if process.returncode not in ends:
            sys.exit(f"{shlex.join(command)} ended with {process.returncode}: {said.decode()}")
        self.last = f"grokctl {shlex.join([verb, root.name, *options])}", seconds, usage
        values = json.loads(said)
        assert isinstance(values, dict)
        return values

    def note(self, result: str) -> None:
        """Say how the last command went."""
        command, seconds, usage = self.last
        step = Step(command, result, seconds, usage.ru_maxrss * 1024)
        self.steps.append(step)
        print(row(step), flush=True)


def rehearse(root: Path, nbytes: int, *, is_exported: bool) -> list[Step]:
    """Run every command, and hold each to what it has to find."""
    rehearsal = Rehearsal(root)
    run, note = rehearsal.run, rehearsal.note

    found = run("verify", "--quick")
    assert (found["ok"], found["proven"], found["hashed_bytes"]) == (True, False, 0)
    note(f"{found['files']} files are sound; no content is proven")

    found = run("inspect")
    assert found["bytes"] == sum(tensor["nbytes"] for tensor in found["tensors"])
    note(f"{len(found['tensors'])} tensors, {found['parameters']:,} parameters")

    found = run("inspect", "--tensor", "layers.1.*", "--stats")
    read = sum(tensor["nbytes"] for tensor in found["tensors"])
    assert all(tensor["stats"]["nonfinite"] == 0 for tensor in found["tensors"])
    note(f"every value of one layer, {read:,} bytes")

    found = run("verify")
    assert (found["ok"], found["proven"], found["hashed_bytes"]) == (True, True, nbytes)
    note(f"all {nbytes:,} bytes are proven")

    found = run("verify")
    assert (found["ok"], found["proven"], found["hashed_bytes"]) == (True, True, 0)
    note("proven by the receipt")

    file, offset = flip_one_bit(root)
    found = run("verify", "--rehash", ends={20})
    (damage,) = found["damage"]
    ((low, high),) = damage["ranges"]
    assert (damage["file"], damage["reason"]) == (file, "altered"), damage
    assert low <= offset < high, damage
    note(f"one flipped bit: {file}, bytes {low:,} to {high:,}")
    flip_one_bit(root)

    cut = ("reshard", "--devices", "8", "--compress", "zstd")  # plain, it would need the room
    found = run(*cut, "--dry-run")
    note(f"would write {found['bytes_per_device']:,} bytes per device, before compression")

    found = run(*cut)
    assert found["plain_bytes"] > found["bytes_in"] > 100 * found["bytes"], found
    ready = Path(found["ready"])
    size = (ready / "grokctl.json").stat().st_size
    note(f"resharded for 8 devices: {found['bytes']:,} bytes, and a manifest of {size:,}")

    found = run("verify", at=ready)
    assert found["ok"], found
    note(f"{found['files']} files of the ready checkpoint are sound")

    found = run("export", "--dry-run", ends={0, NO_ROOM})
    assert (found["scales"]["misfits"], found["lossless"]) == (0, True), found
    note(f"would write {found['bytes']:,} bytes; all {found['scales']['checked']:,} scales fit")

    if is_exported:
        found = run("export", program=(str(DISCARDING),))
        assert (found["lossless"], found["folded"]) == (True, []), found
        note(f"{found['bytes']:,} bytes of {found['files'][0]}, not kept")
    return rehearsal.steps


def flip_one_bit(root: Path) -> tuple[str, int]:
    """Flip the lowest bit of the byte in the middle of the largest quantised file in the middle."""
    files = sorted((root / "ckpt-0").iterdir())[1:]
    largest = max(path.stat().st_size for path in files)
    candidates = [path for path in files if path.stat().st_size == largest]
    path = candidates[len(candidates) // 2]
    offset = largest // 2
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    return f"ckpt-0/{path.name}", offset


def row(step: Step) -> str:
    """A line of the table."""
    seconds = f"{step.seconds:.1f} s" if step.seconds >= 1 else f"{step.seconds:.2f} s"
    return f"| `{step.command}` | {step.result} | {seconds} | {step.peak_rss / 1e6:.0f} MB |"


def machine() -> str:
    """What the times were taken on."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    python = ".".join(map(str, sys.version_info[:2]))
    names = f" ({models[0]})" if models else ""
    day = time.strftime("%Y-%m-%d", time.gmtime())
    return f"{day}, {os.cpu_count()} cores{names}, Python {python}, everything in the page cache."


def refuse_where_it_cannot_be(folder: Path) -> None:
    """End with one sentence where there is no room, or where holes take room."""
    free = shutil.disk_usage(folder).free
    if free < NEEDED_FREE:
        sys.exit(f"{folder}: {free:,} bytes are free, the rehearsal needs {NEEDED_FREE:,}")
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(2**30)
        taken = os.fstat(file.fileno()).st_blocks * 512
    if taken > 2**20:
        sys.exit(f"{folder}: 1 GiB of nothing takes {taken:,} bytes; this disk has no sparse files")


def build(root: Path, options: Sequence[str]) -> tuple[int, float, int]:
    """Make the release and its torrent: bytes that it claims, seconds, and bytes that it takes."""
    began = time.perf_counter()
    script = str(Path(__file__).with_name("_holes.py"))
    subprocess.run([sys.executable, script, str(root), *options], check=True)
    seconds = time.perf_counter() - began
    files = [
        path.stat() for path in root.rglob("*") if path.is_file() and path.parent.name != ".grokctl"
    ]
    torrent = (root / "release.torrent").stat().st_size
    return (
        sum(status.st_size for status in files) - torrent,
        seconds,
        sum(status.st_blocks for status in files) * 512,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the table there, too")
    parser.add_argument("--small", action="store_true", help="two narrow layers, for tests")
    parser.add_argument(
        "--export", action="store_true", help="also make all of an export, and drop its bytes"
    )
    arguments = parser.parse_args()
    refuse_where_it_cannot_be(arguments.folder)
    with tempfile.TemporaryDirectory(prefix="grokctl-rehearsal-", dir=arguments.folder) as folder:
        root = Path(folder) / "grok-1"
        nbytes, seconds, taken = build(root, ["--small"] if arguments.small else [])
        assert arguments.small or nbytes == GROK_1_BYTES, nbytes
        count = sum(1 for _ in (root / "ckpt-0").iterdir())
        head = [
            f"{machine()}",
            f"{count} files that claim {nbytes:,} bytes and take {taken:,} on disk.",
            f"Made, with their torrent, in {seconds:.1f} s.",
            "",
            "| command | result | time | peak memory |",
            "| --- | --- | ---: | ---: |",
        ]
        print("\n".join(head), flush=True)
        rows = [row(step) for step in rehearse(root, nbytes, is_exported=arguments.export)]
    if arguments.write:
        text = arguments.write.read_text()
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        made = "\n".join([BEGIN, "", *head, *rows, "", END])
        arguments.write.write_text(f"{before}{made}{after}")


if __name__ == "__main__":
    main()
