"""A picture of the dashboard from what Prometheus answers: panels in their places, lines in axes. Not Grafana's own."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

_UNIT: Final = 60
_TALL: Final = 26
_COLOURS: Final = ("#3274d9", "#e0752d", "#56a64b", "#a352cc", "#e02f44", "#f2cc0c", "#37872d", "#8f3bb8")

Series = Sequence[Mapping[str, Any]]


def picture(dashboard: Mapping[str, Any], data: Mapping[tuple[int, str], Series]) -> str:
    """Return SVG; ``data`` has the answer of query_range by panel and refId."""
    height = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in dashboard["panels"]) * _TALL
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {24 * _UNIT} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{24 * _UNIT}" height="{height}" fill="#f4f5f5"/>',
    ]
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        x, y, w, h = place["x"] * _UNIT, place["y"] * _TALL, place["w"] * _UNIT, place["h"] * _TALL
        if panel["type"] == "row":
            parts.append(f'<text x="{x + 8}" y="{y + 18}" font-size="15" font-weight="bold">{escape(panel["title"])}</text>')
            continue
        parts.append(f'<rect x="{x + 3}" y="{y + 3}" width="{w - 6}" height="{h - 6}" fill="#fff" stroke="#ddd"/>')
        parts.append(f'<text x="{x + 12}" y="{y + 20}" font-weight="bold">{escape(panel["title"])}</text>')
        if panel["type"] == "text":
            parts.append(f'<text x="{x + 12}" y="{y + 44}" fill="#555">{escape(panel["options"]["content"])}</text>')
            continue
        lines = [
            (_named(target["legendFormat"], one["metric"]), _points(one["values"]))
            for target in panel["targets"]
            for one in data.get((panel["id"], target["refId"]), ())
        ]
        unit = panel["fieldConfig"]["defaults"]["unit"]
        draw = _stat if panel["type"] == "stat" else _lines
        parts += draw([line for line in lines if line[1]], unit, x=x + 12, y=y + 30, w=w - 24, h=h - 40)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _points(values: Sequence[Sequence[Any]]) -> list[tuple[float, float]]:
    return [(float(at), float(value)) for at, value in values if math.isfinite(float(value))]


def _named(legend: str, labels: Mapping[str, str]) -> str:
    for key, value in labels.items():
        legend = legend.replace("{{" + key + "}}", value)
    return legend


def _amount(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB"
    if unit == "s" and value < 1:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g}" + {"s": " s", "ops": "/s", "reqps": "/s"}.get(unit, "")


Drawn = Sequence[tuple[str, Sequence[tuple[float, float]]]]


def _stat(lines: Drawn, unit: str, *, x: float, y: float, w: float, h: float) -> list[str]:
    text = _amount(lines[0][1][-1][1], unit) if lines else "no data"
    return [f'<text x="{x + w / 2}" y="{y + h / 2 + 14}" font-size="28" text-anchor="middle">{text}</text>']


def _lines(lines: Drawn, unit: str, *, x: float, y: float, w: float, h: float) -> list[str]:
    if not lines:
        return [f'<text x="{x + w / 2}" y="{y + h / 2}" fill="#888" text-anchor="middle">no data</text>']
    first = min(at for _, points in lines for at, _ in points)
    last = max(at for _, points in lines for at, _ in points)
    top = max(value for _, points in lines for _, value in points) or 1.0
    floor = y + h - 34
    parts = [
        f'<text x="{x}" y="{y + 10}" fill="#888" font-size="10">{_amount(top, unit)}</text>',
        f'<line x1="{x}" y1="{floor}" x2="{x + w}" y2="{floor}" stroke="#ccc"/>',
    ]
    for number, (_, points) in enumerate(lines):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(
            f"{x + (at - first) / ((last - first) or 1) * w:.1f},{floor - value / top * (floor - y - 14):.1f}"
            for at, value in points
        )
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    legend, room = "", w / 6.5  # characters of this size
    for number, (name, _) in enumerate(lines):
        room -= len(name) + 4
        if room < 0:
            legend += "<tspan>…</tspan>"
            break
        legend += f'<tspan fill="{_COLOURS[number % len(_COLOURS)]}">● </tspan><tspan>{escape(name)}  </tspan>'
    return [*parts, f'<text x="{x}" y="{y + h - 10}" font-size="10">{legend}</text>']
