"""Ten thousand tasks that are there for an hour while ten a second come and go: the operator's memory (``make soak``).

``SOAK_MINUTES=10`` takes less. Nodes and pods are played by KWOK, all else is real; a task completes as soon as its pod has
a node, and goes with its TTL, so that there are as many tasks all the time (:mod:`tests.bench.operator_rounds`).
"""

from statistics import linear_regression, mean
from typing import Final

from tests.bench.measurement import Measurement
from tests.bench.operator_bench import measured, prepared
from tests.bench.operator_rounds import SCENARIOS, SOAK_MINUTES

_SETTLES: Final = 0.25
"""Part of the time in which memory may still grow: the heap has not met all that comes."""


def run() -> list[Measurement]:
    """Run it, and tell how the memory went. Raises DevstackError."""
    scenario = SCENARIOS["soak"]
    found = measured("soak", "ours", python=prepared(["soak"]), limit=SOAK_MINUTES * 60 + 1800)
    later = [one for one in found.samples if one[0] >= _SETTLES * SOAK_MINUTES * 60]
    hours, sizes, live = (
        [at / 3600 for at, _, _ in later],
        [size for _, size, _ in later],
        [number for _, _, number in later],
    )
    how = f"{scenario.what}; {min(live)} to {max(live)} tasks were there; {found.tasks} came"
    growth = linear_regression(hours, sizes).slope
    return [
        Measurement(metric="soak: tasks lost or late", value=found.tasks - found.completed, unit="", target=0, how=how),
        Measurement(metric="soak: operator memory, most", value=found.memory, unit="MB", target=100, how=how),
        Measurement(metric="soak: operator memory, mean", value=mean(sizes), unit="MB", how=how),
        Measurement(
            metric="soak: growth of the operator's memory",
            value=growth,
            unit="MB/h",
            target=2,
            how=f"{how}; straight line through a look each 15 s after the first quarter",
        ),
        Measurement(metric="soak: operator CPU", value=found.cpu["operator"], unit="ms/task", how=how),
        Measurement(metric="soak: conflicts", value=found.conflicts, unit="/task", target=0.02, how=how),
    ]
