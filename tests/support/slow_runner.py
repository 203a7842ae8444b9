"""A worker with a model that does what texts say: ``python -m tests.support.slow_runner work``.

``sleep 2`` takes two seconds, ``fail`` is a text that no model reads, ``hang`` never ends, ``loop`` holds up the event loop.
"""

import asyncio
import re
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from job_runner import watchdog, worker
from job_runner.__main__ import main
from tests.support.runner_lab import HashEmbedder

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Obedient(HashEmbedder):
    def embed(self, texts: Sequence[str]) -> "npt.NDArray[np.float32]":
        for text in texts:
            if found := re.match(r"sleep ([0-9.]+)", text):
                time.sleep(float(found[1]))
            if text.startswith("fail"):
                raise ValueError(f"a text that no model reads: {text}")
            if text.startswith("loop"):
                loop.call_soon_threadsafe(threading.Event().wait)
            if text.startswith(("hang", "loop")):
                threading.Event().wait()
        return super().embed(texts)


class Worker(worker.Worker):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, make=lambda name, *, threads: Obedient(), **options)

    async def run(self) -> Any:
        global loop
        loop = asyncio.get_running_loop()
        return await super().run()


loop: asyncio.AbstractEventLoop
worker.Worker = Worker  # type: ignore[misc]
watchdog.LOOP_SECONDS = 2.0  # type: ignore[misc]  # the test is not to wait for longer
sys.exit(main(sys.argv[1:]))
