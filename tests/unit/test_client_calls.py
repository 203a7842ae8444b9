"""Calls of other services: where they go, what is tried again, and what the caller is told."""

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from service_client import (
    CallConfig,
    CallMethod,
    CircuitOpen,
    DiscoveryError,
    FieldError,
    Problem,
    ServiceError,
    ServiceRefused,
    ServiceTimeout,
    ServiceUnavailable,
    TooManyRequests,
    service_url,
)
from service_client.breaker import FAILURES, OPEN_SECONDS, Breaker, Breakers
from service_client.calls import LONGEST_PAUSE, decoded, exchange, make_call, pause_before, retry_after
from service_client.programs import Answer, NoAnswer, NotSent, TooLate
from tests.support.programs import Script

OK = Answer(200, {"content-type": "application/json"}, b'{"id": "t"}')


def answer(status: int, body: Any = None, **headers: str) -> Answer:
    data = b"" if body is None else json.dumps(body).encode()
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return Answer(status, {"content-type": "application/problem+json"} | named, data)


def call(method: str = "GET", *, key: str | None = None, **config: Any) -> Any:
    return make_call("s", method, "/p", config=CallConfig(**config), idempotency_key=key, url="http://s")


def perform(script: Script, made: Any, breakers: Breakers | None = None) -> Any:
    own = breakers or Breakers(script.clock)
    return script.run(exchange(made, breakers=own, clock=script.clock, chance=lambda: 1.0))


# ----------------------------------------------------------------------------------------------------------- discovery


@pytest.mark.parametrize(
    ("name", "environment", "url"),
    [
        ("knowledge-service", {}, "http://knowledge-service"),
        ("knowledge-service", {"SERVICE_NAMESPACE": "rag"}, "http://knowledge-service.rag"),
        ("knowledge-service.other", {"SERVICE_NAMESPACE": "rag"}, "http://knowledge-service.other"),
        ("knowledge-service", {"KNOWLEDGE_SERVICE_PORT": "8082"}, "http://knowledge-service:8082"),
        ("knowledge-service", {"KNOWLEDGE_SERVICE_PORT": "tcp://10.0.0.7:8082"}, "http://knowledge-service:8082"),
        ("task-manager-service", {"SERVICE_NAMESPACE": "rag"}, "http://task-manager-service.rag:8084"),
        ("task-manager-service.rag", {}, "http://task-manager-service.rag:8084"),
        ("gateway-service", {}, "http://gateway-service:8080"),
        ("knowledge-service", {"KNOWLEDGE_SERVICE_URL": "https://k.example.com/api/"}, "https://k.example.com/api"),
        ("knowledge-service", {"SERVICE_URLS": "a=http://a, knowledge-service=http://k:1"}, "http://k:1"),
        (
            "knowledge-service",
            {"SERVICE_URLS": "knowledge-service=http://map", "KNOWLEDGE_SERVICE_URL": "http://own"},
            "http://own",
        ),
        ("b", {"SERVICE_URLS": "a=http://a,"}, "http://b"),
    ],
)
def test_a_service_is_found_by_the_environment_and_else_by_dns(name: str, environment: dict[str, str], url: str) -> None:
    assert service_url(name, environment=environment, namespace_file=Path("/absent")) == url


def test_in_a_pod_a_service_is_looked_for_in_its_own_namespace(tmp_path: Path) -> None:
    file = tmp_path / "namespace"
    file.write_text("rag\n")
    assert service_url("a", environment={}, namespace_file=file) == "http://a.rag"
    assert service_url("a", environment={"SERVICE_NAMESPACE": "b"}, namespace_file=file) == "http://a.b"


