"""A picture of a terminal from a recorded run.

``python docs/terminal.py record FILE COMMAND...`` runs COMMAND and writes what it prints with the seconds since its start, a
line each, until it ends or is interrupted. :func:`draw` makes the picture of it, which ``make generate`` writes: an SVG that
plays in :data:`SECONDS` and ends with everything in sight, as a viewer shows it that does not play. A recording is made by
hand, of a real run, and the page that shows it says of which.
"""

import html
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

COLUMN: Final = 7.83
"""Width of a character of the font, of 13 px, in px."""
LINE: Final = 18
MARGIN: Final = 16
SECONDS: Final = 15
"""How long the picture plays, however long the run took; columns of the run have its own times."""
COLORS: Final = {
    "Completed": "#7ee787",
    "Failed": "#ff7b72",
    "Retrying": "#ffa657",
    "Processing": "#79c0ff",
    "Queued": "#8b949e",
}


def record(file: Path, command: list[str]) -> None:
    """Write what COMMAND prints into FILE: seconds, a tab, the line. The first line is the command itself."""
    started = time.monotonic()
    with file.open("w", encoding="utf-8") as out, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        out.write(f"0.0\t$ {' '.join(command)}\n")
        for line in running.stdout or ():
            out.write(f"{time.monotonic() - started:.1f}\t{line.rstrip()}\n")
            out.flush()


def draw(recording: str) -> str:
    """Return the picture of a recording: every line appears when it was printed."""
    lines = [(float(at), text) for at, _, text in (line.partition("\t") for line in recording.splitlines())]
    width = round(2 * MARGIN + COLUMN * max(len(text) for _, text in lines))
    height = 2 * MARGIN + LINE * len(lines) + 20
    rows, pace = [], SECONDS / max(1.0, lines[-1][0])
    for number, (at, text) in enumerate(lines):
        y = MARGIN + 20 + LINE * (number + 1)
        color = next((shade for word, shade in COLORS.items() if f" {word} " in f" {text} "), "#e6edf3")
        rows.append(
            f'<text x="{MARGIN}" y="{y}" fill="{color}" xml:space="preserve">{html.escape(text)}'
            f'<set attributeName="opacity" to="0" begin="0s" end="{at * pace:.2f}s"/></text>'
        )
    dots = "".join(
        f'<circle cx="{MARGIN + 18 * n}" cy="18" r="6" fill="{shade}"/>'
        for n, shade in enumerate(("#ff5f56", "#ffbd2e", "#27c93f"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" font-size="13">\n'
        f'<title>{html.escape(lines[0][1])}</title>\n<rect width="100%" height="100%" rx="8" fill="#0d1117"/>\n{dots}\n'
        + "\n".join(rows)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["record", file, *command] if command:
            record(Path(file), command)
        case _:
            sys.exit(__doc__)
