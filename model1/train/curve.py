"""Writes the loss curve as numbers (loss.csv) and as a picture (loss.svg)."""

from pathlib import Path
from typing import NamedTuple

_WIDTH, _HEIGHT, _MARGIN = 720, 320, 48
_SMOOTH_STEPS = 20


class Point(NamedTuple):
    step: int
    tokens: int
    loss: float  # nats a predictable token
    indexer_loss: float


def write_csv(points: list[Point], path: Path) -> None:
    rows = [f"{p.step},{p.tokens},{p.loss:.4f},{p.indexer_loss:.4f}" for p in points]
    path.write_text("\n".join(["step,tokens,loss,indexer_loss", *rows]) + "\n", encoding="utf-8")


def write_svg(points: list[Point], path: Path) -> None:
    """Smoothed loss over steps, with four grid lines a side."""
    losses = _smoothed([p.loss for p in points])
    top, last = max(losses), max(points[-1].step, 1)

    def at(step: float, loss: float) -> tuple[float, float]:
        x = _MARGIN + step / last * (_WIDTH - 2 * _MARGIN)
        y = _HEIGHT - _MARGIN - loss / top * (_HEIGHT - 2 * _MARGIN)
        return round(x, 1), round(y, 1)

    line = " ".join(
        f"{x},{y}" for x, y in (at(p.step, v) for p, v in zip(points, losses, strict=True))
    )
    marks = []
    for i in range(5):
        step, loss = last * i / 4, top * i / 4
        (x, bottom), (left, y) = at(step, 0.0), at(0.0, loss)
        marks += [
            f'<line x1="{left}" y1="{y}" x2="{_WIDTH - _MARGIN}" y2="{y}" stroke="#ddd"/>',
            f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{loss:.1f}</text>',
            f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{step:.0f}</text>',
        ]
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="sans-serif" font-size="12" fill="#333">\n'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>\n'
        + "\n".join(marks)
        + f'\n<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="1.5"/>\n'
        f'<text x="{_WIDTH / 2}" y="20" text-anchor="middle">'
        "training loss (nats a predictable token) by step</text>\n</svg>\n",
        encoding="utf-8",
    )


def _smoothed(values: list[float]) -> list[float]:
    out = []
    for i in range(len(values)):
        recent = values[max(0, i - _SMOOTH_STEPS + 1) : i + 1]
        out.append(sum(recent) / len(recent))
    return out
