"""The dispatch: time of a pass among 10,000 tasks, fairness, longest waits, what a flood does to others, 1,000,000 a day.

Pure: no cluster, no store. FIFO and strict priorities run the same tasks in the same run, as baselines.
"""

import time
from bisect import bisect_right
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from task_operator.cache import Key
from task_operator.dispatch import Dispatch, Limits
from tests.bench.dispatch_simulation import (
    Arrival,
    Maker,
    Served,
    claim_of,
    fair,
    fifo,
    jain,
    poisson,
    quantile,
    simulate,
    strict,
    tenants,
)
from tests.bench.measurement import Measurement

NAMESPACES: Final = 5
BASES: Final = 200
QUEUED: Final = 10_000
PLACES: Final = 64
MEAN: Final = 10.0  # seconds of a task
HOUR: Final = 3600.0
FIRST_CLASS: Final = HOUR - 60  # clocks may differ by a minute
DAILY: Final = 1_000_000
CLUSTERS: Final = 50


def run() -> list[Measurement]:
    """Measure."""
    return [*_pass(), *_fairness(), *_low(), *_flood(), *_daily()]


# ---------------------------------------------------------------------------------------------------------- one pass


def _pass() -> list[Measurement]:
    now = datetime(2026, 1, 1, 2, tzinfo=UTC)
    line = Dispatch(Limits(total=PLACES), wake=lambda _: None, clock=lambda: now)
    everybody = tenants(NAMESPACES, BASES)
    keys: list[Key] = []
    began = time.process_time()
    for number in range(QUEUED + PLACES):
        namespace, base = everybody[number % BASES]
        task = Arrival(number / 10, namespace, base, MEAN, ("high", "normal", "low")[number % 3])
        keys.append((namespace, f"task-{number}"))
        line.ask(keys[-1], claim_of(task))
    joining = 1000 * (time.process_time() - began) / len(keys)
    picks, orders = [], []
    for key in keys[:PLACES]:
        began = time.process_time()
        line.release(key)
        picks.append(1000 * (time.process_time() - began))
    for _ in range(5):
        began = time.process_time()
        moved = sum(1 for _ in line.moved())
        orders.append(1000 * (time.process_time() - began))
    how = f"CPU time; {QUEUED} queued, {BASES} knowledge bases, {NAMESPACES} namespaces"
    return [
        Measurement(
            metric="a pass: a place goes to the next",
            value=max(picks),
            unit="ms",
            target=50,
            how=f"{how}; the longest of {PLACES}, median {quantile(picks, 0.5):.2f}",
        ),
        Measurement(
            metric="a pass: every position told anew",
            value=sorted(orders)[2],
            unit="ms",
            target=50,
            how=f"{how}; median of 5; {moved} were worth telling",
        ),
        Measurement(metric="joining the line", value=joining, unit="ms a task", how=how),
    ]


# ---------------------------------------------------------------------------------------------------------- fairness


