"""What one process does, killed at a call and begun again by the next process, until one has come to the end."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from task_contract.lifecycle import ExitCode
from tests.crash.faults import PLAN, RECORD, Action, Record
from tests.crash.life import World
from tests.crash.matrix import TRIES, Outcome
from tests.crash.process import COUNTER
from tests.support.operator_lab import ROOT

SECONDS = 90
"""Longest time of one process."""


class Repeated(Protocol):
    """Work of a role, in files and a namespace of its own."""

    world: World
    role: str
    kills: frozenset[str]
    """Points at which a process is killed: ``runner SQL COMMIT documents #1 after``."""
    key: str
    processes: int
    """How many there have been."""

    @property
    def record(self) -> Record:
        return Record(self.world.folder / f"{self.key}.{self.role}")

    @property
    def points(self) -> list[str]:
        return [f"{self.role} {point}" for point in self.record.points]

    @property
    def plan(self) -> dict[str, Action]:
        return {point.removeprefix(f"{self.role} "): Action.KILL for point in self.kills}

    @property
    def reached(self) -> bool:
        return self.plan.keys() <= self.record.done.keys()

    async def execute(self, *arguments: str, **environment: str) -> int:
        """Run one process; return how it ended: by itself, with success, or killed. AssertionError for all else."""
        self.processes += 1
        given = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "crds")),
            **self.world.urls,
            "TASKS_LOG_LEVEL": "warning",
            RECORD: str(self.record.path),
            PLAN: json.dumps(self.plan),
            COUNTER: os.devnull,
            **environment,
        }
        log = self.world.folder / f"{self.key}.log"
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.crash.process", self.role, *arguments),
                env=given,
                cwd=self.world.folder,
                stdout=output,
                stderr=output,
            )
            try:
                code = await asyncio.wait_for(process.wait(), SECONDS)
            except TimeoutError:
                process.kill()
                raise AssertionError(f"a {self.role} does not end: {log.read_text()[-2000:]}") from None
        assert code in {ExitCode.SUCCEEDED, -signal.SIGKILL}, log.read_text()[-2000:]
        return code

    async def aclose(self) -> None:
        """Remove what it has made in the stores."""


R = TypeVar("R", bound=Repeated)


async def lead(scenario: str, make: Callable[[], R], live: Callable[[R], Awaitable[list[str]]]) -> Outcome:
    """Have something done with kills; return how its end differs. A point that was not reached is tried again.

    ``live`` does it to the end, and returns the differences.
    """
    started = time.monotonic()
    for _ in range(TRIES):
        life = make()
        try:
            found = await live(life)
        except Exception as error:  # noqa: BLE001 - it has no end: that is what came of it, and the others go on
            found = [f"{type(error).__name__}: {error}"]
        finally:
            await life.aclose()
        if life.reached or found:
            break
    return Outcome(
        scenario=scenario,
        points=tuple(sorted(life.kills)),
        reached=life.reached,
        differences=tuple(found),
        attempts=life.processes,
        seconds=time.monotonic() - started,
    )