@pytest.mark.parametrize(
    ("name", "environment", "message"),
    [
        ("", {}, "the service ''"),
        ("a/b", {}, "the service 'a/b'"),
        ("a@evil.example.com", {}, "lower-case letters"),
        ("a", {"A_URL": "localhost:8082"}, "A_URL='localhost:8082'"),
        ("a", {"A_URL": "http://h?x=1"}, "without a query"),
        ("a", {"A_URL": "http://h:99999"}, "A_URL"),
        ("a", {"SERVICE_URLS": "a=ftp://h"}, "SERVICE_URLS"),
        ("a", {"A_PORT": "many"}, "A_PORT='many'"),
        ("a", {"A_PORT": "0"}, "from 1 to 65535"),
    ],
)
def test_what_is_no_service_or_no_url_is_refused_by_its_name(name: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(DiscoveryError, match="cannot") as caught:
        service_url(name, environment=environment, namespace_file=Path("/absent"))
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- retries

REFUSED, CUT, LATE = NotSent("refused"), NoAnswer("cut off"), TooLate("late")


@pytest.mark.parametrize("first", [REFUSED, CUT, LATE, answer(429), answer(502), answer(503), answer(504)], ids=str)
@pytest.mark.parametrize(("method", "key"), [("GET", None), ("PUT", None), ("DELETE", None), ("POST", "k"), ("PATCH", "k")])
def test_what_is_safe_to_repeat_is_repeated(method: str, key: str | None, first: Any) -> None:
    script = Script([first, OK])
    assert perform(script, call(method, key=key)) == OK
    assert len(script.requests) == 2


@pytest.mark.parametrize(
    ("first", "tries"),
    [
        (REFUSED, 2),
        (CUT, 1),
        (LATE, 1),
        (answer(429, retry_after="1"), 1),
        (answer(503, retry_after="1"), 1),
        (answer(500), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_without_a_key_a_post_is_repeated_only_when_nothing_was_sent(method: str, first: Any, tries: int) -> None:
    script = Script([first, OK])
    if tries == 2:
        assert perform(script, call(method)) == OK
    else:
        with pytest.raises(ServiceError):
            perform(script, call(method))
    assert len(script.requests) == tries


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 409, 422, 500, 501])
def test_an_answer_that_would_be_the_same_again_is_final(status: int) -> None:
    script = Script([answer(status), OK])
    with pytest.raises(ServiceError) as caught:
        perform(script, call("GET"))
    assert caught.value.status == status
    assert len(script.requests) == 1


def test_pauses_double_with_jitter_and_have_a_bound() -> None:
    script = Script([CUT, CUT, CUT, OK])
    perform(script, call("GET", retry_times=3))
    assert script.pauses == [pytest.approx(0.2), pytest.approx(0.4), pytest.approx(0.8)]
    assert pause_before(2, None, chance=lambda: 0.0) == pytest.approx(0.1)
    assert pause_before(50, None, chance=lambda: 1.0) == LONGEST_PAUSE


def test_what_the_service_asks_to_wait_is_waited() -> None:
    script = Script([answer(503, retry_after="3"), OK])
    perform(script, call("GET"))
    assert script.pauses == [pytest.approx(3.2)]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("Sat, 31 Jan 2026 09:30:10 GMT", 10.0),
        ("Sat, 31 Jan 2026 09:00:00 GMT", 0.0),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("٣", None),
        ("9" * 400, 999999999.0),
    ],
)
def test_retry_after_is_a_number_or_a_date(header: str, seconds: float | None) -> None:
    at = datetime(2026, 1, 31, 9, 30, tzinfo=UTC)
    assert retry_after(answer(503, retry_after=header), now=at) == seconds


def test_nothing_is_waited_for_that_would_end_too_late() -> None:
    script = Script([answer(503, {"detail": "full"}, retry_after="60"), OK])
    with pytest.raises(ServiceUnavailable, match="503 full") as caught:
        perform(script, call("GET", timeout=10))
    assert caught.value.retry_after == 60
    assert script.pauses == []


def test_the_time_is_that_of_the_whole_call() -> None:
    script = Script([CUT, CUT, CUT, CUT], seconds=4.0)
    with pytest.raises(ServiceUnavailable):
        perform(script, call("GET", timeout=10, retry_times=9))
    assert [round(request.seconds, 1) for request in script.requests] == [10.0, 5.8, 1.4]


@pytest.mark.parametrize(
    ("outcome", "kind", "says"),
    [
        (REFUSED, ServiceUnavailable, "nothing was sent. Is the service running?"),
        (CUT, ServiceUnavailable, "it may have been done"),
        (LATE, ServiceTimeout, "no answer in 30 s"),
        (answer(429, retry_after="2"), TooManyRequests, "429"),
        (answer(307, location="http://elsewhere"), ServiceRefused, "points to http://elsewhere, which is not followed"),
        (answer(422, {"detail": "chunk_size: too large"}), ServiceRefused, "422 chunk_size: too large"),
        (answer(500, {"title": "A fault"}), ServiceUnavailable, "500 A fault"),
    ],
    ids=str,
)
def test_an_error_names_the_call_and_what_to_do(outcome: Any, kind: type[ServiceError], says: str) -> None:
    script = Script([outcome])
    with pytest.raises(kind) as caught:
        perform(
            script, make_call("knowledge-service", CallMethod.POST, "/api", url="http://k", config=CallConfig(retry_times=0))
        )
    error = caught.value
    assert type(error) is kind
    assert str(error).startswith("cannot POST /api of knowledge-service: ")
    assert says in str(error)
    assert (error.service, error.method, error.path) == ("knowledge-service", "POST", "/api")


PROBLEM = {
    "type": "https://tasks.zzdsj.io/problems/invalid-task",
    "title": "The task is not valid",
    "detail": "cannot create the task",
    "request_id": "r1",
    "errors": [{"field": "payload.chunk_size", "message": "too large"}],
}


@pytest.mark.parametrize(
    ("content_type", "body", "problem"),
    [
        (
            "application/problem+json",
            json.dumps(PROBLEM),
            Problem(
                type=PROBLEM["type"],  # type: ignore[arg-type]  # a word
                title="The task is not valid",
                detail="cannot create the task",
                request_id="r1",
                errors=(FieldError("payload.chunk_size", "too large"),),
            ),
        ),
        ("application/json", '{"detail": [{"loc": ["a"]}]}', Problem(detail='[{"loc": ["a"]}]')),
        ("application/json", '{"error": "no"}', Problem(detail="no")),
        ("application/json", "[1]", Problem(detail="[1]")),
        ("application/json", "{", Problem(detail="{")),
        ("application/problem+json", '{"errors": "x", "title": 5}', Problem(title="5")),
        ("text/html", "<h1>Bad Gateway</h1>", Problem(detail="<h1>Bad Gateway</h1>")),
        ("", "", Problem()),
    ],
)
def test_a_refusal_is_read_whatever_it_is(content_type: str, body: str, problem: Problem) -> None:
    assert Problem.parse(content_type, body.encode()) == problem


