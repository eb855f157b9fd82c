"""Print measured speeds, compared with the memory bandwidth."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from grokctl.text import format_bytes, format_rate, format_seconds, format_speed

if TYPE_CHECKING:  # a screen imports no stage
    from grokctl.bench import Bench
    from grokctl.inference.plan import EngineOptions
    from grokctl.screen.console import Console


def bench(console: Console, result: Bench, options: EngineOptions) -> None:
    """Print a table of speeds, each with a bar for its share of the bandwidth."""
    if console.as_json:
        console.emit(
            {
                "devices": options.mesh.size,
                "mesh": str(options.mesh),
                "compute": options.compute,
                "kv": options.kv,
                "max_tokens": result.max_tokens,
                "load_s": result.load_s,
                "compile_s": result.compile_s,
                "bandwidth_bytes_per_s": result.bandwidth,
                "kernel": result.kernel,
                "kernel_bytes_per_s": result.kernel_rate,
                "rows": [asdict(row) for row in result.rows],
            }
        )
        return
    limit = format_rate(result.bandwidth)
    console.table(
        f"{result.max_tokens} tokens after each prompt; the limit is the memory bandwidth, {limit}",
        ("prompt", "batch", "prefill", "first token", "decode", "step", "reads", "of the limit"),
        [
            (
                f"{row.prompt_tokens:,}",
                f"{row.batch:,}",
                f"{format_speed(row.prefill_tokens_per_s)}/s",
                f"{format_speed(1000 * row.first_token_s)} ms",
                f"{format_speed(row.decode_tokens_per_s)}/s",
                f"{format_speed(1000 * row.step_s)} ms",
                format_bytes(row.bytes_per_step),
                f"{console.gauge(row.bandwidth_fraction, 10)} {row.bandwidth_fraction:4.0%}",
            )
            for row in result.rows
        ],
        right=("prompt", "batch", "prefill", "first token", "decode", "step", "reads"),
        optional=("reads", "first token", "prefill"),
    )
    for row in result.rows:
        if row.hit_rate is not None and row.disk_bytes_per_step is not None:
            share = "" if row.disk_fraction is None else f", {row.disk_fraction:.0%} of its rate"
            console.note(
                f"{row.prompt_tokens:,} x {row.batch:,}: {row.hit_rate:.0%} of experts in memory, "
                f"{format_bytes(row.disk_bytes_per_step)} a step from the disk{share}"
            )
    if result.kernel:
        rate = result.kernel_rate
        alone = "" if rate is None else f"; alone it reads weights at {format_rate(rate)}"
        console.note(f"kernel: {result.kernel}{alone}")
    console.note(
        f"load {format_seconds(result.load_s)} · compile {format_seconds(result.compile_s)} · "
        "rates count the tokens of a whole batch"
    )
