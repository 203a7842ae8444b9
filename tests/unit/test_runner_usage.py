"""What an attempt uses is measured, and shared out where a process works on several."""

import asyncio
import threading

import pytest

from job_runner import usage
from job_runner.embed import batches
from job_runner.stages import Stages
from job_runner.usage import Meter, Process, Usage
from task_contract.errors import StoreUnavailable
from task_contract.models import Stage


class Machine:
    """A process whose clock, processor time and memory are what the test says."""

    def __init__(self) -> None:
        self.now, self.cpu, self.memory = 100.0, 4.0, 1000
        self.process = Process(clock=lambda: self.now, cpu=lambda: self.cpu, memory=lambda: self.memory)

    def passes(self, seconds: float, *, cpu: float = 0.0, memory: int | None = None) -> None:
        self.now += seconds
        self.cpu += cpu
        self.memory = self.memory if memory is None else memory


class Silent:
    def report(self, stage: Stage, percent: int, *, counted: tuple[int, int] | None = None) -> None:
        """Nobody listens."""


def test_all_of_a_process_of_its_own_belongs_to_the_attempt() -> None:
    machine = Machine()
    machine.process.begin(meter := Meter(since=90.0))
    machine.passes(2, cpu=3, memory=3000)
    machine.process.end(meter)
    found = meter.usage
    assert (found.seconds, found.cpu_seconds) == (12, 7)
    assert found.memory_byte_seconds == 10 * 1000 / 2 + 2 * 2000  # from nothing to the first look, and from there to the end
    assert found.memory_peak_bytes > 3000  # the kernel's own, of this very process


def test_attempts_that_run_at_once_share_what_the_process_uses() -> None:
    machine = Machine()
    machine.process.begin(first := Meter())
    machine.passes(1, cpu=1)
    machine.process.begin(second := Meter())
    machine.passes(2, cpu=4, memory=5000)
    machine.process.end(second)
    machine.passes(1, cpu=1)
    machine.process.end(first)
    machine.passes(5, cpu=5)  # of nobody
    machine.process.begin(third := Meter())
    machine.process.end(third)
    assert (first.usage.seconds, first.usage.cpu_seconds) == (4, 1 + 2 + 1)
    assert (second.usage.seconds, second.usage.cpu_seconds) == (2, 2)
    assert (third.usage.seconds, third.usage.cpu_seconds) == (0, 0)
    assert first.usage.memory_byte_seconds == 1 * 1000 + 2 * 3000 / 2 + 1 * 5000
    assert second.usage.memory_peak_bytes == 5000


async def test_what_is_done_counts_for_the_attempt_that_it_is_done_for() -> None:
    process = Process()
    began = asyncio.Event()

    async def attempt(meter: Meter, *, tokens: list[int]) -> None:
        async with process.metered(meter):
            began.set()
            with Stages(Silent()).enter(Stage.EMBED):
                batch = await asyncio.to_thread(lambda: list(batches(tokens, budget=100)))
            assert batch
            with usage.asked("milvus"):
                await asyncio.sleep(0)
            with pytest.raises(StoreUnavailable), usage.asked("milvus"):
                raise StoreUnavailable("cannot reach it")

    first, second = Meter(), Meter()
    await asyncio.gather(attempt(first, tokens=[10, 20, 30]), attempt(second, tokens=[7]))
    with usage.asked("milvus"):
        usage.embedded(texts=1, tokens=1)
    assert [(one.usage.texts, one.usage.tokens) for one in (first, second)] == [(3, 60), (1, 7)]
    assert first.usage.stores["milvus"][0] == 2
    assert first.usage.stages.keys() == {"embed"}


def test_what_the_kernel_says_of_this_process() -> None:
    process = Process()
    process.begin(meter := Meter())
    ballast = bytearray(64 << 20)
    ballast[::4096] = b"1" * len(ballast[::4096])
    worked = threading.Thread(target=lambda: sum(range(2_000_000)))
    worked.start()
    worked.join()
    process.end(meter)
    found = meter.usage
    assert found.cpu_seconds > 0
    assert found.memory_peak_bytes > 64 << 20
    assert isinstance(found, Usage)
