"""From a life without faults to all lives with one: which points there are, which are tried, and what came of it."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.crash.faults import Kind
from tests.crash.life import Life, Scenario, Track
from tests.crash.oracle import End, differences, look

TRACKS = 4
"""Lives that are led side by side: each waits for the Job controller for half of its time."""
PATIENCE = 30.0
"""Seconds after the end of a task within which everything must have come to rest."""
TRIES = 3
UNSTEADY = ("operator SQL COMMIT tasks", "operator API POST events")
"""Calls of which there are more or fewer from life to life: rows of the projection are written together if they come fast,
with events and attempts as there are any, and Events are written beside the work."""


@dataclass(frozen=True)
class Outcome:
    """How the life with a kill at some points ended."""

    scenario: str
    points: tuple[str, ...]
    reached: bool
    differences: tuple[str, ...]
    attempts: int
    seconds: float

    @property
    def good(self) -> bool:
        unsteady = any(point.startswith(UNSTEADY) for point in self.points)
        return not self.differences and (self.reached or unsteady)

    def as_line(self) -> str:
        told = "; ".join(self.differences) or ("as without faults" if self.reached else "never reached")
        where = " and ".join(self.points)
        return f"{self.scenario:<16} {where:<64} {self.seconds:5.1f} s  {self.attempts} attempts  {told}"

    def as_json(self) -> dict[str, Any]:
        return {
            "scenario": self.scenario,
            "points": list(self.points),
            "reached": self.reached,
            "differences": list(self.differences),
            "attempts": self.attempts,
            "seconds": round(self.seconds, 1),
        }


async def settle(life: Life) -> End:
    """Wait until a life without faults has come to rest; return what it left."""
    deadline = time.monotonic() + PATIENCE
    while not (end := await look(life)).settled:
        assert time.monotonic() < deadline, f"nothing comes to rest: {end}"
        await asyncio.sleep(0.2)
    return end


async def lead(track: Track, scenario: Scenario, kills: frozenset[str], undisturbed: End) -> Outcome:
    """Lead a life with kills, and compare its end; a point that was not reached is tried again."""
    for left in reversed(range(TRIES)):
        life = Life(scenario, track, kills)
        try:
            await track.live(life)
            found = await _compare(undisturbed, life) if life.reached or not left else []
            await track.forget(life)
        except Exception as error:  # noqa: BLE001 - the life has no end: that is what came of it, and the others go on
            found = [f"{type(error).__name__}: {error}"]
            break
        if life.reached:
            break
    return Outcome(
        scenario=scenario.name,
        points=tuple(sorted(kills)),
        reached=life.reached,
        differences=tuple(found),
        attempts=len(life.pods),
        seconds=life.seconds,
    )


async def _compare(undisturbed: End, life: Life) -> list[str]:
    """Return how a life's end differs once everything has come to rest."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = differences(undisturbed, await look(life), life)
        if not found or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.2)


@dataclass(frozen=True)
class Undisturbed:
    """What a life without faults leaves, and at which points it can be killed."""

    end: End
    points: tuple[str, ...]
    """In the order in which each role reached them."""
    writes: Mapping[str, int]
    """What the life costs the API server: write of the operator → how often."""


async def without_faults(tracks: Sequence[Track], scenario: Scenario, writes: Mapping[str, int]) -> Undisturbed:
    """Lead two lives without faults, at the cost of WRITES to the API server each.

    On a slow machine a pod may start so late that the operator says why the task waits, a write more: then two others.
    """
    tries = 0
    while True:
        tries += 1
        try:
            undisturbed = await _two_lives(tracks, scenario)
            assert undisturbed.writes == writes
            return undisturbed
        except AssertionError:
            if tries == TRIES:
                raise


