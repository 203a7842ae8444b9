"""What `helm test` runs: with a real operator and Job controller and the rights that the chart gives it; pods are played."""

import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from devstack import Endpoints
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Failure
from tests.support.chart import render
from tests.support.devstack import Kubectl
from tests.support.operator_lab import Kubelet, OperatorProcess, Place, until

pytestmark = pytest.mark.integration

Start = Callable[..., OperatorProcess]


@pytest.fixture
def kubeconfig(place: Place, kubectl: Kubectl, cluster: Endpoints, tmp_path: Path) -> Path:
    """Of an account that has the chart's Role for the test."""
    url = "stores.postgres.url=postgresql://tasks:secret@postgres:5432/tasks"
    [role] = [
        one
        for one in render("--set", url)
        if one["kind"] == "Role" and one["metadata"]["labels"]["app.kubernetes.io/component"] == "test"
    ]
    role["metadata"] = {"name": "test", "namespace": place.namespace}
    kubectl.apply(role)
    own = Kubectl(cluster, place.namespace)
    own("create", "serviceaccount", "test")
    own("create", "rolebinding", "test", "--role=test", f"--serviceaccount={place.namespace}:test")
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    for user in config["users"]:
        user["user"] = {"token": own("create", "token", "test").strip()}
    file = tmp_path / "test.kubeconfig"
    file.write_text(yaml.safe_dump(config))
    return file


class Trial:
    """`python -m task_operator trial` as a process."""

    def __init__(self, place: Place, kubeconfig: Path, volume: Path) -> None:
        self._command = ["-m", "task_operator", "trial", f"--namespace={place.namespace}", "--name=try"]
        self._kubeconfig = kubeconfig
        self.volume = volume
        volume.mkdir()

    async def __call__(self, *options: str, folder: bool = True) -> tuple[int, str]:
        """Return exit code and log."""
        given = [*options, *([f"--folder={self.volume}"] if folder else [])]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *self._command,
            *given,
            env={**os.environ, "KUBECONFIG": str(self._kubeconfig)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            said, _ = await asyncio.wait_for(process.communicate(), 90)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return await process.wait(), said.decode()


@pytest.fixture
def trial(place: Place, kubeconfig: Path, tmp_path: Path) -> Trial:
    return Trial(place, kubeconfig, tmp_path / "volume")


async def _gone(place: Place) -> None:
    async def look() -> bool:
        return not await place.objects("processingtasks")

    await until("the tasks of the trial are gone", look)


async def test_health_and_a_page_from_its_file_to_its_deletion(place: Place, process: Start, trial: Trial) -> None:
    (trial.volume / "try-0123abcd.md").write_text("of a trial that was killed")
    (trial.volume / "try-me.md").write_text("somebody else's")
    seen: dict[str, Mapping[str, Any]] = {}
    pages: list[str] = []

    async def ends(pod: Mapping[str, Any]) -> AttemptOutcome:
        for task in await place.objects("processingtasks"):
            seen[task["metadata"]["name"].split("-")[1]] = task["spec"]
        pages.extend(sorted(file.name for file in trial.volume.iterdir()))
        return AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=1)

    async with process().at_work(), Kubelet(place, ends=ends).at_work():
        code, said = await trial("--seconds=60")
    assert (code, "the installation works" in said) == (0, True), said
    assert seen.keys() == {"health", "page", "deleted"}
    assert seen["health"]["type"] == "health_check"
    path = seen["page"]["payload"]["filePath"]
    assert Path(path).name in pages
    assert (Path(path).parent, seen["page"]["kbId"]) == (Path("/data"), "try")
    assert seen["deleted"]["payload"] == {"action": "delete_knowledge_base", "confirm": "try"}
    assert [file.name for file in trial.volume.iterdir()] == ["try-me.md"]
    await _gone(place)


async def test_what_fails_is_named_with_its_reason(place: Place, process: Start, trial: Trial) -> None:
    error = Failure(reason="StoreRefused", message="cannot write: the index is read-only", retryable=False)
    failed = AttemptOutcome(outcome=Outcome.FAILED, attempt=1, reason=error.reason, error=error)
    kubelet = Kubelet(place, outcomes={1: failed})
    async with process().at_work(), kubelet.at_work():
        code, said = await trial("--seconds=60", "--document=/data/handbook.pdf", folder=False)
    assert code == 1
    assert "try-health-" in said
    assert "is Failed: StoreRefused: cannot write: the index is read-only" in said
    await _gone(place)


async def test_without_an_operator_it_ends_in_its_time(place: Place, trial: Trial) -> None:
    code, said = await trial("--seconds=3", folder=False)
    assert code == 1
    assert f"in namespace {place.namespace} is Queued after 3 s" in said
    assert "is the operator ready" in said
    await _gone(place)


async def test_a_volume_that_cannot_be_written_to_is_named_with_the_remedy(place: Place, trial: Trial) -> None:
    trial.volume.rmdir()
    code, said = await trial("--seconds=3")
    assert code == 1
    assert "onto the document volume" in said
    assert "tests.document" in said
    assert await place.objects("processingtasks") == []
