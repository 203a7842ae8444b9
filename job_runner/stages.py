"""Which stage of its work an attempt is in, and how long each one took."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import structlog

from job_runner import usage
from job_runner.progress import Progress
from task_contract.errors import TaskError
from task_contract.models import Stage

DOCUMENT: Final[Mapping[Stage, int]] = {
    Stage.FETCH: 0,
    Stage.PARSE: 2,
    Stage.SPLIT: 15,
    Stage.EMBED: 18,
    Stage.STORE: 85,
    Stage.VERIFY: 90,
    Stage.PUBLISH: 96,
}
"""Percent of an attempt that are done when a stage of a document starts."""

log = structlog.get_logger(__name__)


class Stages:
    """Which stage is under way, and how long each one took."""

    def __init__(
        self,
        progress: Progress,
        *,
        starts: Mapping[Stage, int] = DOCUMENT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``starts``: percent of the attempt that are done when a stage starts, of all stages that are entered."""
        self._progress = progress
        self._starts = starts
        self._clock = clock
        self._spent: dict[Stage, float] = {}

    @contextlib.contextmanager
    def enter(self, stage: Stage) -> Iterator[None]:
        """Time a stage, report it, and name it in errors that leave it."""
        started = self._clock()
        self._progress.report(stage, self._starts[stage])
        try:
            yield
        except TaskError as error:
            error.stage = error.stage or stage
            raise
        finally:
            self.add(stage, self._clock() - started)
            log.info("stage ended", stage=str(stage), seconds=round(self._clock() - started, 3))

    def add(self, stage: Stage, seconds: float) -> None:
        """Count time for a stage."""
        usage.spent(stage, seconds)
        self._spent[stage] = self._spent.get(stage, 0) + seconds

    def within(self, stage: Stage, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` parts of a stage are done."""
        later = [start for start in self._starts.values() if start > self._starts[stage]]
        width = min(later, default=100) - self._starts[stage]
        self._progress.report(stage, self._starts[stage] + width * done // max(total, 1))

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage, for the result."""
        return {str(stage): round(spent, 3) for stage, spent in self._spent.items()}
