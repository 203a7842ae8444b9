"""How many knowledge bases each store takes: time and memory as they grow, what ends it, and how that ends a task.

On servers of its own, which are gone afterwards: an index and a collection with three rows for each knowledge base, to 1,500
(``python -m tests.bench store_limits --most 300``: fewer), for 25 minutes at most, both stores side by side.
"""

import asyncio
import contextlib
import os
import shutil
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import psutil

from devstack.cache import state_dir
from devstack.process import find
from devstack.progress import DevstackError
from devstack.stores import common, elasticsearch, milvus
from job_runner.elasticsearch import ElasticsearchIndex, make_client
from job_runner.index import Generation, Row
from job_runner.milvus import MilvusIndex
from task_contract.errors import StoreCapacity, TaskError
from tests.bench.measurement import Measurement

MOST: Final = 1_500
MINUTES: Final = 25.0
MARKS: Final = (100, 250, 500, 1_000, 1_500)
"""Numbers of knowledge bases at which is looked."""
WORKERS: Final = 2
"""Knowledge bases that are made at once."""
TRIES: Final = 3
"""How often one is tried before its store counts as full; a task is tried as often by default (spec.retry.limit)."""
_LAST: Final = 50
"""Creations of which the median is given."""
_ASKED: Final = 10
"""Knowledge bases, spread evenly, that are opened and asked at a mark."""
_REST: Final = 5.0  # seconds in which a server that is asked nothing is watched
_DIMENSION: Final = 512
_ROWS: Final = 3
_PORTS: Final = {"DEVSTACK_MILVUS_PORT": "22200", "DEVSTACK_ELASTICSEARCH_PORT": "22300"}
_MILVUS_LIMIT: Final = "QUOTAANDLIMITS_LIMITS_MAXCOLLECTIONNUM"
"""Milvus takes each of its settings from the environment too, in capitals and with underscores."""


def run(only: Sequence[str] = (), *, most: int = MOST, minutes: float = MINUTES) -> list[Measurement]:
    """Fill both stores, or one, until they have MOST knowledge bases, say no, or the time is over. Raises DevstackError."""
    if unknown := [name for name in only if name not in {store.NAME for store in (milvus, elasticsearch)}]:
        raise DevstackError(f"no part {', '.join(unknown)}: the parts are {milvus.NAME}, {elasticsearch.NAME}")
    measured = []
    if milvus.NAME in (only or [milvus.NAME]):
        with _servers(most=2) as urls:
            measured.append(asyncio.run(_refusal(urls)))
    with _servers() as urls:
        sides = [side for side in _sides(urls) if side.process in (only or [side.process])]
        return measured + asyncio.run(_fill_all(sides, most=most, until=time.monotonic() + 60 * minutes))


# ----------------------------------------------------------------------------------------------------------- the servers


@contextlib.contextmanager
def _servers(*, most: int | None = None) -> Iterator[dict[str, str]]:
    """Have servers of our own, with a folder and ports of their own; what a run that was killed left is removed first.

    Milvus takes MOST collections; without it, as many as by its default.
    """
    given = {**_PORTS, "DEVSTACK_STATE": str(state_dir().with_name("processing-tasks-bench-stores"))}
    if most is not None:
        given[_MILVUS_LIMIT] = str(most)
    before = dict(os.environ)
    os.environ.update(given)
    stores = (milvus, elasticsearch) if most is None else (milvus,)
    try:
        _remove()
        common.make_bridge()
        for store in stores:
            store.up()
        yield {key: value for one in stores for key, value in one.environment(f"{common.HOST}:{one.port()}").items()}
    finally:
        _remove()
        os.environ.clear()
        os.environ.update(before)


def _remove() -> None:
    for store in (milvus, elasticsearch):
        store.down(kill=True)
    shutil.rmtree(state_dir(), ignore_errors=True)


# -------------------------------------------------------------------------------------------------------------- a store


