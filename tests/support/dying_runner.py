"""A runner that kills itself with SIGKILL at a point: ``python -m tests.support.dying_runner TASK_FILE COUNTER POINT``."""

import asyncio
import os
import signal
import sys
from pathlib import Path

from job_runner import settings
from job_runner.attempt import read_task
from tests.support.runner_lab import HashEmbedder, Reached, run_watched


async def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    task_file, counter, point = sys.argv[1:]
    asyncio.run(run_watched(read_task(Path(task_file)), settings.load(), HashEmbedder(Path(counter)), Reached(point, die)))