def test_an_answer_that_is_no_json_is_an_error_and_an_empty_one_is_nothing() -> None:
    made = call()
    assert decoded(made, Answer(204, {}, b"")) is None
    assert decoded(made, OK) == {"id": "t"}
    with pytest.raises(ServiceUnavailable, match="no JSON but text/html"):
        decoded(made, Answer(200, {"content-type": "text/html"}, b"<p>"))


# ------------------------------------------------------------------------------------------------------------- breaker


def test_after_some_failures_in_a_row_calls_fail_at_once_and_then_one_is_tried() -> None:
    script = Script([NoAnswer("cut")] * FAILURES)
    breakers = Breakers(script.clock)
    for _ in range(FAILURES):
        with pytest.raises(ServiceUnavailable):
            perform(script, call("POST"), breakers)
    with pytest.raises(CircuitOpen, match="is the service running") as caught:
        perform(script, call("GET"), breakers)
    assert caught.value.retry_after == pytest.approx(OPEN_SECONDS)
    script.now += OPEN_SECONDS
    script.outcomes += [NoAnswer("cut")]
    with pytest.raises(ServiceUnavailable) as tried:
        perform(script, call("POST"), breakers)
    assert not isinstance(tried.value, CircuitOpen)
    with pytest.raises(CircuitOpen):
        perform(script, call("POST"), breakers)
    script.now += OPEN_SECONDS
    script.outcomes += [OK, OK]
    assert perform(script, call("POST"), breakers) == perform(script, call("POST"), breakers) == OK


@pytest.mark.parametrize("status", [200, 404, 429, 500])
def test_a_service_that_answers_is_not_cut_off(status: int) -> None:
    script = Script([answer(status)] * 10)
    breakers = Breakers(script.clock)
    for _ in range(10):
        try:
            perform(script, call("POST"), breakers)
        except ServiceError as error:
            assert error.status == status  # noqa: PT017  # the point is that it is no CircuitOpen


def test_services_are_cut_off_one_by_one() -> None:
    script = Script([NoAnswer("cut")] * FAILURES + [OK])
    breakers = Breakers(script.clock)
    for _ in range(FAILURES):
        with pytest.raises(ServiceUnavailable):
            perform(script, call("POST"), breakers)
    assert perform(script, make_call("other", "GET", "/", url="http://other"), breakers) == OK


def test_of_many_callers_one_tries() -> None:
    now = 0.0
    breaker = Breaker(lambda: now)
    for _ in range(FAILURES):
        assert breaker.enter() == 0
        breaker.failed()
    now = OPEN_SECONDS
    assert breaker.enter() == 0
    assert breaker.enter() > 0
    breaker.abandoned()
    assert breaker.enter() == 0, "whoever tried has gone without an answer"


def test_a_caller_that_goes_away_leaves_the_probe_to_the_next() -> None:
    script = Script([NoAnswer("cut")] * FAILURES)
    breakers = Breakers(script.clock)
    for _ in range(FAILURES):
        with pytest.raises(ServiceUnavailable):
            perform(script, call("POST"), breakers)
    script.now += OPEN_SECONDS
    program = exchange(call("GET"), breakers=breakers, clock=script.clock)
    program.send(None)
    with pytest.raises(asyncio.CancelledError):
        program.throw(asyncio.CancelledError())
    script.outcomes += [OK]
    assert perform(script, call("GET"), breakers) == OK


# ------------------------------------------------------------------------------------------------------------ requests


def test_a_call_is_made_as_it_is_described() -> None:
    made = make_call(
        "s",
        "post",
        "/a?x=1",
        json={"名": "é"},
        params={"b": "c d", "none": None, "many": [1, 2]},
        headers={"X-Team": "a"},
        idempotency_key="k1",
        url="http://h/base/",
    )
    assert (made.method, made.base, made.path) == ("POST", "http://h/base", "/a?x=1&b=c+d&many=1&many=2")
    assert made.body == '{"名":"é"}'.encode()
    assert {"Content-Type": "application/json", "Idempotency-Key": "k1", "X-Team": "a"}.items() <= made.headers.items()


@pytest.mark.parametrize("path", ["tasks", "", "http://elsewhere", "/a#b"])
def test_a_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="begins with a slash"):
        make_call("s", "GET", path, url="http://h")


@pytest.mark.parametrize("config", [{"timeout": 0}, {"retry_times": -1}, {"connect_timeout": 0}, {"timeout": float("nan")}])
def test_a_config_that_means_nothing_is_refused(config: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="timeouts are above 0"):
        CallConfig(**config)  # type: ignore[arg-type]  # that is the point
