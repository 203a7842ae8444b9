"""The runner with a model that hangs: ``python -m tests.support.hanging_runner WHERE run TASK_FILE``."""

import asyncio
import re
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from job_runner import attempt, watchdog
from job_runner.__main__ import main
from tests.support.runner_lab import HashEmbedder

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def hang_in_a_thread() -> None:
    """Wait for what never comes: the event loop goes on."""
    threading.Event().wait()


def hang_in_the_loop() -> None:
    """Hold up the event loop; other threads go on."""
    loop.call_soon_threadsafe(threading.Event().wait)
    threading.Event().wait()


def hang_in_c() -> None:
    """Hold the interpreter's lock for ages: no thread goes on."""
    re.match(r"(x+x+)+y", "x" * 64)


class Hanging(HashEmbedder):
    def embed(self, texts: Sequence[str]) -> "npt.NDArray[np.float32]":
        {"thread": hang_in_a_thread, "loop": hang_in_the_loop, "lock": hang_in_c}[where]()
        return super().embed(texts)


def make(name: str, *, threads: int) -> Hanging:
    return Hanging()


async def run_attempt(*arguments: object, **options: object) -> object:
    global loop
    loop = asyncio.get_running_loop()
    return await original(*arguments, make=make, **options)  # type: ignore[arg-type]  # passed on as they are


where = sys.argv[1]
loop: asyncio.AbstractEventLoop
original = attempt.run_attempt
attempt.run_attempt = run_attempt  # type: ignore[assignment]
watchdog.LOOP_SECONDS = 2.0  # type: ignore[misc]  # the test is not to wait for longer
watchdog.LOCK_SECONDS = 1.0  # type: ignore[misc]
sys.exit(main(sys.argv[2:]))
