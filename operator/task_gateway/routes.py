"""What a handler is registered with: one :class:`Route` is a line of the router and an operation of the OpenAPI document.

A part of the gateway (tasks, live updates, knowledge) is an object with a method ``routes()``;
:func:`task_gateway.app.make_app` takes all of them. A handler finds who asks with :func:`caller_of`, reads its body with
:func:`read_json` and raises :class:`~task_gateway.problems.Problem`; so it may with
:class:`~task_platform.kubernetes.ClusterError` and :class:`~task_gateway.database.DatabaseUnavailable`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar, cast

import orjson
from aiohttp import web
from pydantic import BaseModel, TypeAdapter, ValidationError

from task_contract.models import Spec
from task_gateway.callers import ANYBODY, Caller
from task_gateway.problems import Problem, of_validation

M = TypeVar("M", bound=BaseModel)
R = TypeVar("R")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CALLER: Final = web.RequestKey("caller", Caller)
"""Who asks; the caller of no name on public routes."""
REQUEST_ID: Final = web.RequestKey("request_id", str)
"""Also in the header X-Request-Id of the answer, and in every line of the log."""

_BODY_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of an operation, as OpenAPI has it."""

    name: str
    where: str
    """path, query or header."""
    schema: Mapping[str, Any]
    description: str

    def document(self) -> dict[str, Any]:
        """Return its parameter object."""
        return {
            "name": self.name,
            "in": self.where,
            "required": self.where == "path",
            "description": self.description,
            "schema": dict(self.schema),
        }


Content = Mapping[str, type[BaseModel] | Mapping[str, Any]]
"""Media type → model, or JSON schema."""


@dataclass(frozen=True, slots=True)
class Route:
    """An operation."""

    method: str
    path: str
    """With parts in braces, ``/api/v1/tasks/{id}``; each is a Parameter as well."""
    handler: Handler
    summary: str
    answers: Mapping[int, Content | None]
    """By status; None: without a body. Problems are not listed here."""
    problems: Sequence[int] = ()
    """Statuses of problems beside 401, 403, 429, 500 and 503, which every operation has that is not public."""
    description: str = ""
    tag: str = "tasks"
    parameters: Sequence[Parameter] = ()
    body: Content | None = None
    body_required: bool = True
    public: bool = False
    """Whether anybody may ask, without token and limit: probes and pages."""
    ticket: bool = False
    """Whether ``?ticket=`` stands for the token."""
    documented: bool = True


class Part(Protocol):
    """A part of the gateway."""

    def routes(self) -> Sequence[Route]: ...  # noqa: D102 - see the module


NAME: Final = Parameter(
    "id", "path", {"type": "string", "minLength": 1, "maxLength": 253}, "Name of the task, as its creation has returned it."
)
NAMESPACE: Final = (
    Parameter("namespace", "query", {"type": "string", "maxLength": 63}, "Namespace of the task."),
    Parameter("X-Namespace", "header", {"type": "string", "maxLength": 63}, "The same; goes before the query."),
)


_KEY: Final[TypeAdapter[str | None]] = TypeAdapter(cast("Any", Spec.model_fields["idempotency_key"].annotation))
IDEMPOTENCY_KEY: Final = Parameter(
    "Idempotency-Key",
    "header",
    {"type": "string", "minLength": 1, "maxLength": 128},
    "The request may be repeated: one with the same key is answered with what the first has created.",
)


LIST_NAMESPACE: Final = (
    Parameter(
        "namespace", "query", {"type": "string", "maxLength": 63}, "A namespace, or * for all that the caller may list."
    ),
    NAMESPACE[1],
)


def caller_of(request: web.Request) -> Caller:
    """Return who asks."""
    caller: Caller = request.get(CALLER, ANYBODY)
    return caller


def asked_namespace(request: web.Request) -> tuple[str | None, ...]:
    """Return the namespaces that a request names outside its body, the one that goes first first."""
    return request.headers.get("X-Namespace"), request.query.get("namespace")


