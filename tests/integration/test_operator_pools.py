"""Worker pools on a real API server and Redis, with the operator as a process and workers that are scripted."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from devstack import Endpoints
from tests.support.devstack import Kubectl
from tests.support.operator_lab import OperatorProcess, Place, until
from tests.support.pool_lab import PoolPlace, Workforce

pytestmark = pytest.mark.integration

Start = Callable[..., OperatorProcess]
QUICK = {"scaleDownAfter": "1s", "idleTimeout": "1s", "lease": "5s", "gracePeriod": "1s"}
HEALTH: dict[str, Any] = {"type": "health_check", "kbId": None, "payload": {}}


@pytest.fixture
def redis_url(stores: Endpoints) -> str:
    return stores.host_urls["TASKS_REDIS_URL"]


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    redis: Redis = Redis.from_url(redis_url, decode_responses=True)
    yield redis
    await redis.aclose()


@pytest.fixture
def pool(place: Place) -> PoolPlace:
    return PoolPlace(place)


@pytest.fixture
async def workforce(place: Place, redis: Redis) -> AsyncIterator[Workforce]:
    async with Workforce(place, redis).at_work() as workforce:
        yield workforce


async def test_tasks_start_workers_that_carry_them_out_and_go_again(
    place: Place, pool: PoolPlace, workforce: Workforce, process: Start, redis_url: str
) -> None:
    await pool.create(max=3, targetBacklog=2, **QUICK)
    operator = process(OPERATOR_REDIS_URL=redis_url)
    async with operator.at_work():
        await pool.wait_for(desired=0, ready=0, observedGeneration=1)
        assert await pool.conditions() == {"Ready": "True ScaledToZero"}
        for number in range(12):
            await place.create(f"t{number}", **HEALTH)
        for number in range(12):
            status = await place.wait_for("Completed", name=f"t{number}")
            assert status["executor"] == "pool"
        assert 1 <= workforce.most <= 3
        await pool.wait_for(replicas=0, ready=0, queued=0)
        await until("the Jobs are gone", lambda: _empty(pool))
        _, metrics = await operator.get("/metrics")
        labels = f'namespace="{place.namespace}",pool="texts"'
        assert f"worker_pool_active_count{{{labels}}} 0.0" in metrics
        assert f"worker_pool_idle_count{{{labels}}} 0.0" in metrics
        assert f"task_pool_attempts_total{{{labels}}} 12.0" in metrics
        assert f"task_pool_batch_room_total{{{labels}}} 24.0" in metrics


async def _empty(pool: PoolPlace) -> bool:
    return not await pool.jobs()


async def test_a_busy_worker_outlives_scaling_down_and_a_new_operator(
    place: Place, pool: PoolPlace, workforce: Workforce, process: Start, redis_url: str
) -> None:
    await pool.create(min=3, **QUICK)
    workforce.holds = True
    operator = process(OPERATOR_REDIS_URL=redis_url)
    async with operator.at_work():
        await pool.wait_for(ready=3, idle=3)
        await place.create("held", **HEALTH)
        await pool.wait_for(busy=1)
        (busy,) = [worker for worker in workforce.workers.values() if worker.leases]
        operator.kill()
        await pool.edit(min=0, replicas=0)
        operator.start()
        await pool.wait_for(desired=0, replicas=1)
        assert [*workforce.workers] == [busy.pod]
        assert busy.leases
        workforce.holds = False
        await place.wait_for("Completed", name="held")
        await until("the Jobs are gone", lambda: _empty(pool))
    assert len(workforce.seen) == 3


async def test_another_image_is_rolled_out_with_one_worker_too_many_at_a_time(
    pool: PoolPlace, workforce: Workforce, process: Start, redis_url: str
) -> None:
    await pool.create(min=2, max=2, **QUICK)
    async with process(OPERATOR_REDIS_URL=redis_url).at_work():
        first = await pool.wait_for(ready=2)
    async with process(OPERATOR_REDIS_URL=redis_url, OPERATOR_RUNNER_IMAGE="runner:other").at_work():

        async def rolled() -> bool:
            found = {worker.revision for worker in workforce.workers.values()}
            return len(workforce.workers) == 2 and first["revision"] not in found

        await until("all workers are new", rolled, seconds=60)
        second = await pool.wait_for(ready=2, replicas=2)
        assert second["revision"] != first["revision"]
        await until("it is at rest", lambda: _is(pool, {"Ready": "True Serving"}))
    assert workforce.most == 3
    images = {job["spec"]["template"]["spec"]["containers"][0]["image"] for job in await pool.jobs()}
    assert images == {"runner:other"}


async def _is(pool: PoolPlace, conditions: dict[str, str]) -> bool:
    return await pool.conditions() == conditions


async def test_workers_that_fail_are_few_and_the_condition_has_their_last_words(
    pool: PoolPlace, workforce: Workforce, process: Start, redis_url: str
) -> None:
    workforce.boots = False
    await pool.create(min=2, **QUICK)
    async with process(OPERATOR_REDIS_URL=redis_url).at_work():
        await until("it says so", lambda: _is(pool, {"Ready": "False WorkersFail", "Stalled": "True WorkersFail"}))
        message = next(one["message"] for one in (await pool.status())["conditions"] if one["type"] == "Stalled")
        assert "cannot load the model: no such folder" in message
        assert len(workforce.seen) <= 4
        workforce.boots = True
        await pool.edit(concurrency=2)  # another revision: no waiting for the end of the backoff
        await pool.wait_for(ready=2)
        await until("it is well", lambda: _is(pool, {"Ready": "True Serving"}))


async def test_a_deleted_pod_is_replaced(
    place: Place, pool: PoolPlace, workforce: Workforce, process: Start, redis_url: str
) -> None:
    await pool.create(min=1, **QUICK)
    async with process(OPERATOR_REDIS_URL=redis_url).at_work():
        await pool.wait_for(ready=1)
        (name,) = workforce.workers
        await place.kube.do("DELETE", place.path("pods", name))
        await until("another one works", lambda: _others(workforce, name))
        await pool.wait_for(ready=1, replicas=1)


async def _others(workforce: Workforce, name: str) -> bool:
    return bool(workforce.workers.keys() - {name})


async def test_a_pool_that_is_deleted_takes_its_jobs_and_its_keys_with_it(
    pool: PoolPlace, workforce: Workforce, process: Start, redis_url: str, redis: Redis
) -> None:
    await pool.create(min=1, **QUICK)
    async with process(OPERATOR_REDIS_URL=redis_url).at_work():
        await pool.wait_for(ready=1)
        assert await redis.exists(*workforce.keys.all)
        await pool.delete()
        await until("its Jobs are gone", lambda: _empty(pool))

        async def dropped() -> bool:
            return not await redis.exists(*workforce.keys.all)

        await until("its keys are gone", dropped)


async def test_without_redis_a_pool_says_what_it_lacks(pool: PoolPlace, process: Start) -> None:
    await pool.create(min=2)
    async with process().at_work():
        await until("it says so", lambda: _is(pool, {"Ready": "False RedisNotConfigured"}))
        assert await pool.jobs() == []


async def test_while_redis_is_away_the_pool_says_so_and_keeps_its_workers(
    pool: PoolPlace, workforce: Workforce, process: Start, redis_url: str
) -> None:
    await pool.create(min=1, **QUICK)
    async with process(OPERATOR_REDIS_URL=redis_url).at_work():
        await pool.wait_for(ready=1)
    await pool.edit(min=0)
    async with process(OPERATOR_REDIS_URL="redis://127.0.0.1:1/0").at_work():
        await until("it says so", lambda: _is(pool, {"Ready": "False RedisUnavailable"}))
        assert (await pool.status())["replicas"] == 1
        assert len(await pool.jobs()) == 1


async def test_kubectl_scales_a_pool_within_its_bounds_and_shows_it(
    place: Place, pool: PoolPlace, workforce: Workforce, process: Start, redis_url: str, kubectl: Kubectl
) -> None:
    await pool.create(min=1, max=2, **QUICK)
    inside = ["-n", place.namespace]
    async with process(OPERATOR_REDIS_URL=redis_url).at_work():
        await pool.wait_for(ready=1)
        kubectl(*inside, "scale", "wpool", "texts", "--replicas=5")
        await pool.wait_for(ready=2, desired=2)
        header, row = (line.split() for line in kubectl(*inside, "get", "wpool").splitlines())
        assert header == ["NAME", "READY", "BUSY", "IDLE", "QUEUED", "MIN", "MAX", "AGE"]
        assert row[:7] == ["texts", "2", "0", "2", "0", "1", "2"]
        scale = json.loads(kubectl(*inside, "get", "--raw", f"{place.path('workerpools', 'texts')}/scale"))
        assert scale["spec"]["replicas"] == 5
        assert scale["status"] == {"replicas": 2, "selector": "tasks.zzdsj.io/pool=texts"}
        pods = kubectl(*inside, "get", "pods", "-l", scale["status"]["selector"], "-o", "name").split()
        assert len(pods) == 2
