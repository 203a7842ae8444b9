"""Proxies before real stores, which refuse what a test says: as a server does that has too much to do for a while."""

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import grpc  # type: ignore[import-untyped]  # its types come from no package of ours
from aiohttp import web
from pymilvus.grpc_gen import common_pb2, milvus_pb2

BUSY_CODE = 9
"""Milvus' ForceDeny (quota): its client passes it on at once. A rate limit (8) it repeats by itself until its timeout."""


class BusyElasticsearch:
    """Passes requests on; the next ones are refused, or, of those that carry rows, what is planned for each."""

    def __init__(self, server: str) -> None:
        parts = urlsplit(server)
        self._server = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        self.refusing = 0
        """How many of the next requests are refused."""
        self.plan: list[Callable[[list[bytes]], set[int] | web.Response]] = []
        """For each bulk request: given its lines in pairs, the numbers of those that are refused, or an answer instead."""
        self.bulks: list[int] = []
        """Operations of each bulk request."""

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        if self.refusing:
            self.refusing -= 1
            return too_many()
        refused: set[int] = set()
        pairs: list[bytes] = []
        if request.path.endswith("/_bulk"):
            lines = body.rstrip(b"\n").split(b"\n")
            pairs = [b"\n".join(lines[start : start + 2]) for start in range(0, len(lines), 2)]
            self.bulks.append(len(pairs))
            planned = self.plan.pop(0)(pairs) if self.plan else set()
            if isinstance(planned, web.Response):
                return planned
            if refused := planned:
                body = b"\n".join(pair for index, pair in enumerate(pairs) if index not in refused) + b"\n"
        headers = {
            name: value
            for name, value in request.headers.items()
            if name.lower() in {"authorization", "content-type", "accept"}
        }
        async with (
            aiohttp.ClientSession() as session,
            session.request(request.method, self._server + request.path_qs, data=body, headers=headers) as response,
        ):
            text = await response.text()
            passed = {
                name: response.headers[name] for name in ("X-elastic-product", "Content-Type") if name in response.headers
            }
        if refused:
            answered = json.loads(text)
            items = iter(answered["items"])
            error = {"type": "es_rejected_execution_exception", "reason": "the queue is full"}
            answered["items"] = [
                {"index": {"_id": "?", "status": 429, "error": error}} if index in refused else next(items)
                for index in range(len(pairs))
            ]
            text = json.dumps(answered)
        return web.Response(status=response.status, text=text, headers=passed)


def too_many(**headers: str) -> web.Response:
    """Return what a node answers whose queue is full."""
    error = {"type": "es_rejected_execution_exception", "reason": "the queue is full"}
    return web.json_response(
        {"error": error, "status": 429}, status=429, headers={"X-elastic-product": "Elasticsearch", **headers}
    )


@contextlib.asynccontextmanager
async def busy_elasticsearch(server: str) -> AsyncIterator[tuple[BusyElasticsearch, str]]:
    """Have a proxy before a server; yield it and the URL by which a client reaches the server through it."""
    proxy = BusyElasticsearch(server)
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{path:.*}", proxy.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        parts = urlsplit(server)
        netloc = f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{runner.addresses[0][1]}".lstrip("@")
        yield proxy, urlunsplit(parts._replace(scheme="http", netloc=netloc))
    finally:
        await runner.cleanup()


class BusyMilvus(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Passes calls on as they are, in bytes; the next ones are refused."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self.refusing = 0
        """How many of the next calls are refused."""
        self.by_grpc = False
        """Whether by gRPC's own RESOURCE_EXHAUSTED, as a proxy on the way does it, and not by Milvus' status."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        call = self._channel.unary_unary(details.method)
        name = details.method.rpartition("/")[2]

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if self.refusing and name != "Connect":
                self.refusing -= 1
                if self.by_grpc:
                    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests")
                return _refusal(name)
            metadata = [(key, value) for key, value in context.invocation_metadata() if key in {"authorization", "dbname"}]
            left = context.time_remaining()  # without a deadline: centuries
            try:
                answered: bytes = call(request, metadata=metadata, timeout=min(left, 3600))
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())
            return answered

        return grpc.unary_unary_rpc_method_handler(answer)


_BARE = ("Create", "Drop", "Load", "Release")
"""Beginnings of the calls that are answered with a status alone; other answers have it as their first field."""


def _refusal(name: str) -> bytes:
    status = common_pb2.Status(code=BUSY_CODE, reason="quota exceeded: too many requests")
    answer = status if name.startswith(_BARE) else milvus_pb2.BoolResponse(status=status)
    return bytes(answer.SerializeToString())


@contextlib.contextmanager
def busy_milvus(server: str) -> Iterator[tuple[BusyMilvus, str]]:
    """Have a proxy before a server; yield it and the URL by which a client reaches the server through it."""
    limits = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(urlsplit(server).netloc, options=limits) as channel:
        proxy = BusyMilvus(channel)
        with ThreadPoolExecutor(max_workers=4) as pool:
            listening = grpc.server(pool, handlers=[proxy], options=limits)
            port = listening.add_insecure_port("127.0.0.1:0")
            listening.start()
            try:
                yield proxy, f"http://127.0.0.1:{port}"
            finally:
                listening.stop(grace=None).wait()