async def _two_lives(tracks: Sequence[Track], scenario: Scenario) -> Undisturbed:
    """Lead two lives. They must agree, or nothing could be said of one with a fault."""

    async def one(track: Track) -> tuple[Life, End]:
        life = Life(scenario, track)
        try:
            await track.live(life)
            return life, await settle(life)
        finally:
            await track.forget(life)

    ended = await asyncio.gather(*(one(track) for track in tracks[:2]), return_exceptions=True)
    for error in ended:
        if isinstance(error, BaseException):
            raise error
    (first, end), (second, other) = (life for life in ended if not isinstance(life, BaseException))
    _check_right(end, scenario)
    assert not (found := differences(end, other, second)), f"two lives without faults differ: {found}"
    points: list[str] = []
    for role in scenario.roles:
        here, there = (set(life.record(role).points) for life in (first, second))
        odd = {point for point in here ^ there if not f"{role} {point}".startswith(UNSTEADY)}
        assert not odd, f"two lives without faults differ in what they call: {sorted(odd)}"
        points += [f"{role} {point}" for point in first.record(role).points if point in here & there]
    calls = [
        point.split(" #")[0] for point in points if point.startswith(f"operator {Kind.API}") and point.endswith("before")
    ]
    writes = Counter(call.removeprefix("operator API ") for call in calls if not call.startswith(UNSTEADY))
    # The scenario's own kill is at these. A kill before the same call would take its place: another scenario has that one.
    done = {f"runner {point.rpartition(' ')[0]} {side}" for point in scenario.runner for side in ("before", "after")}
    return Undisturbed(end=end, points=tuple(point for point in points if point not in done), writes=writes)


def _check_right(end: End, scenario: Scenario) -> None:
    """Check by hand what every other end is compared with: how the task ended, and what readers may see of the document."""
    assert end.state["status"]["phase"] == scenario.phase, end.state["status"]
    [document] = end.state["documents"]
    assert document["published_version"] == scenario.published, document
    for store in ("Milvus", "Elasticsearch"):
        rows = [key for key in end.state[store] if key.startswith(f"{scenario.published}/")]
        assert len(rows) == document["chunk_count"], f"{store} has {len(rows)} rows of {document}"
        if scenario.phase == "Completed":
            assert len(end.state[store]) == len(rows), f"{store} has rows of other versions: {sorted(end.state[store])}"
    assert not end.state["earlier successes"]
    assert end.state["other objects"] == ["configmaps kube-root-ca.crt"]


def chosen(points: Sequence[str], count: int) -> list[str]:
    """Return COUNT points, evenly over the life, among them one of each kind of call. Always the same ones.

    >>> chosen(["a API x #1 before", "a API x #1 after", "a SQL y #1 before", "a SQL y #1 after"], 2)
    ['a API x #1 before', 'a SQL y #1 before']
    """
    if count >= len(points):
        return list(points)
    kept = {points[number * len(points) // count] for number in range(count)}
    for kind in Kind:
        of_kind = [point for point in points if point.split()[1] == kind]
        if of_kind and not kept & set(of_kind):
            kept.add(of_kind[len(of_kind) // 2])
    return [point for point in points if point in kept]


def evenly(points: Sequence[str], count: int) -> list[str]:
    """Return COUNT points, or all if there are fewer, each from the middle of its share.

    >>> evenly(["a", "b", "c", "d"], 2)
    ['b', 'd']
    """
    count = min(count, len(points))
    return [points[(2 * number + 1) * len(points) // (2 * count)] for number in range(count)]


def kinds(points: Sequence[str]) -> Counter[str]:
    """Return how many points there are of each kind."""
    return Counter(" ".join(point.split()[:2]) for point in points)


async def try_all(
    tracks: Sequence[Track], scenario: Scenario, kills: Sequence[frozenset[str]], undisturbed: End
) -> list[Outcome]:
    """Lead a life for each set of kills, side by side on the tracks."""
    waiting = asyncio.Queue[frozenset[str]]()
    for one in kills:
        waiting.put_nowait(one)
    ended: list[Outcome] = []

    async def work(track: Track) -> None:
        while not waiting.empty():
            ended.append(await lead(track, scenario, waiting.get_nowait(), undisturbed))

    async with asyncio.TaskGroup() as group:
        for track in tracks:
            group.create_task(work(track))
    order = {one: number for number, one in enumerate(kills)}
    return sorted(ended, key=lambda outcome: order[frozenset(outcome.points)])
