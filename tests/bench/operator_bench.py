"""Our operator, the obvious one and the least one under the same load on a real API server, with a real PostgreSQL.

``--only steady`` (or burst, jobs, idle, nodes, nodes-stock, restart; comma separated) runs one scenario. Each
operator in each scenario has a machine of its own: network and process namespace, etcd, API server, Job controller
and PostgreSQL, all started for it (:mod:`tests.bench.operator_rounds`). Operators sign in with a service account, as
in a cluster, and run in the environment of the image (``requirements/operator.txt``); the obvious one
(:mod:`tests.bench.baseline_operator`) in that of the tests, since it needs the generated client. The least one is
:mod:`tests.bench.lean_operator`.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from devstack import DevstackError, machine, tools
from devstack.cache import cached
from devstack.process import run as run_command
from devstack.progress import step
from devstack.stores import postgres
from tests.bench.measurement import Measurement
from tests.bench.operator_rounds import SCENARIOS, Round, Scenario
from tests.support.operator_lab import ROOT

_LIMIT: Final = 900.0  # seconds for one operator in one scenario; making 10,000 tasks and Jobs takes most of it
_SERVERS: Final = ("apiserver", "etcd", "controller-manager")
_LOCK: Final = ROOT / "requirements/operator.txt"


def run(only: Sequence[str] = ()) -> list[Measurement]:
    """Run all scenarios, or those named, and compare. Raises DevstackError."""
    if unknown := set(only) - _TABLES.keys():
        raise DevstackError(f"cannot run {', '.join(sorted(unknown))}: the scenarios are {', '.join(_TABLES)}")
    python = prepared(only or list(_TABLES))
    measurements: list[Measurement] = []
    for name in only or _TABLES:
        rounds = {}
        for operator in SCENARIOS[name].operators:
            print(f"    {name}, {operator}", flush=True)
            rounds[operator] = measured(name, operator, python=python)
            print(f"      {rounds[operator]}", flush=True)
        measurements += _TABLES[name](SCENARIOS[name], rounds)
    return measurements


def prepared(names: Iterable[str]) -> Path:
    """Have all that scenarios need, and return the interpreter of the operator. Raises DevstackError."""
    machine.require_root()
    machine.require(["cluster"])
    # Built here: the private machines reach no network.
    tools.kube()
    tools.kubectl()
    if any(SCENARIOS[name].nodes for name in names):
        tools.kwok()
    postgres.programs_folder()
    return environment()


def environment() -> Path:
    """Return the interpreter of an environment like the image's, made if it is not there. Raises DevstackError."""
    uv = Path(sys.executable).with_name("uv")

    def build(folder: Path) -> None:
        with step("making an environment like that of the operator's image"):
            run_command([uv, "venv", "--relocatable", "--python", sys.executable, folder], doing="make an environment")
            options = ["--require-hashes", "--compile-bytecode", f"--python={folder}/bin/python", f"--requirements={_LOCK}"]
            install: list[str | Path] = [uv, "pip", "install", *options]
            run_command(install, doing="install what the operator needs")

    return cached("operator-environment", [_LOCK], build, keep=1) / "bin/python"


