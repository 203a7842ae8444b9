"""How many CPUs this process may use: a container's limit is not what the machine has."""

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def cpu_limit(cgroup: Path = _CGROUP) -> int | None:
    """Return the CPUs of the container's limit (its control group, version 2 or 1); ``None`` without one.

    A limit of half a CPU is one; the part of a CPU above a whole number counts as one.
    """
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        limit = math.ceil(int(quota) / int(period))
    except (ValueError, ZeroDivisionError):  # "max": no limit
        return None
    return min(len(os.sched_getaffinity(0)), limit) if limit > 0 else None  # -1: no limit in version 1


def available_cpus(cgroup: Path = _CGROUP) -> int:
    """Return the CPUs of the container's limit, else those that the kernel gives us."""
    return cpu_limit(cgroup) or len(os.sched_getaffinity(0))
