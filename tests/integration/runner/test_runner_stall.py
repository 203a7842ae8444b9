"""An attempt that hangs, in a process of its own: ended in time, with the reason, whatever it hangs in."""

import asyncio
import socket
import time
import uuid

import pytest

from job_runner import elasticsearch, milvus, postgres
from task_contract.lifecycle import ExitCode
from task_contract.messages import AttemptOutcome, Outcome, hung
from task_contract.models import Stage
from tests.support.runner_lab import Lab

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


@pytest.mark.parametrize("where", ["thread", "loop"])
async def test_an_attempt_without_progress_ends_and_says_where(lab: Lab, where: str) -> None:
    lab.write(["one", "two"])
    task = lab.task(stall_timeout="2s")
    started = time.monotonic()
    process = lab.command("tests.support.hanging_runner", where, "run", lab.task_file(task))
    output, errors = await asyncio.to_thread(process.communicate, timeout=60)
    assert process.returncode == ExitCode.RETRYABLE, errors
    assert time.monotonic() - started < 30
    outcome = AttemptOutcome.parse(output)
    assert outcome is not None
    assert outcome.error is not None
    assert (outcome.outcome, outcome.reason, outcome.error.stage) == (Outcome.FAILED, "NoProgress", Stage.EMBED)
    assert outcome.error.retryable
    assert outcome.error.message.startswith("cannot go on: no progress in stage embed for 2s; ")
    assert outcome.log is not None
    assert f"hang_in_{'a_thread' if where == 'thread' else 'the_loop'} < " in outcome.log
    assert f"in hang_in_{'a_thread' if where == 'thread' else 'the_loop'}" in errors
    # The kubelet is told the same; PostgreSQL too, where the event loop could.
    assert AttemptOutcome.parse((lab.folder / "termination-log").read_text()) == outcome
    row = await lab.fetch("SELECT outcome FROM task_results WHERE task_uid = $1", uuid.UUID(task.metadata.uid))
    assert AttemptOutcome.parse(row) == (outcome if where == "thread" else None)


async def test_an_attempt_that_holds_the_interpreters_lock_ends_with_its_stacks_in_the_log(lab: Lab) -> None:
    lab.write(["one", "two"])
    process = lab.command("tests.support.hanging_runner", "lock", "run", lab.task_file(lab.task(stall_timeout="2s")))
    output, errors = await asyncio.to_thread(process.communicate, timeout=60)
    assert (process.returncode, output) == (1, ""), errors
    assert "in hang_in_c" in errors
    assert hung(errors[-2048:])  # that is what the kubelet hands over
    assert (lab.folder / "termination-log").read_text() == ""


@pytest.mark.parametrize("variable", ["TASKS_POSTGRES_URL", "TASKS_MILVUS_URL", "TASKS_ELASTICSEARCH_URL"])
async def test_a_store_that_is_silent_for_longer_than_that_gives_the_attempt_back(
    lab: Lab, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for store in (postgres, milvus, elasticsearch):
        monkeypatch.setattr(store, "TIMEOUT", 4.0)  # as the proportion is by default: a test is not to wait a minute
    lab.write(["one", "two"])

    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never says a word
        port = server.getsockname()[1]
        silent = {"TASKS_POSTGRES_URL": f"postgresql://nobody@127.0.0.1:{port}/none"}
        changed = {variable.removeprefix("TASKS_").lower(): silent.get(variable, f"http://127.0.0.1:{port}")}
        outcome, code = await lab.run(lab.task(stall_timeout="3s"), **changed)
    assert (code, outcome.reason) == (ExitCode.STORE_UNAVAILABLE, "StoreUnavailable"), outcome
