"""Figures of the whole: what is counted how, and how often."""

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
from aiohttp.test_utils import make_mocked_request

from task_gateway.database import DatabaseUnavailable
from task_gateway.stats import Statistics, SystemStats, figures
from tests.unit.test_gateway_following import callers

PERIODS: list[dict[str, Any]] = [
    {"seconds": 60, "completed": 0, "failed": 0, "canceled": 0, "ran": None},
    {"seconds": 300, "completed": 8, "failed": 2, "canceled": 5, "ran": 2.0},
    {"seconds": 3600, "completed": 99, "failed": 1, "canceled": 0, "ran": 12.3456},
]


def row(phase: str, priority: str, tasks: int, oldest: float = 1.0) -> dict[str, Any]:
    return {"phase": phase, "priority": priority, "tasks": tasks, "oldest": oldest}


UNFINISHED = [
    row("Queued", "high", 3, 5.0),
    row("Queued", "low", 4, 70.5),
    row("Processing", "high", 2, 900.0),
    row("Processing", "normal", 5, 901.0),
    row("Retrying", "normal", 1, 902.0),
]


def test_waiting_and_running_tasks_are_told_apart() -> None:
    found = figures(UNFINISHED, PERIODS)
    queue = {"total": 7, "by_priority": {"high": 3, "normal": 0, "low": 4}, "retrying": 1, "oldest_seconds": 70.5}
    assert found["queue"] == queue
    assert (found["running"], found["workers"]) == (7, {"kind": "jobs", "busy": 7, "idle": 0})


def test_rates_count_what_ended_and_success_what_was_judged() -> None:
    found = figures([], PERIODS)["throughput"]
    assert found["1m"] == {
        "completed": 0,
        "failed": 0,
        "canceled": 0,
        "per_second": 0,
        "success_rate": None,
        "average_seconds": None,
    }
    assert (found["5m"]["per_second"], found["5m"]["success_rate"]) == (0.05, 0.8)
    assert (found["1h"]["success_rate"], found["1h"]["average_seconds"]) == (0.99, 12.346)
    assert figures([], PERIODS)["queue"]["oldest_seconds"] is None


class Counts:
    """Counts, and how often they were asked for."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.now = 100.0
        self.takes = 0.0
        self.away = False

    async def unfinished(self, scope: Any) -> list[dict[str, Any]]:
        self.asked.append(scope)
        self.now += self.takes
        await asyncio.sleep(0)
        if self.away:
            raise DatabaseUnavailable("cannot ask PostgreSQL: away")
        return UNFINISHED

    async def ended(self, scope: Any, *, seconds: Any) -> list[dict[str, Any]]:
        return PERIODS


def asking(counts: Counts, **stores: Any) -> Callable[..., Any]:
    statistics = Statistics(counts=counts, callers=callers(), stores=stores, clock=lambda: counts.now)
    [route] = statistics.routes()

    async def ask(namespace: str = "knowledge") -> dict[str, Any]:
        response = await route.handler(make_mocked_request("GET", f"/api/v1/stats/system?namespace={namespace}"))
        body = response.body  # type: ignore[attr-defined]
        told: dict[str, Any] = orjson.loads(body)
        SystemStats.model_validate(told)
        return told

    return ask


async def test_figures_are_counted_once_a_second_for_all_who_ask() -> None:
    counts = Counts()
    ask = asking(counts)
    first, second = await asyncio.gather(ask(), ask())
    assert first == second
    counts.now += 0.9
    assert (await ask())["age_seconds"] == 0.9
    assert len(counts.asked) == 1
    counts.now += 0.2
    assert (await ask())["age_seconds"] == 0
    assert len(counts.asked) == 2


async def test_what_takes_long_to_count_is_counted_less_often() -> None:
    counts = Counts()
    counts.takes = 0.5
    ask = asking(counts)
    await ask()
    counts.now += 9
    assert (await ask())["age_seconds"] == 9
    counts.now += 2
    await ask()
    assert len(counts.asked) == 2


async def test_each_set_of_namespaces_has_figures_of_its_own() -> None:
    counts = Counts()
    ask = asking(counts)
    assert (await ask("other"))["namespaces"] == ["other"]
    assert (await ask("*"))["namespaces"] == ["knowledge", "other"]
    assert counts.asked == [("other",), ("knowledge", "other")]


async def test_stores_are_asked_and_one_that_is_away_takes_nothing_from_the_rest() -> None:
    counts = Counts()
    counts.away = True

    async def well() -> None:
        pass

    async def broken() -> None:
        raise OSError("cannot connect")

    told = await asking(counts, postgres=broken, redis=well, milvus=None)()
    assert {name: store["status"] for name, store in told["stores"].items()} == {
        "postgres": "down",
        "redis": "ok",
        "milvus": "off",
    }
    assert (told["queue"], told["running"], told["throughput"]) == (None, None, None)
