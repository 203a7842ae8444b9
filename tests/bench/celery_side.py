"""Celery (prefork, Redis) on the same no-op and the same texts: rate, CPU, and what it loses when its worker is killed."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psutil

from devstack import DevstackError, network, process
from devstack.stores import redis
from tests.bench import corpus, side_by_side
from tests.bench.pool_rounds import TEXT, TEXTS

_FOLDER: Final = Path(__file__).parent
CONFIGURATIONS: Final = {
    "as installed": ({}, "celery -c 2, its defaults"),
    "acks_late": ({"SIDE_LATE": "1"}, "task_acks_late and task_reject_on_worker_lost"),
}


def measure() -> dict[str, Any]:
    """Measure both configurations. Raises DevstackError."""
    network.up()  # Redis listens on its bridge too
    redis.up()
    python = side_by_side.environment()
    text = "".join(corpus.chinese(TEXTS * TEXT))
    texts = json.dumps([text[start : start + TEXT] for start in range(0, TEXTS * TEXT, TEXT)])
    found = {}
    for number, (name, (settings, what)) in enumerate(CONFIGURATIONS.items(), 1):
        url = redis.environment(f"127.0.0.1:{redis.port()}")["TASKS_REDIS_URL"].rpartition("/")[0]
        environment = {
            **os.environ,
            **settings,
            "SIDE_BROKER": f"{url}/{number + 5}",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        found[name] = {"what": what, **_measured(python, environment, texts)}
    return found


def _measured(python: Path, environment: dict[str, str], texts: str) -> dict[str, Any]:
    with tempfile.TemporaryFile() as errors:
        worker = _Worker(python, environment)
        try:
            load = subprocess.Popen(
                [str(python), "-c", "import celery_app; celery_app.load()"],
                cwd=_FOLDER,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            assert load.stdin is not None
            assert load.stdout is not None
            load.stdin.write(texts)
            load.stdin.close()
            before = worker.cpu() + _redis()
            first = json.loads(load.stdout.readline() or "{}")
            after = worker.cpu() + _redis()
            second = json.loads(load.stdout.readline() or "{}")
            last_cpu = worker.cpu() + _redis()
            if load.stdout.readline().strip() != "kill":
                errors.seek(0)
                raise DevstackError(f"cannot measure Celery:\n{errors.read().decode()[-3000:]}")
            time.sleep(2)
            worker.kill()
            time.sleep(1)
            worker = _Worker(python, environment)
            last = json.loads(load.stdout.readline())
            load.wait(30)
        finally:
            worker.kill()
    return {
        "noop_rate": 5000 / first["noop_seconds"],
        "noop_cpu": (after - before + first["cpu"]) * 1000 / 5000,
        "embed_rate": TEXTS / second["embed_seconds"],
        "embed_cpu": (last_cpu - after + second["cpu"] - first["cpu"]) * 1000 / TEXTS,
        "lost": last["of"] - last["done"],
        "killed_of": last["of"],
    }


class _Worker:
    def __init__(self, python: Path, environment: dict[str, str]) -> None:
        command = [str(python), "-m", "celery", "-A", "celery_app", "worker", "-c", "2", "--loglevel", "ERROR"]
        self._process = subprocess.Popen(
            command, cwd=_FOLDER, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def _all(self) -> Iterator[psutil.Process]:
        parent = psutil.Process(self._process.pid)
        yield parent
        yield from parent.children(recursive=True)

    def cpu(self) -> float:
        """CPU seconds of the worker and its children."""
        return sum(sum(one.cpu_times()[:2]) for one in self._all())

    def kill(self) -> None:
        """Kill all of it at once."""
        if self._process.poll() is None:
            for one in list(self._all()):
                one.kill()
            self._process.wait()


def _redis() -> float:
    found = process.find("redis")
    return 0.0 if found is None else sum(psutil.Process(found.pid).cpu_times()[:2])