@dataclass
class Side:
    """One store, and what was seen of it."""

    name: str
    process: str
    """Of its server, as the devstack calls it."""
    open: Callable[[Generation], Any]
    write: Callable[[Any], Awaitable[None]]
    search: Callable[[Any], Awaitable[Any]]
    raise_limit: Callable[[], Awaitable[str]] | None = None
    """Raises the setting that limits it, once; returns what was done."""
    created: list[float] = field(default_factory=list)
    """Seconds for each knowledge base that was made."""
    told: list[str] = field(default_factory=list)
    """What it said when it took no more, and what was done about it."""

    def generation(self, number: int) -> Generation:
        return Generation("bench", f"kb-{number}", 1)

    @property
    def memory(self) -> float:
        """Resident MB (10^6 bytes) of the server."""
        process = find(self.process)
        if process is None:
            raise DevstackError(f"cannot measure {self.name}: its server has ended; {self.told}")
        return float(psutil.Process(process.pid).memory_info().rss) / 1e6

    async def at_rest(self) -> float:
        """Return the share of a CPU that the server takes while it is asked nothing."""
        process = find(self.process)
        if process is None:
            return 0.0
        server = psutil.Process(process.pid)
        began, before = time.monotonic(), sum(server.cpu_times()[:2])
        await asyncio.sleep(_REST)
        return float((sum(server.cpu_times()[:2]) - before) / (time.monotonic() - began))


def _sides(urls: dict[str, str]) -> list[Side]:
    rows = [_row(number) for number in range(_ROWS)]
    drawn = np.random.default_rng(1).normal(size=(_ROWS, _DIMENSION)).astype(np.float32)
    vectors = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    def collection(generation: Generation) -> MilvusIndex:
        url, token = urls["TASKS_MILVUS_URL"], urls["TASKS_MILVUS_TOKEN"]
        return MilvusIndex(generation, url=url, token=token, dimension=_DIMENSION)

    def index(generation: Generation) -> ElasticsearchIndex:
        return ElasticsearchIndex(generation, url=urls["TASKS_ELASTICSEARCH_URL"], api_key=None)

    async def raise_limit() -> str:
        client = make_client(urls["TASKS_ELASTICSEARCH_URL"], None)
        try:
            await client.cluster.put_settings(persistent={"cluster.max_shards_per_node": 10_000})
        finally:
            await client.close()
        return "cluster.max_shards_per_node was raised to 10,000"

    return [
        Side(
            "Milvus",
            milvus.NAME,
            collection,
            lambda one: one.write(rows, vectors),
            lambda one: one.search(vectors[0], limit=3),
        ),
        Side(
            "Elasticsearch",
            elasticsearch.NAME,
            index,
            lambda one: one.write(rows),
            lambda one: one.search("chunk", limit=3),
            raise_limit,
        ),
    ]


def _row(number: int) -> Row:
    columns = {name: "0" if one.type is str else 0 for name, one in Row.__dataclass_fields__.items()}
    return Row(**{**columns, "id": f"{number:032x}", "document_id": "a", "text": f"chunk {number}", "metadata": {}})  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- filling


async def _fill_all(sides: Sequence[Side], *, most: int, until: float) -> list[Measurement]:
    found = await asyncio.gather(*(_fill(side, most=most, until=until) for side in sides))
    return [one for measured in found for one in measured]


async def _fill(side: Side, *, most: int, until: float) -> list[Measurement]:
    """Make knowledge bases up to MOST, and look at the store at each mark and at the end."""
    measured = await _look(side)
    for mark in sorted({*(mark for mark in MARKS if mark < most), most}):
        whole = await _grow(side, mark, until=until)
        measured += await _look(side)
        if not whole:
            break
    else:
        side.told.append(f"it has all {most} that were asked for")
    end = Measurement(
        metric=f"{side.name}: knowledge bases at the end", value=len(side.created), unit="", how="; ".join(side.told)
    )
    print(f"      {side.name}: {len(side.created)} at the end: {end.how}", flush=True)
    return [*measured, end]


