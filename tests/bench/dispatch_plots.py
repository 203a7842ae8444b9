"""``python -m tests.bench.dispatch_plots``: draw the plots of docs/scaling.md, as SVG, from simulations of the dispatch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.bench.dispatch_bench import MEAN, PLACES, QUEUED, backlog, day, flood, service
from tests.bench.dispatch_simulation import fair, fifo, jain, simulate

_IMAGES: Final = Path(__file__).resolve().parents[2] / "docs/images"
_COLOURS: Final = ("#1f6feb", "#d1242f", "#8250df")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 320, 80, 50, 50

Points = Sequence[tuple[float, float]]


def axis(most: float) -> tuple[float, float]:
    """Return the end of an axis that holds a value, and the steps of it: of 1, 2 or 5 times a power of ten."""
    size = 10 ** math.floor(math.log10(most / 4))
    step = next(size * times for times in (1, 2, 5, 10) if most / (size * times) <= 6)
    return math.ceil(most / step - 1e-9) * step, step


def chart(title: str, x: str, y: str, lines: Mapping[str, Points]) -> str:
    """Return a chart of lines as SVG; axes begin at 0."""
    right, across_by = axis(max(point[0] for points in lines.values() for point in points))
    high, up_by = axis(max(point[1] for points in lines.values() for point in points))

    def place(point: tuple[float, float]) -> str:
        across = _LEFT + (_WIDTH - _LEFT - 20) * point[0] / right
        return f"{across:.1f},{_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * point[1] / high:.1f}"

    def text(across: float, down: float, words: str, anchor: str = "middle", more: str = "") -> str:
        return f'<text x="{across:.0f}" y="{down:.0f}" text-anchor="{anchor}" {more}>{words}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        text(_WIDTH / 2, 20, title, more='font-size="14"'),
        text(_WIDTH / 2, _HEIGHT - 10, x),
        text(16, _HEIGHT / 2, y, more=f'transform="rotate(-90 16 {_HEIGHT / 2:.0f})"'),
    ]
    for step in range(round(right / across_by) + 1):
        across = float(place((across_by * step, 0)).split(",")[0])
        parts.append(text(across, _HEIGHT - _BOTTOM + 16, f"{across_by * step:,g}"))
    for step in range(round(high / up_by) + 1):
        up = float(place((0, up_by * step)).split(",")[1])
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{up:.1f}" y2="{up:.1f}" stroke="#ddd"/>')
        parts.append(text(_LEFT - 6, up + 4, f"{up_by * step:,g}", "end"))
    for number, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[number]
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{" ".join(place(one) for one in points)}"/>'
        )
        parts.append(text(_LEFT + 160 * number, _TOP - 4, f"● {name}", "start", f'fill="{colour}"'))
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Simulate and draw."""
    _IMAGES.mkdir(exist_ok=True)
    whole = QUEUED * MEAN / PLACES
    moments = [whole * part / 10 for part in range(1, 11)]
    makers = {"fair shares": fair, "first come, first served": fifo}
    fairness: dict[str, Points] = {}
    for name, make in makers.items():
        served = simulate(backlog(), places=PLACES, make=make)
        fairness[name] = [(at, jain(service([one for one in served if one.started <= at]))) for at in moments]
    title = "Fairness over 200 knowledge bases with 50 tasks each"
    draw("scaling-fairness.svg", chart(title, "seconds", "Jain's index", fairness))
    floods = {
        name: [(tasks, flood(make, tasks=tasks)) for tasks in (0, 2500, 5000, 10_000)] for name, make in makers.items()
    }
    title = "p99 of a tenant while another one floods"
    draw("scaling-flood.svg", chart(title, "tasks of the flood", "seconds, creation to end", floods))
    sizes: list[tuple[float, float]] = []
    for clusters in (1, 10, 25, 50):
        spent, _, tasks = day(minutes=2, clusters=clusters)
        sizes.append((clusters, spent * tasks / 120 / 10))  # ms a second are tenths of a percent
    title = "CPU of the dispatch at the peak of 20,000 tasks a day for each cluster"
    draw("scaling-day.svg", chart(title, "clusters' worth of namespaces", "% of a core", {"dispatch": sizes}))


def draw(name: str, picture: str) -> None:
    """Write a picture, and say so."""
    (_IMAGES / name).write_text(picture, encoding="utf-8")
    print(f"wrote docs/images/{name}", flush=True)


if __name__ == "__main__":
    main()
