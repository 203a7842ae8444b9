"""What a store answers when it does not do as asked, and what becomes of it: wait, give back, or end the task."""

import grpc  # type: ignore[import-untyped]  # pymilvus depends on it
import pytest
from pymilvus import MilvusException
from pymilvus.exceptions import DataNotMatchException

from job_runner import elasticsearch, milvus
from job_runner.backoff import Busy, patiently
from task_contract.errors import RetryableError, StoreCapacity, StoreRefused, StoreUnavailable, TaskError


class Clock:
    """Time that passes while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


class Store:
    """Answers after so many refusals."""

    def __init__(self, refusals: int, *, after: float = 0) -> None:
        self.left = refusals
        self.after = after

    async def __call__(self) -> str:
        if self.left:
            self.left -= 1
            raise Busy("cannot write: too much to do", after=self.after)
        return "written"


async def asked(store: Store, clock: Clock) -> str:
    return await patiently(store, seconds=30, clock=clock, sleep=clock.sleep)


async def test_a_busy_store_is_asked_again_after_growing_pauses() -> None:
    clock = Clock()
    assert await asked(Store(7), clock) == "written"
    for pause, longest in zip(clock.pauses, (0.2, 0.4, 0.8, 1.6, 3.2, 5, 5), strict=True):
        assert longest / 2 <= pause <= longest


async def test_a_store_is_left_alone_for_as_long_as_it_asks() -> None:
    clock = Clock()
    assert await asked(Store(2, after=7), clock) == "written"
    assert clock.pauses == [7, 7]


@pytest.mark.parametrize(("after", "pauses"), [(0, range(8, 16)), (31, range(1)), (20, range(1, 2))])
async def test_patience_ends_and_the_attempt_is_given_back(after: float, pauses: range) -> None:
    clock = Clock()
    with pytest.raises(StoreUnavailable, match="too much to do"):
        await asked(Store(1000, after=after), clock)
    assert len(clock.pauses) in pauses
    assert clock.now <= 30


async def test_other_refusals_are_not_waited_for() -> None:
    async def refused() -> str:
        raise StoreRefused("cannot write: too long")

    clock = Clock()
    with pytest.raises(StoreRefused):
        await patiently(refused, clock=clock, sleep=clock.sleep)
    assert clock.pauses == []


def cause(kind: str, reason: str = "because") -> dict[str, object]:
    return {"error": {"type": kind, "reason": reason}}


@pytest.mark.parametrize(
    ("status", "detail", "kind"),
    [
        (429, cause("es_rejected_execution_exception"), Busy),
        (429, cause("circuit_breaking_exception"), Busy),
        (503, "upstream connect error", Busy),
        (429, cause("cluster_block_exception", "disk usage exceeded flood-stage watermark"), Busy),
        (403, cause("cluster_block_exception", "index [kb] blocked by: [FORBIDDEN/8/index write (api)]"), StoreUnavailable),
        (403, cause("security_exception"), StoreUnavailable),
        (401, "Unauthorized", StoreUnavailable),
        (400, cause("document_parsing_exception"), StoreRefused),
        (400, cause("mapper_parsing_exception"), StoreRefused),
        (400, cause("strict_dynamic_mapping_exception"), StoreRefused),
        (400, cause("illegal_argument_exception", 'Document contains at least one immense term in field="x"'), StoreRefused),
        (413, "Request Entity Too Large", StoreRefused),
        (400, cause("illegal_argument_exception", "Limit of total fields [1000] has been exceeded"), StoreCapacity),
        (
            400,
            cause("illegal_argument_exception", "number of documents in the index cannot exceed [2147483519]"),
            StoreCapacity,
        ),
        (
            400,
            cause("validation_exception", "this cluster currently has [1000]/[1000] maximum normal shards open"),
            StoreCapacity,
        ),
        (400, cause("index_closed_exception"), RetryableError),
        (404, cause("index_not_found_exception"), RetryableError),
        (500, "Internal Server Error", RetryableError),
    ],
)
def test_refusals_of_elasticsearch(status: int, detail: object, kind: type[TaskError]) -> None:
    found = elasticsearch._refused("write in kb", status, detail)
    assert type(found) is kind, found
    assert found.message.startswith(f"cannot write in kb: Elasticsearch: {status} ")


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ({}, 0),
        ({"retry-after": "12"}, 12),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "soon"}, 0),
    ],
)
def test_how_long_a_server_asks_to_be_left_alone(header: dict[str, str], seconds: float) -> None:
    assert elasticsearch._retry_after(header) == seconds


class TooLarge(grpc.RpcError):  # type: ignore[misc]  # grpc has no types
    def code(self) -> object:
        return grpc.StatusCode.RESOURCE_EXHAUSTED

    def __str__(self) -> str:
        return "Received message larger than max (70000000 vs. 67108864)"


class Down(grpc.RpcError):  # type: ignore[misc]  # grpc has no types
    def code(self) -> object:
        return grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (
            MilvusException(1100, "the length (3000) of 0th string exceeds max length (2048): invalid parameter"),
            StoreRefused,
        ),
        (MilvusException(65535, "the length(4) of float data should divide the dim(8)"), StoreRefused),
        (MilvusException(65535, "value 'NaN' is not a number or infinity"), StoreRefused),
        (MilvusException(6, "VARCHAR field 'id' value length 100 exceeds max_length=64"), StoreRefused),
        (DataNotMatchException(1, "Attempt to insert an unexpected field `x` to collection"), StoreRefused),
        (TooLarge(), StoreRefused),
        (MilvusException(8, "rate limit exceeded"), Busy),
        (MilvusException(9, "deny to write: memory quota exhausted"), Busy),
        (MilvusException(3, "memory limit exceeded"), Busy),
        (MilvusException(102, "limit reached"), StoreCapacity),
        (MilvusException(1, "exceed the limit number of collections"), StoreCapacity),
        (MilvusException(2, "Fail connecting to server"), StoreUnavailable),
        (MilvusException(101, "collection not loaded"), StoreUnavailable),
        (MilvusException(1, "service not ready[standalone=1]: Abnormal"), StoreUnavailable),
        (Down(), StoreUnavailable),
        (MilvusException(65535, "something unexpected"), RetryableError),
    ],
)
def test_refusals_of_milvus(error: Exception, kind: type[TaskError]) -> None:
    found = milvus._converted("write in kb", error)
    assert type(found) is kind, found
    assert found.message.startswith("cannot write in kb: Milvus: ")