def idempotency_key(request: web.Request) -> str | None:
    """Return the header Idempotency-Key. Raises :class:`Problem` unless it may be the field ``idempotency_key``."""
    try:
        return _KEY.validate_python(request.headers.get("Idempotency-Key"))
    except ValidationError as error:
        raise Problem(
            422, "invalid-parameter", "cannot read the header Idempotency-Key: give 1 to 128 printable ASCII characters"
        ) from error


def answer(data: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return JSON."""
    return web.Response(body=orjson.dumps(data), status=status, content_type="application/json", headers=headers)


def answer_page(
    rows: Sequence[R], *, limit: int, view: Callable[[R], Any], end: Callable[[R], Any], following: str = "next_cursor"
) -> web.Response:
    """Return a page of rows, of which one more than ``limit`` was asked for: it tells that there are others.

    ``end`` says of the last row on the page where the next one begins; the answer has that as ``following``.
    """
    shown = rows[:limit]
    after = end(shown[-1]) if len(rows) > limit else None
    return answer({"items": [view(row) for row in shown], following: after})


def read_query(request: web.Request, model: type[M]) -> M:
    """Return the parameters of a query. Raises :class:`Problem` 422 that names each bad one."""
    given: dict[str, str] = {}
    for name, value in request.query.items():
        if name in {"namespace", "ticket"}:
            continue
        if name in given:
            raise Problem(422, "invalid-parameter", f"cannot read the query: {name[:80]!a} is given twice; give it once")
        given[name] = value
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise of_validation(error, kind="invalid-parameter", what="cannot read the query") from error


def query_parameters(model: type[BaseModel]) -> tuple[Parameter, ...]:
    """Return the parameters that :func:`read_query` takes for a model, for the OpenAPI document."""
    schema = model.model_json_schema()
    return tuple(
        Parameter(name, "query", plain_schema(one, schema), one.get("description", ""))
        for name, one in schema["properties"].items()
    )


def plain_schema(one: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a field of a model, whose schema is ``whole``, without null and references: as text has it."""
    plain = {key: value for key, value in one.items() if key not in {"title", "description", "default"}}
    branches = [branch for branch in plain.pop("anyOf", ()) if branch != {"type": "null"}]
    plain |= branches[0] if branches else {}
    if reference := plain.pop("$ref", None):
        plain = {"type": "string", "enum": whole["$defs"][reference.rpartition("/")[2]]["enum"]}
    if one.get("default") is not None:
        plain["default"] = one["default"]
    return plain


async def read_body(request: web.Request, *, limit: int) -> bytes:
    """Return the body of a request. Raises :class:`Problem` 413 over ``limit`` bytes, unpacked."""
    too_large = Problem(413, "too-large", f"cannot read the body: it has more than {limit} bytes; send less at once")
    if request.content_length is not None and request.content_length > limit:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.content.iter_any():
                data += chunk
                if len(data) > limit:
                    raise too_large
    except TimeoutError:
        raise Problem(408, "invalid-request", f"cannot read the body: not all of it came in {_BODY_SECONDS:.0f} s") from None
    except (web.RequestPayloadError, ValueError) as error:
        raise Problem(400, "invalid-request", f"cannot read the body: {str(error)[:200]}") from error
    return bytes(data)


def check_media_type(request: web.Request, *allowed: str) -> str:
    """Return the media type of a body. Raises :class:`Problem` 415 for another one than these."""
    if request.content_type not in allowed:
        named = " or ".join(allowed)
        raise Problem(415, "unsupported-media-type", f"cannot read the body: send it with Content-Type: {named}")
    return request.content_type


async def read_json(request: web.Request, *, limit: int) -> Any:
    """Return the JSON of a body. Raises :class:`Problem` 400, 413 or 415."""
    check_media_type(request, "application/json")
    return parse_json(await read_body(request, limit=limit))


def parse_json(data: bytes) -> Any:
    """Return what JSON says. Raises :class:`Problem` 400."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise Problem(400, "invalid-request", f"cannot read the body: it is no JSON: {error}") from error
