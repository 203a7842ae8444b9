"""Who may, and how often: reviews that are believed for a while, tickets, namespaces, and the bucket of each caller."""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from task_gateway.callers import ALL, ANYBODY, Caller, Callers
from task_gateway.limits import RateLimit
from task_gateway.problems import Problem
from task_platform.kubernetes import Unavailable


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Cluster:
    """Answers reviews from tables, and counts them."""

    def __init__(self, *, users: dict[str, dict[str, Any]], rights: set[tuple[str, str, str, str]]) -> None:
        self.users, self.rights = users, rights
        self.tokens: list[str] = []
        self.accesses: list[dict[str, Any]] = []
        self.down = False

    async def review_token(self, token: str, *, audiences: Sequence[str]) -> dict[str, Any]:
        self.tokens.append(token)
        await asyncio.sleep(0)
        if self.down:
            raise Unavailable("cannot ask")
        user = self.users.get(token)
        return {"authenticated": False} if user is None else {"authenticated": True, "audiences": ["api"], **user}

    async def review_access(self, spec: dict[str, Any]) -> bool:
        self.accesses.append(spec)
        asked = spec["resourceAttributes"]
        what = "/".join(part for part in (asked["resource"], asked.get("subresource")) if part)
        return (spec["user"], asked["verb"], what, asked.get("namespace", "")) in self.rights


class Shelf:
    """Tickets in memory."""

    def __init__(self) -> None:
        self.tickets: dict[bytes, str] = {}

    async def put_ticket(self, digest: bytes, caller: str, *, expires_at: datetime) -> None:
        self.tickets[digest] = caller

    async def take_ticket(self, digest: bytes) -> str | None:
        return self.tickets.pop(digest, None)


ADA = {"user": {"username": "ada", "uid": "7", "groups": ["staff"], "extra": {"scopes": ["a", "b"]}}}


def make(**given: Any) -> tuple[Callers, Cluster, Clock]:
    rights = {("ada", "get", "processingtasks", "a"), ("ada", "list", "processingtasks", "a")}
    cluster, clock = Cluster(users={"good": ADA}, rights=given.pop("rights", rights)), Clock()
    options: dict[str, Any] = {"namespaces": ("a", "b"), "default_namespace": "a", "trusting": False} | given
    return Callers(reviews=cluster, tickets=Shelf(), clock=clock, **options), cluster, clock


async def test_a_token_is_asked_about_once_in_ten_seconds() -> None:
    callers, cluster, clock = make()
    found = await asyncio.gather(*(callers.of_token("good") for _ in range(5)))
    assert {caller.name for caller in found} == {"ada"}
    clock.now += 9.9
    await callers.of_token("good")
    assert cluster.tokens == ["good"]
    clock.now += 0.2
    del cluster.users["good"]
    with pytest.raises(Problem, match="it has expired"):
        await callers.of_token("good")


@pytest.mark.parametrize("token", [None, "", "bad", "x" * 20_000, "a b", "\x00", "é"])
async def test_who_has_no_valid_token_is_told_so(token: str | None) -> None:
    callers, cluster, _ = make()
    for _ in range(2):
        with pytest.raises(Problem) as refusal:
            await callers.of_token(token)
        assert (refusal.value.status, refusal.value.kind) == (401, "not-authenticated")
        assert "Bearer" in refusal.value.headers["WWW-Authenticate"]
    assert cluster.tokens in ([], ["bad"]), "a token that cannot be one is sent nowhere, and none is asked about twice"


async def test_a_token_for_others_is_none() -> None:
    callers, *_ = make(audiences=("gateway",))
    with pytest.raises(Problem, match="none of this cluster"):
        await callers.of_token("good")


async def test_an_outage_is_no_refusal_and_is_not_believed() -> None:
    callers, cluster, _ = make()
    cluster.down = True
    with pytest.raises(Problem) as refusal:
        await callers.of_token("good")
    assert refusal.value.status == 503
    cluster.down = False
    assert (await callers.of_token("good")).name == "ada"


async def test_a_right_is_asked_about_with_all_that_the_cluster_said_of_the_caller() -> None:
    callers, cluster, clock = make()
    ada = await callers.of_token("good")
    for _ in range(3):
        await callers.check(ada, "get", "a")
    assert cluster.accesses == [
        {
            "user": "ada",
            "uid": "7",
            "groups": ["staff"],
            "extra": {"scopes": ["a", "b"]},
            "resourceAttributes": {
                "verb": "get",
                "namespace": "a",
                "group": "tasks.zzdsj.io",
                "resource": "processingtasks",
            },
        }
    ]
    for verb, namespace in (("delete", "a"), ("get", "b")):
        with pytest.raises(Problem, match="ada lacks the right") as refusal:
            await callers.check(ada, verb, namespace)
        assert refusal.value.kind == "not-allowed"
    cluster.rights.clear()
    await callers.check(ada, "get", "a")
    clock.now += 10.1
    with pytest.raises(Problem):
        await callers.check(ada, "get", "a")


