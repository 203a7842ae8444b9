"""How much memory an attempt gets: what the settings say, and more after attempts that ran out of it. Pure functions."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from task_contract.models import ProcessingTask

OOM_KILLED: Final = "OOMKilled"
"""Reason of an attempt that used more memory than its limit; also the kubelet's word for it."""

# https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
_QUANTITY: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:([KMGTPE]i)|([mkMGTPE])|[eE]([+-]?\d{1,2}))?")
_BINARY: Final = {f"{letter}i": 1024**power for power, letter in enumerate("KMGTPE", start=1)}
_DECIMAL: Final = {"m": Decimal("0.001")} | {
    letter: Decimal(1000) ** power for power, letter in enumerate("kMGTPE", start=1)
}


@dataclass(frozen=True, slots=True)
class MemoryGrowth:
    """What follows on an attempt that ran out of memory."""

    factor: float = 2
    """The next attempt gets this many times the memory; 1: as much as before."""
    limit: str = "8Gi"
    """And never more than this, unless the settings begin above it."""


def in_bytes(quantity: str | float) -> int:
    """Return a quantity of Kubernetes in bytes, rounded up. Raises ValueError for what is none."""
    found = _QUANTITY.fullmatch(str(quantity))
    if found is None:
        raise ValueError(f"{quantity!r} is no quantity of memory; write it as 512Mi or 2Gi")
    number, binary, decimal, exponent = found.groups()
    scale = Decimal(_BINARY[binary]) if binary else _DECIMAL[decimal] if decimal else Decimal(10) ** int(exponent or 0)
    return math.ceil(Decimal(number) * scale)


def resources_of(task: ProcessingTask, resources: Mapping[str, Any], growth: MemoryGrowth) -> dict[str, Any]:
    """Return the resources of the task's next attempt: request and limit of memory grow together.

    The same task gives the same answer, so that a Job that is created again after a crash is the same Job.
    """
    killed = sum(attempt.reason == OOM_KILLED for attempt in task.status.attempts)
    if not killed or growth.factor == 1:
        return dict(resources)
    return {kind: _grown(values, killed, growth) for kind, values in resources.items()}


def _grown(values: Mapping[str, Any], times: int, growth: MemoryGrowth) -> dict[str, Any]:
    if "memory" not in values:
        return dict(values)
    before = in_bytes(values["memory"])
    mebibytes = math.ceil(min(before * growth.factor**times, max(before, in_bytes(growth.limit))) / 2**20)
    return {**values, "memory": f"{mebibytes}Mi"}
