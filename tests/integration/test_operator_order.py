"""Tasks that wait for others, and for a time, on a real API server."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Failure
from tests.support.operator_lab import Kubelet, OperatorProcess, Place, until

pytestmark = pytest.mark.integration

Start = Callable[..., OperatorProcess]
SUCCESS = AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=1, reason="Completed")
BROKEN = Failure(reason="DocumentNotFound", message="cannot find it", retryable=False)
FAILURE = AttemptOutcome(outcome=Outcome.FAILED, attempt=1, reason="DocumentNotFound", error=BROKEN)


async def test_tasks_run_in_the_order_of_what_they_need_whoever_came_first(place: Place, process: Start, url: str) -> None:
    operator = process(OPERATOR_POSTGRES_URL=url)
    async with operator.at_work():
        await place.create("last", dependsOn=["first", "second"])
        waits = await place.wait_for("Queued", name="last", reason="DependsOn")
        assert waits["queue"]["message"] == "waits for 2 of 2 tasks: first (there is none), second (there is none)"
        operator.kill()
        operator.start()
        await operator.ready()
        async with Kubelet(place, outcomes={1: SUCCESS}).at_work():
            await place.create("first", ttlSecondsAfterFinished=0)
            await until("the first is deleted", lambda: _gone(place, "first"))
            assert (await place.status("last"))["phase"] == "Queued"
            await place.create("second", dependsOn=["first"])
            await place.wait_for("Completed", name="second")
            await place.wait_for("Completed", name="last", seconds=10)


async def _gone(place: Place, name: str) -> bool:
    return await place.task(name) is None


async def test_who_needs_a_task_that_failed_fails_and_so_does_who_needs_that_one(place: Place, process: Start) -> None:
    async with process().at_work(), Kubelet(place, outcomes={1: FAILURE}).at_work():
        await place.create("third", dependsOn=["second"])
        await place.create("second", dependsOn=["first"])
        await place.create("first")
        third = await place.wait_for("Failed", name="third", reason="DependencyFailed")
        second = await place.status("second")
        assert second["error"]["message"].startswith("cannot run: task first, which spec.dependsOn names, is Failed")
        assert "task second" in third["error"]["message"]


async def test_a_circle_is_refused_and_who_waits_for_it_fails(place: Place, process: Start) -> None:
    with pytest.raises(AssertionError, match="a task cannot wait for itself"):
        await place.create("itself", dependsOn=["itself"])
    async with process().at_work():
        await place.create("outside", dependsOn=["one"])
        await place.create("one", dependsOn=["two"])
        await place.create("two", dependsOn=["one"])
        for name in ("one", "two"):
            await place.wait_for("Failed", name=name)
        reasons = {(await place.status(name))["error"]["reason"] for name in ("one", "two")}
        assert "InvalidTask" in reasons
        await place.wait_for("Failed", name="outside", reason="DependencyFailed")


async def test_a_task_starts_at_its_time_and_not_before(place: Place, process: Start) -> None:
    async with process().at_work(), Kubelet(place, outcomes={1: SUCCESS}).at_work():
        due = (datetime.now(UTC) + timedelta(seconds=8)).replace(microsecond=0)
        await place.create("later", notBefore=due.isoformat())
        await place.wait_for("Queued", name="later", reason="NotBefore")
        status = await place.wait_for("Completed", name="later", seconds=60)
    started = datetime.fromisoformat(status["startedAt"])
    assert timedelta() <= started - due < timedelta(seconds=10)
