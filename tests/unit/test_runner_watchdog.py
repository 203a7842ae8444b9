"""The watchdog over an attempt: when silence is a stall, and who is told."""

import asyncio
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest

from job_runner.backoff import patiently
from job_runner.watchdog import STORE_SECONDS, Pulse, Watchdog, asking, beat, stacks_of_all_threads
from task_contract.models import ProcessingTask, Stage


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def watched(pulse: Pulse, *, on_stall: Callable[[], None] = lambda: None, limit: float = 0.05) -> Watchdog:
    return Watchdog(pulse, limit=limit, on_stall=on_stall, in_loop=lambda function: function())


@pytest.mark.parametrize(
    ("what", "left"),
    [
        ([], 60),
        ([10.0], 50),
        ([60.0], 0),
        ([70.0], -10),
        ([59.0, "beat"], 60),
        ([59.0, "beat", 59.0, "beat", 1.0], 59),
        ([59.0, "ask"], STORE_SECONDS - 59),
        ([59.0, "ask", 100.0, "turn"], STORE_SECONDS - 159),
        ([59.0, "ask", 100.0, "turn", 59.0], STORE_SECONDS - 218),
        ([59.0, "ask", 100.0, "turn", 60.0], -159),  # the loop hangs: nobody waits for an answer
        ([59.0, "ask", 100.0, "answer"], 60),
        ([59.0, "ask", "ask", 100.0, "answer", "turn", 10.0], STORE_SECONDS - 10),
        ([59.0, "ask", "ask", 100.0, "answer", "answer", 61.0], -1),
    ],
    ids=str,
)
def test_silence_is_a_stall_unless_a_store_is_being_asked(what: list[float | str], left: float) -> None:
    clock = Clock()
    pulse = Pulse(clock)
    asked = []
    for one in what:
        match one:
            case "beat":
                pulse.beat()
            case "ask":
                asked.append(pulse.asking())
                asked[-1].__enter__()
            case "turn":
                pulse.loop_turned()
            case "answer":
                asked.pop().__exit__(None, None, None)
            case float():
                clock.now += one
    assert pulse.left(60) == left


def test_a_store_is_never_given_less_time_than_the_task_gives() -> None:
    pulse = Pulse(Clock())
    with pulse.asking():
        assert pulse.left(3600) == 3600


def test_a_store_that_fails_has_answered_too() -> None:
    clock = Clock()
    pulse = Pulse(clock)

    def fail() -> None:
        with pulse.asking():
            clock.now += 100
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    assert pulse.left(60) == 60


def test_the_stage_that_was_entered_last_is_remembered() -> None:
    pulse = Pulse(Clock())
    pulse.beat(Stage.PARSE)
    pulse.beat()
    assert pulse.stage is Stage.PARSE


async def test_what_is_called_within_finds_the_pulse_in_tasks_and_threads_too() -> None:
    clock = Clock()
    pulse = Pulse(clock)

    async def task() -> None:
        await asyncio.to_thread(beat)

    with watched(pulse, limit=60):
        clock.now += 30
        await asyncio.create_task(task())
        assert pulse.left(60) == 60
        with asking():
            assert pulse.left(60) == STORE_SECONDS
    clock.now += 30
    beat()  # of no attempt
    assert pulse.left(60) == 30


async def test_patience_with_a_busy_store_is_the_stores_time() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    seen = []

    async def call() -> str:
        seen.append(pulse.left(60))
        return "done"

    with watched(pulse, limit=60):
        assert await patiently(call) == "done"
    assert seen == [STORE_SECONDS]


def test_a_stall_is_told_once_and_the_stacks_are_written(capfd: pytest.CaptureFixture[str]) -> None:
    told = threading.Semaphore(0)
    with watched(Pulse(), on_stall=told.release):
        assert told.acquire(timeout=10)
        assert not told.acquire(timeout=0.2)
    assert "test_a_stall_is_told_once_and_the_stacks_are_written" in capfd.readouterr().err


def test_work_that_goes_on_is_let_alone() -> None:
    told = threading.Event()
    pulse = Pulse()
    with watched(pulse, on_stall=told.set):
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            pulse.beat()
    assert not told.is_set()


def test_an_attempt_that_has_ended_is_not_watched_any_more() -> None:
    told = threading.Event()
    with watched(Pulse(), on_stall=told.set):
        pass
    assert not told.wait(0.3)


def test_the_stacks_name_every_thread() -> None:
    waiting, done = threading.Event(), threading.Event()

    def somewhere_else() -> None:
        waiting.set()
        done.wait(10)

    thread = threading.Thread(target=somewhere_else)
    thread.start()
    assert waiting.wait(10)
    stacks = stacks_of_all_threads()
    done.set()
    thread.join()
    assert "in somewhere_else" in stacks
    assert "in test_the_stacks_name_every_thread" in stacks


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"type": "document_processing"}, timedelta(minutes=15)),
        ({"type": "document_processing", "timeout": "5m"}, timedelta(minutes=5)),
        ({"type": "document_processing", "timeout": "24h"}, timedelta(minutes=15)),
        ({"type": "document_processing", "timeout": "5m", "stallTimeout": "10m"}, timedelta(minutes=10)),
        ({"type": "health_check"}, timedelta(minutes=1)),
        ({"type": "health_check", "timeout": "30s"}, timedelta(seconds=30)),
    ],
    ids=str,
)
def test_the_limit_of_silence_by_type(spec: dict[str, str], expected: timedelta) -> None:
    task = ProcessingTask.model_validate({"metadata": {"name": "a"}, "spec": spec})
    assert task.spec.effective_stall_timeout == expected