def backlog() -> list[Arrival]:
    """All knowledge bases have 50 tasks at once, one after the other."""
    return [
        Arrival(number * 0.001 + turn * 0.00001, namespace, base, MEAN)
        for number, (namespace, base) in enumerate(tenants(NAMESPACES, BASES))
        for turn in range(QUEUED // BASES)
    ]


def service(served: Sequence[Served]) -> list[float]:
    """Return the place-seconds that each knowledge base was given."""
    given = {base: 0.0 for _, base in tenants(NAMESPACES, BASES)}
    for one in served:
        given[one.task.base] += one.task.takes
    return list(given.values())


def _fairness() -> list[Measurement]:
    seconds = QUEUED * MEAN / PLACES / 2
    ours, base = (jain(service(simulate(backlog(), places=PLACES, make=make, until=seconds))) for make in (fair, fifo))
    how = "place-seconds of equal knowledge bases, when half of 10,000 tasks have started"
    return [
        Measurement(
            metric="Jain's index",
            value=ours,
            unit="",
            target=0.95,
            better="higher",
            baseline=base,
            how=f"{how}; baseline: FIFO",
        )
    ]


# ------------------------------------------------------------------------------------------------------ longest wait


def rush(make: Maker, *, load: float = 1.5) -> list[Served]:
    """Two hours of more than there is room for, most of it normal and high, and then the rest of it."""
    rate = load * PLACES / MEAN
    many = poisson(
        rate,
        seconds=2 * HOUR,
        tenants=tenants(NAMESPACES, BASES),
        mean=MEAN,
        seed=1,
        priorities="high normal normal normal low",
    )
    return simulate(many, places=PLACES, make=make)


def _low() -> list[Measurement]:
    ours, base = rush(fair), rush(strict)
    how = "two hours at 150 % of what the places carry, a fifth of it low, and an hour more"
    return [
        Measurement(
            metric="longest wait of a low task",
            value=_longest_low(ours),
            unit="s",
            baseline=_longest_low(base),
            how=f"{how}; baseline: strict priorities",
        ),
        Measurement(
            metric="places given before its start, after its first hour",
            value=100 * _of_the_bound(ours),
            unit="% of the bound",
            target=100,
            how=f"{how}; of the low task that comes nearest to it",
        ),
    ]


def _longest_low(served: Sequence[Served]) -> float:
    return max(one.waited for one in served if one.task.priority == "low")


def _of_the_bound(served: Sequence[Served]) -> float:
    """Return how much of the bound of :mod:`task_operator.dispatch` a low task has used at most."""
    starts = [one.started for one in served]
    own: dict[str, list[float]] = {}
    for one in served:
        own.setdefault(one.task.base, []).append(one.started)
    used = [0.0]
    for one in served:
        if one.task.priority == "low" and one.waited > FIRST_CLASS:
            since = one.task.at + FIRST_CLASS
            mine = own[one.task.base]
            before = bisect_right(mine, one.started) - bisect_right(mine, since) - 1
            bound = NAMESPACES * (BASES // NAMESPACES * (before + 2) + 1)
            used.append((bisect_right(starts, one.started) - bisect_right(starts, since)) / bound)
    return max(used)


# ------------------------------------------------------------------------------------------------------------- floods


def flood(make: Maker, *, tasks: int) -> float:
    """Return the p99 of the latency of tenant-0 at a tenth of the places, while tenant-1 has so many tasks at once."""
    quiet = poisson(0.1 * PLACES / MEAN, seconds=1200, tenants=tenants(1, 20), mean=MEAN, seed=2)
    others = poisson(
        0.5 * PLACES / MEAN,
        seconds=1200,
        tenants=[(name, base) for name, base in tenants(NAMESPACES, BASES) if name not in {"tenant-0", "tenant-1"}],
        mean=MEAN,
        seed=3,
    )
    burst = [Arrival(60 + number * 0.001, "tenant-1", f"kb-{number % 40}", MEAN) for number in range(tasks)]
    everything = sorted([*quiet, *others, *burst], key=lambda one: one.at)
    return quantile(
        (one.latency for one in simulate(everything, places=PLACES, make=make) if one.task.namespace == "tenant-0"), 0.99
    )


def _flood() -> list[Measurement]:
    growth = {make: 100 * (flood(make, tasks=QUEUED) / flood(make, tasks=0) - 1) for make in (fair, fifo)}
    return [
        Measurement(
            metric="p99 of a tenant under another's flood",
            value=growth[fair],
            unit="% more",
            target=10,
            baseline=growth[fifo],
            how="10,000 tasks of another namespace at once, with others at 60 % of the places; baseline: FIFO",
        )
    ]


# ------------------------------------------------------------------------------------------------------ a million a day


def day(*, minutes: float = 10, clusters: int = CLUSTERS, peak: float = 3.0) -> tuple[float, float, int]:
    """Return CPU ms of the dispatch a task, p99 of the wait and number of tasks, at the peak of a day with 1,000,000."""
    rate = peak * DAILY / 86_400 * clusters / CLUSTERS
    places = int(rate * MEAN / 0.9)
    arrivals = list(
        poisson(rate, seconds=60 * minutes, tenants=tenants(clusters * NAMESPACES, clusters * 40), mean=MEAN, seed=4)
    )
    began = time.process_time()
    served = simulate(arrivals, places=places, make=fair)
    spent = 1000 * (time.process_time() - began) / len(arrivals)
    return spent, quantile((one.waited for one in served), 0.99), len(arrivals)


def _daily() -> list[Measurement]:
    spent, waited, tasks = day()
    size = f"{CLUSTERS * NAMESPACES} namespaces, {CLUSTERS * 40} knowledge bases"
    how = f"{tasks} tasks at three times the mean of 1,000,000 a day, {size}"
    return [
        Measurement(
            metric="dispatch of a task", value=spent, unit="CPU-ms", how=f"{how}; the simulation's own share is in it"
        ),
        Measurement(metric="p99 of the wait for a place", value=waited, unit="s", how=f"{how}; places 90 % full"),
    ]
