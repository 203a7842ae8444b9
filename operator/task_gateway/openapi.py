"""The OpenAPI 3.1 document, made from routes and models, and a page to try it.

The page is Swagger UI from a package, served from here: nothing is loaded from elsewhere, and its content security policy
allows nothing else. Requests that it makes need a token, as all others.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import orjson
from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from task_contract.models import Spec
from task_gateway.models import Around, ProblemBody
from task_gateway.problems import CONTENT_TYPE, TITLES, Problem
from task_gateway.routes import Content, Part, Route
from task_platform.settings import product_version

_REF: Final = "#/components/schemas/{model}"
_STRICT: Final = ("Payload", "RetryPolicy", "Callback", "SecretKeyRef")
"""Parts of a request: what is no field of them is refused."""
_METHODS_WITH_TOKEN: Final = (401, 403, 429, 500, 503)
_ASSETS: Final = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "favicon-32x32.png": "image/png",
}
_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Processing tasks</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="icon" href="docs/favicon-32x32.png">
</head>
<body>
<div id="page"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/page.js"></script>
</body>
</html>
"""
# This version of Swagger UI refuses documents of 3.1, and shows ours well when they say 3.0.
_SCRIPT: Final = """fetch("openapi.json").then((answer) => answer.json()).then((spec) => {
  spec.openapi = "3.0.3";
  SwaggerUIBundle({spec, dom_id: "#page", deepLinking: true, validatorUrl: null});
});
"""
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_WHAT: Final = {
    400: "The request cannot be read.",
    401: "No valid token.",
    403: "The caller lacks the right, or the cluster refuses it.",
    404: "It is not there.",
    408: "The body did not come in time.",
    409: "It is in the way of something that is there, or of the state of the task.",
    413: "The body is too large.",
    415: "The body is of another type.",
    422: "Fields or parameters are not valid; errors names each.",
    429: "Too many requests of this caller; Retry-After says when to come again.",
    500: "A fault of the gateway.",
    503: "A server that is needed does not answer.",
    507: "The document volume is full.",
}


class OpenApi:
    """/openapi.json, and /docs."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self._documented = [route for part in parts for route in part.routes() if route.documented]

    def routes(self) -> Sequence[Route]:
        """Return the operations."""
        html: Content = {"text/html": {"type": "string"}}
        return (
            Route("GET", "/openapi.json", self._json, "This document", {200: None}, public=True, documented=False),
            Route("GET", "/docs", self._page, "A page to try it", {200: html}, public=True, documented=False),
            Route("GET", "/docs/{asset}", self._asset, "Its files", {200: html}, public=True, documented=False),
        )

    @cached_property
    def document(self) -> dict[str, Any]:
        """The document, made when somebody first asks for it."""
        return document(self._documented)

    @cached_property
    def _text(self) -> bytes:
        return orjson.dumps(self.document)

    async def _json(self, _: web.Request) -> web.Response:
        return web.Response(body=self._text, content_type="application/json", headers={"Cache-Control": "no-cache"})

    async def _page(self, _: web.Request) -> web.Response:
        return web.Response(text=_PAGE, content_type="text/html", headers={"Content-Security-Policy": _POLICY})

    async def _asset(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["asset"]
        headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "public, max-age=3600"}
        if name == "page.js":
            return web.Response(text=_SCRIPT, content_type="text/javascript", headers=headers)
        if name not in _ASSETS:
            raise Problem(404, "not-found", "cannot find that file of the page")
        import swagger_ui_bundle

        path = Path(swagger_ui_bundle.swagger_ui_path) / name
        return web.FileResponse(path, headers=headers | {"Content-Type": _ASSETS[name]})


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """Return the OpenAPI document of the routes."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Processing tasks",
            "version": product_version() or "0",
            "description": "Asynchronous document and embedding tasks of knowledge bases.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(routes),
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A token of the cluster, such as that of a service account. Not asked for where the "
                    "network is trusted.",
                }
            },
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    answers = {
        str(status): {"description": route.summary + ".", **({} if content is None else {"content": _content(content)})}
        for status, content in route.answers.items()
    }
    statuses = sorted({*route.problems, *(() if route.public else _METHODS_WITH_TOKEN)})
    answers |= {str(status): _problem(status) for status in statuses if str(status) not in answers}
    words = re.sub(r"[{}]", "", route.path.removeprefix("/api/v1")).strip("/").replace("/", "_").replace(".", "_")
    return {
        "operationId": f"{route.method.lower()}_{words}",
        "summary": route.summary,
        **({"description": route.description} if route.description else {}),
        "tags": [route.tag],
        "security": [] if route.public else [{"token": []}, {}],
        **({"parameters": [one.document() for one in route.parameters]} if route.parameters else {}),
        **(
            {"requestBody": {"required": route.body_required, "content": _content(route.body)}}
            if route.body is not None
            else {}
        ),
        "responses": answers,
    }


def _problem(status: int) -> dict[str, Any]:
    headers = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
    return {
        "description": _WHAT[status],
        **({"headers": headers} if status in {429, 503} else {}),
        "content": {CONTENT_TYPE: {"schema": {"$ref": _REF.format(model=ProblemBody.__name__)}}},
    }


def _content(content: Content) -> dict[str, Any]:
    return {
        media: {"schema": {"$ref": _REF.format(model=what.__name__)} if isinstance(what, type) else dict(what)}
        for media, what in content.items()
    }


def _schemas(routes: Iterable[Route]) -> dict[str, Any]:
    models: set[type[BaseModel]] = {Spec, Around, ProblemBody}
    for route in routes:
        for content in (*route.answers.values(), route.body):
            models |= {what for what in (content or {}).values() if isinstance(what, type)}
    ordered = sorted(models, key=lambda model: model.__name__)
    _, found = models_json_schema(
        [(model, "validation") for model in ordered], by_alias=False, ref_template=_REF, title="schemas"
    )
    schemas: dict[str, Any] = found["$defs"]
    around, spec = schemas.pop("Around"), schemas.pop("Spec")
    schemas["TaskRequest"] = _task_request(spec, around)
    schemas["ProblemBody"]["properties"]["type"]["examples"] = [f"https://tasks.zzdsj.io/problems/{kind}" for kind in TITLES]
    for name in _STRICT:
        if name in schemas:
            schemas[name]["additionalProperties"] = False
    return schemas


def _task_request(spec: Mapping[str, Any], around: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of :func:`task_gateway.models.parse_task`: that of the spec with the names that REST has."""
    properties = {
        ("task_type" if name == "type" else name): schema for name, schema in spec["properties"].items() if name != "cancel"
    }
    return {
        "title": "TaskRequest",
        "description": "A task to create. kb_id is required for every type but health_check and embedding_generation; which "
        "fields of the payload fit depends on the type.",
        "type": "object",
        "additionalProperties": False,
        "required": ["task_type"],
        "properties": properties | around["properties"],
    }
