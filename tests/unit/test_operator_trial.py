"""The trial of an installation where the API server is not at its best; tests/integration/test_trial.py has the rest."""

from typing import Any

import pytest

from task_operator import trial as module
from task_operator.trial import Trial, TrialFailed
from task_platform.kubernetes import ClusterError, Conflict, Manifest, NotFound, Unavailable

DONE = {"phase": "Completed", "finishedAt": "2026-01-01T00:00:00Z"}


class Api:
    """Tasks that are completed as soon as they are made; answers get lost as it is told."""

    def __init__(self, *faults: tuple[str, ClusterError, bool]) -> None:
        self.faults = list(faults)
        """Method, error, and whether the request is carried out all the same; each once, in this order."""
        self.tasks: dict[str, Manifest] = {}
        self.made: list[str] = []

    async def ask(self, method: str, path: str, *, body: Manifest | None = None, **options: Any) -> Manifest:
        assert not options
        fault = self.faults.pop(0) if self.faults and self.faults[0][0] == method else None
        if fault is not None and not fault[2]:
            raise fault[1]
        answer = self._carry_out(path, body)
        if fault is not None:
            raise fault[1]
        return answer

    def _carry_out(self, path: str, body: Manifest | None) -> Manifest:
        name = path.rpartition("/")[2] if body is None else body["metadata"]["name"]
        if body is not None:
            if name in self.tasks:
                raise Conflict("the name is taken")
            self.made.append(name)
            self.tasks[name] = body | {"metadata": {"name": name, "uid": name.upper()}, "status": DONE}
        if name not in self.tasks:
            raise NotFound("no such task")
        return self.tasks[name]

    async def delete(self, path: str, *, uid: str) -> None:
        assert self.tasks.pop(path.rpartition("/")[2])["metadata"]["uid"] == uid


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK", 0.001)


AWAY = Unavailable("no answer")


@pytest.mark.parametrize(
    "faults",
    [
        [],
        [("POST", AWAY, False)],
        [("POST", AWAY, True)],
        [("GET", AWAY, True), ("GET", AWAY, True)],
        [("POST", AWAY, True), ("GET", AWAY, False)],
    ],
    ids=["none", "not made", "made, and no answer", "not read, twice", "made, no answer, not read"],
)
async def test_answers_that_get_lost_make_no_second_task(faults: list[tuple[str, ClusterError, bool]]) -> None:
    api = Api(*faults)
    await Trial(api=api, namespace="knowledge", name="try", seconds=10, document="/data/page.md").run()
    assert [name.rpartition("-")[0] for name in api.made] == ["try-health", "try-page", "try-deleted"]
    assert api.tasks == {}
    assert api.faults == []


async def test_an_api_server_that_stays_away_ends_the_trial_in_its_time() -> None:
    api = Api(*[("POST", AWAY, False)] * 10_000)
    with pytest.raises(Unavailable):
        await Trial(api=api, namespace="knowledge", name="try", seconds=0.01).run()


async def test_a_task_that_somebody_deletes_is_named() -> None:
    api = Api(("GET", NotFound("no such task"), False))
    with pytest.raises(TrialFailed, match=r"task try-health-\w+ was deleted by somebody else"):
        await Trial(api=api, namespace="knowledge", name="try", seconds=10).run()
    assert api.tasks == {}
