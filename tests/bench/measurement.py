"""What a benchmark reports."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One figure. ``target`` is in ``unit`` too; ``baseline`` is what the same run measured for comparison."""

    metric: str
    value: float
    unit: str
    how: str
    target: float | None = None
    better: Literal["lower", "higher"] = "lower"
    baseline: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; ``None`` without one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.better == "lower" else self.value >= self.target

    def record(self) -> dict[str, object]:
        """Return the row of the result file."""
        return {
            "metric": self.metric,
            "value": round(self.value, 4),
            "unit": self.unit,
            "target": self.target,
            "baseline": self.baseline,
            "met": self.met,
            "how": self.how,
        }


Benchmark = Callable[[], list[Measurement]]