async def test_a_caller_sees_the_namespaces_that_he_may_list() -> None:
    callers, *_ = make()
    ada = await callers.of_token("good")
    assert await callers.scope(ada, "a") == ("a",)
    assert await callers.scope(ada, ALL) == ("a",)
    with pytest.raises(Problem, match="lacks the right"):
        await callers.scope(ada, "b")
    assert await callers.scope(Caller(name="bob"), ALL) == ()


async def test_of_a_gateway_for_all_namespaces_all_may_be_seen_by_who_may_list_all() -> None:
    callers, *_ = make(namespaces=(), rights={("ada", "list", "processingtasks", "")})
    ada = await callers.of_token("good")
    assert await callers.scope(ada, ALL) is None
    with pytest.raises(Problem, match="in all namespaces"):
        await callers.scope(Caller(name="bob"), ALL)


async def test_the_namespace_is_the_first_that_is_named() -> None:
    callers, *_ = make()
    assert callers.namespace(None, "", None) == "a"
    assert callers.namespace(None, "b", "a") == "b"
    assert callers.namespace(ALL) == ALL
    for name, kind in (("c", "namespace-not-served"), ("../b", "invalid-parameter"), ("\udcff", "invalid-parameter")):
        with pytest.raises(Problem) as refusal:
            callers.namespace(name)
        assert refusal.value.kind == kind
    with pytest.raises(Problem, match="only lists"):
        await callers.check(ANYBODY, "create", ALL)


async def test_a_ticket_stands_for_its_caller_once() -> None:
    callers, *_ = make()
    ada = await callers.of_token("good")
    ticket, _ = await callers.issue_ticket(ada)
    assert await callers.of_ticket(ticket) == ada
    for used in (ticket, "never", ""):
        with pytest.raises(Problem) as refusal:
            await callers.of_ticket(used)
        assert refusal.value.status == 401


async def test_where_the_network_is_trusted_nobody_is_asked() -> None:
    callers, cluster, _ = make(trusting=True)
    caller = await callers.of_token(None)
    await callers.check(caller, "delete", "b")
    assert await callers.scope(caller, ALL) == ("a", "b")
    assert (caller, cluster.tokens, cluster.accesses) == (ANYBODY, [], [])
    with pytest.raises(Problem):
        callers.namespace("c")


# ---------------------------------------------------------------------------------------------------------------- limits


def test_a_bucket_lets_in_a_burst_and_then_its_rate() -> None:
    clock = Clock()
    limit = RateLimit(rate=2, burst=3, clock=clock)
    assert [limit.take("a") for _ in range(3)] == [0, 0, 0]
    wait = limit.take("a")
    assert wait == pytest.approx(0, abs=1e-6)
    assert wait > 0
    assert limit.take("b") == 0, "buckets are each caller's own"
    clock.now += 0.5
    assert limit.take("a") == 0
    assert limit.take("a") > 0


def test_a_batch_is_let_in_and_paid_for_after_it() -> None:
    clock = Clock()
    limit = RateLimit(rate=10, burst=5, clock=clock)
    assert limit.take("a") == 0
    limit.charge("a", 99)
    assert limit.wait("a") == pytest.approx(9.5)
    clock.now += 9.6
    assert limit.take("a") == 0


def test_buckets_are_bounded_in_number() -> None:
    limit = RateLimit(rate=1, burst=1, most=2, clock=Clock())
    for key in ("a", "b", "c"):
        limit.take(key)
    assert limit.take("c") > 0
    assert limit.take("a") == 0, "the one that was used longest ago has gone"


@given(st.lists(st.floats(min_value=0, max_value=5), min_size=1, max_size=200))
def test_in_no_time_more_is_let_in_than_burst_and_rate_allow(pauses: list[float]) -> None:
    clock = Clock()
    limit = RateLimit(rate=3, burst=4, clock=clock)
    let_in = 0
    for pause in pauses:
        clock.now += pause
        let_in += limit.take("a") == 0
    assert let_in <= 4 + 3 * sum(pauses) + 1
