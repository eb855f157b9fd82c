"""How long `grokctl doctor` takes, and how true what it measures and estimates is."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from grokctl.checkpoint.miniature import write_miniature
from grokctl.checkpoint.release import open_release
from grokctl.machine.host import bandwidth
from grokctl.machine.look import look
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute
from grokctl.model.sizing import Terms
from grokctl.planning.plans import Spread, hardware_of, plan_for
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard

GROKCTL = Path(sys.executable).with_name("grokctl")
CONFIG = replace(GROK_1, num_layers=2, vocab_size=8192)
ONE = MeshShape(1, 1)
DISK = 21e9
"""Bytes for a release of that, and for the same again."""
TRIED = 2**30
ROUNDS = 3


def grokctl(*arguments: object) -> Any:
    command = [str(GROKCTL), *map(str, arguments), "--json", "-q"]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(run.stdout)


def seconds(*arguments: object) -> float:
    started = time.perf_counter()
    grokctl(*arguments)
    return time.perf_counter() - started


def dd(*arguments: str) -> float:
    """Bytes a second of the same size, by the tool that people would try it with."""
    command = ["dd", "bs=16M", f"count={TRIED // 2**24}", *arguments]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return TRIED / (time.perf_counter() - started)


def rates(folder: Path) -> dict[str, tuple[float, float]]:
    """What a short look at disk and memory says, and what a longer one does."""
    there = look(folder, None)
    (disk,), file = there.disks, folder / "tried"
    writes = dd("if=/dev/zero", f"of={file}", "conv=fdatasync")
    reads = dd(f"if={file}", "of=/dev/null", "iflag=direct")
    file.unlink()
    memory = bandwidth(nbytes=2**31, rounds=8)
    return {
        "writes to the disk": (disk.write_rate or 0.0, writes),
        "reads from the disk": (disk.read_rate or 0.0, reads),
        "reads from memory": (there.cpu.bandwidth or 0.0, memory),
    }


def speeds(folder: Path) -> tuple[float, float]:
    """Tokens a second of two layers: as doctor estimates them, and as bench measures them."""
    root, out = folder / "release", folder / "ready" / "two-layers"
    write_miniature(root, CONFIG, tokenizer=False)
    ready = reshard(plan_reshard(open_release(root), ReshardOptions(mesh=ONE, out=out)))
    shutil.rmtree(root)
    options = ("--prompt-tokens", 64, "--batch", 1, "-n", 16, "--context", 512)
    grokctl("bench", out, *options)  # brings the file into memory
    found = grokctl("bench", out, *options)["rows"][0]["decode_tokens_per_s"]
    hardware = hardware_of(look(folder, None))
    terms = Terms(context=512, compute=Compute.BFLOAT16)
    planned = plan_for(hardware, Spread.of(ready.storage, ONE), terms)
    return planned.tokens_per_s or 0.0, found


def main() -> None:
    print(f"{os.cpu_count()} cores\n")
    print(f"{'':24}{'seconds':>10}{'of 8 s':>10}")
    with tempfile.TemporaryDirectory() as name:
        took = {
            "doctor, this machine": median(
                seconds("doctor", "--home", name) for _ in range(ROUNDS)
            ),
            "doctor, another": median(
                seconds("doctor", "--accelerator", "h100-80gb", "--devices", 8)
                for _ in range(ROUNDS)
            ),
        }
    for what, took_s in took.items():
        print(f"{what:24}{took_s:>10.2f}{took_s / 8:>10.2f}")

    with tempfile.TemporaryDirectory() as name:
        print(f"\n{'':24}{'doctor':>10}{'longer':>10}{'ratio':>10}")
        for what, (ours, longer) in rates(Path(name)).items():
            print(f"{what:24}{ours / 1e9:>10.2f}{longer / 1e9:>10.2f}{ours / longer:>10.2f}  GB/s")
        if shutil.disk_usage(name).free < DISK:
            sys.exit(f"{DISK / 1e9:.0f} GB of disk are needed for two layers of full width")
        print(f"\n{'':24}{'estimate':>10}{'bench':>10}{'ratio':>10}")
        estimated, found = speeds(Path(name))
        print(f"{'two layers, int8':24}{estimated:>10.2f}{found:>10.2f}{estimated / found:>10.2f}")


if __name__ == "__main__":
    main()
