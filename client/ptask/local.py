"""``ptask run --local``: one manifest, carried out by the runner of this environment, without a cluster."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ptask.outcomes import CommandError, Exit
from ptask.tables import Cell, Output, as_json, as_yaml, plain

if TYPE_CHECKING:
    from ptask.screen import Screen

_NEEDED: Final = ("job_runner", "asyncpg", "elasticsearch", "pymilvus", "numpy")
"""Modules that a runner cannot do without; the wheel has job_runner in any case, the extra brings the others."""
_CODES: Final = {0: Exit.DONE, 76: Exit.CANCELED, 143: Exit.INTERRUPTED, 69: Exit.UNREACHABLE}
"""Exit codes of the runner that are not a failure of the task."""


def missing() -> list[str]:
    """Return the modules of a runner that this environment lacks."""
    return [name for name in _NEEDED if importlib.util.find_spec(name) is None]


def run(screen: "Screen", source: str, *, output: Output) -> Exit:
    """Carry out a manifest; what the runner logs goes to standard error. Raises :class:`CommandError`."""
    from ptask.manifests import read, refused

    if lacking := missing():
        raise CommandError(
            f"cannot run a task here: this environment lacks {', '.join(lacking)}; install processing-tasks[runner] beside "
            f"{sys.executable}, or send the task to a cluster with `ptask submit`"
        )
    drafts = read([source])
    if len(drafts) != 1:
        raise refused(f"cannot run {source}: it holds {len(drafts)} tasks; give one at a time")
    if not os.environ.get("TASKS_POSTGRES_URL"):
        raise CommandError(
            "cannot run a task here: TASKS_POSTGRES_URL is not set; the runner takes the addresses of its stores from the "
            "environment, which `python -m job_runner --help` lists",
            code=Exit.USAGE,
        )
    with tempfile.TemporaryDirectory(prefix="ptask-") as folder:
        manifest = Path(folder) / "task.json"
        manifest.write_text(json.dumps(drafts[0].manifest("default")), encoding="utf-8")
        environment = {"TASKS_TERMINATION_LOG": str(Path(folder) / "termination-log")} | dict(os.environ)
        command = [sys.executable, "-m", "job_runner", "run", str(manifest)]
        screen.note(f"running {drafts[0].name} ({drafts[0].spec['type']}) in this environment")
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            try:
                said, _ = process.communicate()
            except KeyboardInterrupt:
                # The terminal has sent it to the runner as well, which hands the attempt back.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=10)
                process.kill()
                raise
    outcome = _outcome(said)
    _print(screen, outcome, said, output=output)
    code = Exit.FAILED if outcome is None else _CODES.get(process.returncode, Exit.FAILED)
    return Exit.DONE if process.returncode == 0 else code


def _outcome(said: str) -> Mapping[str, Any] | None:
    """Return the last line of the runner's output, its outcome; None when it died without one."""
    lines = said.strip().splitlines()
    with contextlib.suppress(ValueError, IndexError):
        found = json.loads(lines[-1])
        return found if isinstance(found, Mapping) else None
    return None


def _print(screen: "Screen", outcome: Mapping[str, Any] | None, said: str, *, output: Output) -> None:
    if outcome is None:
        screen.note(said.strip() or "the runner ended without an outcome: its last lines above say why")
        return
    if output is Output.JSON:
        screen.raw(as_json(outcome))
        return
    if output is Output.YAML:
        screen.raw(as_yaml(dict(outcome)))
        return
    for line in lines_of(outcome):
        screen.lines([[line]])


def lines_of(outcome: Mapping[str, Any]) -> list[Cell]:
    """Return an outcome as lines."""
    well = outcome.get("outcome") == "Succeeded"
    reason = f" ({outcome['reason']})" if outcome.get("reason") and outcome.get("reason") != outcome.get("outcome") else ""
    lines = [Cell(f"{outcome.get('outcome')}{reason}", "green" if well else "red")]
    if message := (outcome.get("error") or {}).get("message"):
        lines.append(Cell(plain(str(message))))
    for key, value in (outcome.get("result") or {}).items():
        lines.append(
            Cell(
                plain(f"  {key}: {value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)}")
            )
        )
    return lines