async def _grow(side: Side, mark: int, *, until: float) -> bool:
    """Make knowledge bases up to MARK; tell whether all of them could be made."""
    waiting = list(range(mark - 1, len(side.created) - 1, -1))
    failed = 0

    async def work() -> None:
        nonlocal failed
        while waiting and failed < TRIES:
            if time.monotonic() > until:
                failed = TRIES  # for the other worker too
                side.told.append("the time was over")
                return
            number = waiting.pop()
            try:
                seconds = await _make(side, number)
            except TaskError as error:
                waiting.append(number)
                side.told.append(f"{error.reason} at {len(side.created)}: {error.message[:300]}")
                raise_limit, side.raise_limit = side.raise_limit, None
                if isinstance(error, StoreCapacity) and raise_limit is not None:
                    side.told.append(await raise_limit())
                else:
                    side.raise_limit = raise_limit
                    failed += 1
            else:
                failed = 0
                side.created.append(seconds)

    await asyncio.gather(*(work() for _ in range(WORKERS)))
    return not waiting


async def _make(side: Side, number: int) -> float:
    """Make a knowledge base with its rows; return the seconds until it was there, without them."""
    store = side.open(side.generation(number))
    try:
        began = time.monotonic()
        await store.ensure()
        seconds = time.monotonic() - began
        await side.write(store)
    finally:
        await store.aclose()
    return seconds


async def _look(side: Side) -> list[Measurement]:
    """Measure the store as it is now."""
    count = len(side.created)
    how = f"load of the machine {os.getloadavg()[0]:.1f}"
    measured = [
        Measurement(
            metric=f"{side.name}, {count}: memory", value=side.memory, unit="MB", how=f"resident set of the server; {how}"
        ),
        Measurement(
            metric=f"{side.name}, {count}: at rest",
            value=await side.at_rest(),
            unit="CPUs",
            how=f"over {_REST:g} s in which this bench asks it nothing; {how}",
        ),
    ]
    if count:
        spent: dict[str, list[float]] = {"open": [], "read": [], "search": []}
        for number in range(0, count, max(1, count // _ASKED)):
            await _ask(side, number, spent)
        spent["create"] = side.created[-_LAST:]
        what = {
            "create": f"with its index and alias, and loaded; the last {_LAST}",
            "open": "a new connection, by a task that finds it made",
            "read": "the ids of a version, with all writes visible",
            "search": "three rows, by the alias",
        }
        measured += [
            Measurement(
                metric=f"{side.name}, {count}: {name}",
                value=statistics.median(spent[name]),
                unit="s",
                how=f"median, {what[name]}; the longest {max(spent[name]):.2f} s; {how}",
            )
            for name in what
        ]
    shown = ", ".join(f"{one.metric.partition(': ')[2]} {one.value:.2f} {one.unit}" for one in measured)
    print(f"      {side.name}, {count}: {shown}", flush=True)
    return measured


async def _ask(side: Side, number: int, spent: dict[str, list[float]]) -> None:
    store = side.open(side.generation(number))
    try:
        for name, call in (
            ("open", store.ensure),
            ("read", lambda: store.stored("a", 0)),
            ("search", lambda: side.search(store)),
        ):
            began = time.monotonic()
            await call()
            spent[name].append(time.monotonic() - began)
    finally:
        await store.aclose()


async def _refusal(urls: dict[str, str]) -> Measurement:
    """Have a Milvus that takes two collections refuse the third."""
    token = urls["TASKS_MILVUS_TOKEN"]
    told = "it refused none"
    made = 0
    for number in range(3):
        store = MilvusIndex(Generation("bench", f"kb-{number}", 1), url=urls["TASKS_MILVUS_URL"], token=token, dimension=8)
        try:
            await store.ensure()
            made += 1
        except TaskError as error:
            told = f"{error.reason}: {error.message}"
        finally:
            await store.aclose()
    print(f"      Milvus with a limit of two: {told}", flush=True)
    how = f"the limit of a server (quotaAndLimits.limits.maxCollectionNum) set to 2, three asked for: {told}"
    return Measurement(metric="Milvus: collections within a limit of 2", value=made, unit="", target=2, how=how)
