"""A picture of a training: loss by tokens, as SVG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

WIDTH: Final = 640
HEIGHT: Final = 360
MARGIN: Final = 56
COLORS: Final = {"training": "#8a8f98", "held_out": "#2f6fde"}


def draw(curve: Sequence[dict[str, float]], path: Path) -> None:
    """Write the losses of training and of held-out text, nats per token."""
    most = max(point["tokens"] for point in curve)
    losses = [point[name] for point in curve for name in COLORS]
    low, high = int(min(losses)), int(max(losses)) + 1

    def place(tokens: float, loss: float) -> tuple[float, float]:
        across, up = tokens / most, (loss - low) / (high - low)
        return (
            MARGIN + across * (WIDTH - 2 * MARGIN),
            HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN),
        )

    def text(x: float, y: float, words: str, rest: str = "") -> str:
        return f'<text x="{x:.0f}" y="{y:.0f}" {rest}>{words}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
        '<g font-family="sans-serif" font-size="13" fill="#444">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for loss in range(low, high + 1):
        left, y = place(0, loss)
        parts.append(f'<path d="M{left} {y:.1f}H{WIDTH - MARGIN}" stroke="#ddd"/>')
        parts.append(text(left - 8, y + 4, str(loss), 'text-anchor="end"'))
    for number, (name, color) in enumerate(COLORS.items()):
        points = " ".join(
            "{:.1f},{:.1f}".format(*place(point["tokens"], point[name])) for point in curve
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        label = f"{name.replace('_', ' ')}: {curve[-1][name]:.2f} at the end"
        parts.append(
            text(
                WIDTH - MARGIN,
                MARGIN + 18 * number,
                label,
                f'text-anchor="end" style="fill:{color}"',
            )
        )
    parts.append(text(MARGIN, MARGIN - 24, "loss, nats per token"))
    parts.append(
        text(WIDTH - MARGIN, HEIGHT - 20, f"{most / 1e6:.1f} million tokens", 'text-anchor="end"')
    )
    parts.append("</g></svg>\n")
    path.write_text("\n".join(parts), encoding="utf-8")