def measured(scenario: str, operator: str, *, python: Path, limit: float = _LIMIT) -> Round:
    """Return what one operator did in one scenario, within so many seconds. Raises DevstackError."""
    with tempfile.TemporaryDirectory(prefix="operator-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as another user, who has to get to its data
        inside = ["-m", "tests.bench.operator_rounds", scenario, operator, name, str(python)]
        command = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        shell = f'ip link set lo up && "{sys.executable}" {" ".join(inside)}'
        state = {
            "DEVSTACK_STATE": f"{name}/state",
            "DEVSTACK_CONTROLLER_MANAGER_ARGS": SCENARIOS[scenario].manager_flags,
            "DEVSTACK_SCHEDULER_ARGS": SCENARIOS[scenario].scheduler_flags,
        }
        try:
            subprocess.run([*command, "bash", "-c", shell], cwd=ROOT, env={**os.environ, **state}, timeout=limit, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            message = f"cannot measure {operator} in {scenario}: {error}; see what is printed above"
            raise DevstackError(message) from error
        return Round(**json.loads((folder / "round.json").read_text()))


# -------------------------------------------------------------------------------------------------------------- tables


class _Table:
    """Rows of one scenario: ours, beside it the obvious operator, in words the least one."""

    def __init__(self, name: str, scenario: Scenario, rounds: Mapping[str, Round]) -> None:
        self._name = name
        self._rounds = rounds
        self._how = f"{scenario.what}; a machine of {os.cpu_count()} CPUs; projection into PostgreSQL on"
        self.rows: list[Measurement] = []

    def row(
        self,
        metric: str,
        unit: str,
        value: Callable[[Round], float],
        target: float | None = None,
        *,
        higher: bool = False,
        each: bool = False,
        how: str = "",
    ) -> None:
        """Add a figure. ``each``: one of a task, which means nothing where not all have completed."""

        def figure(operator: str) -> float | None:
            found = self._rounds.get(operator)
            return None if found is None or (each and found.completed < found.tasks) else value(found)

        ours, lean = figure("ours"), figure("lean")
        if ours is None:
            return
        beside = "" if lean is None else f"the least operator: {lean:.2f}"
        self.rows.append(
            Measurement(
                metric=f"{self._name}: {metric}",
                value=ours,
                unit=unit,
                target=target,
                better="higher" if higher else "lower",
                baseline=figure("obvious"),
                how="; ".join(filter(None, (self._how, how, beside))),
            )
        )


def _loaded(name: str, scenario: Scenario, rounds: Mapping[str, Round]) -> _Table:
    table = _Table(name, scenario, rounds)
    completed = ", ".join(f"{operator} {one.completed} of {one.tasks}" for operator, one in rounds.items())
    table.row("tasks lost or late", "", lambda one: one.tasks - one.completed, 0, how=f"completed: {completed}")
    return table


def _cpu(table: _Table, *, operator: float | None, servers: float | None = None) -> None:
    table.row("operator CPU", "ms/task", lambda one: one.cpu["operator"], operator, each=True)
    names = ("operator", *_SERVERS)
    table.row(
        f"CPU of {', '.join(names)}",
        "ms/task",
        lambda one: sum(one.cpu.get(name, 0.0) for name in names),
        servers,
        each=True,
        how="the load's own requests included",
    )
    for name in (*_SERVERS, "postgres", "load"):
        table.row(f"CPU of {name}", "ms/task", lambda one, name=name: one.cpu.get(name, 0.0), each=True)  # type: ignore[misc]


def _requests(table: _Table, rounds: Mapping[str, Round], *, writes: float) -> None:
    told = "; ".join(
        f"{operator}: {', '.join(f'{name} {count:.2f}' for name, count in one.requests.items())}"
        for operator, one in rounds.items()
    )
    table.row("API writes", "/task", lambda one: one.writes, writes, each=True, how=f"counted at the API server: {told}")
    table.row("conflicts", "/task", lambda one: one.conflicts, 0.02, each=True, how="answers of 409 at the API server")


def _steady(scenario: Scenario, rounds: Mapping[str, Round]) -> list[Measurement]:
    table = _loaded("steady", scenario, rounds)
    table.row("CR to Job, p50", "ms", lambda one: one.job_p50)
    table.row("CR to Job, p99", "ms", lambda one: one.job_p99, 1000)
    table.row("Job done to CR done, p50", "ms", lambda one: one.done_p50)
    table.row("Job done to CR done, p99", "ms", lambda one: one.done_p99, 1000)
    _cpu(table, operator=5.0)
    table.row("operator memory, most", "MB", lambda one: one.memory, 100)
    _requests(table, rounds, writes=3.0)
    return table.rows


def _burst(scenario: Scenario, rounds: Mapping[str, Round]) -> list[Measurement]:
    table = _loaded("burst", scenario, rounds)
    table.row("rate", "/s", lambda one: one.completed / one.seconds if one.seconds else 0.0, 120, higher=True)
    table.row("CR to Job, p99", "ms", lambda one: one.job_p99)
    table.row("Job done to CR done, p99", "ms", lambda one: one.done_p99)
    _cpu(table, operator=5.0)
    table.row("operator memory, most", "MB", lambda one: one.memory, 100)
    _requests(table, rounds, writes=3.0)
    return table.rows


def _jobs(scenario: Scenario, rounds: Mapping[str, Round]) -> list[Measurement]:
    table = _loaded("jobs", scenario, rounds)
    argo = "Argo Workflows 4.1.2 tuned, measured elsewhere: "
    rate = f"{argo}51-54/s, 55-57/s between 10 and 90 %"
    table.row("rate", "/s", lambda one: one.completed / one.seconds if one.seconds else 0.0, 50, higher=True, how=rate)
    table.row("rate between 10 and 90 %", "/s", lambda one: one.middle_rate, higher=True, how=rate)
    _cpu(table, operator=4.5, servers=34.0)
    table.row("operator memory, most", "MB", lambda one: one.memory, 100, how=f"{argo}148-160 MB")
    _requests(table, rounds, writes=3.0)
    return table.rows


def _idle(scenario: Scenario, rounds: Mapping[str, Round]) -> list[Measurement]:
    table = _loaded("idle", scenario, rounds)
    how = (
        "Argo Workflows 4.1.2 as installed, measured elsewhere: 10,081 ms; a Job controller waits a second before it counts"
    )
    table.row("created to Completed, p50", "ms", lambda one: one.whole_p50, 1500, how=how)
    table.row("created to Completed, slowest", "ms", lambda one: one.whole_max, 1500, how=how)
    table.row("CR to Job, p50", "ms", lambda one: one.job_p50)
    table.row("Job done to CR done, p50", "ms", lambda one: one.done_p50)
    return table.rows


def _nodes(scenario: Scenario, rounds: Mapping[str, Round], *, name: str, stock: bool) -> list[Measurement]:
    bare = rounds["bare"]
    table = _loaded(name, scenario, rounds)

    def all_of(one: Round) -> float:
        return sum(ms for part, ms in one.cpu.items() if part != "load")

    def rate(one: Round) -> float:
        return one.completed / one.seconds if one.seconds else 0.0

    table.row("rate", "/s", rate, higher=True, how=f"bare Jobs: {rate(bare):.1f}/s")
    table.row(
        "rate, of that of bare Jobs",
        "%",
        lambda one: 100 * rate(one) / rate(bare),
        90 if stock else None,
        higher=True,
        how=f"of the same Jobs, made by the load: {rate(bare):.1f}/s",
    )
    if not stock:
        table.row(
            "rate, of the obvious operator's", "times", lambda one: rate(one) / rate(rounds["obvious"]), 1.3, higher=True
        )
    table.row(
        "CPU above a bare Job",
        "ms/task",
        lambda one: all_of(one) - all_of(bare),
        None if stock else 12.0,
        each=True,
        how=f"all but the load: {all_of(rounds['ours']):.1f} beside {all_of(bare):.1f}",
    )
    _cpu(table, operator=None)
    table.row("operator memory, most", "MB", lambda one: one.memory, 100)
    return table.rows


def _restart(scenario: Scenario, rounds: Mapping[str, Round]) -> list[Measurement]:
    table = _Table("restart", scenario, rounds)
    table.row(
        "ready", "s", lambda one: one.ready, 10, how="from the start of the process to /readyz; the least one has none"
    )
    table.row("CPU until nothing is left to do", "s", lambda one: one.cpu_seconds)
    table.row("operator memory, most", "MB", lambda one: one.memory, 100)
    table.row("API writes", "", lambda one: one.writes, 0, how="counted at the API server until nothing was left to do")
    return table.rows


_TABLES: Final[Mapping[str, Callable[[Scenario, Mapping[str, Round]], list[Measurement]]]] = {
    "steady": _steady,
    "burst": _burst,
    "jobs": _jobs,
    "idle": _idle,
    "nodes": partial(_nodes, name="nodes", stock=False),
    "nodes-stock": partial(_nodes, name="nodes-stock", stock=True),
    "restart": _restart,
}
