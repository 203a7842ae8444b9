"""Where Redis is: one server, the one that Sentinels name as master at the moment, or a Redis Cluster; and in what they
differ for who uses them. No client is imported: whoever asks for one brings its library, in threads or in an event loop.

``redis://``, ``rediss://`` and ``unix://`` are the client library's own. Beside them there is
``redis+sentinel://[user:password@]host[:26379][,host…]/service[/database]``, and ``rediss+sentinel://`` with TLS to them
all. User and password are the servers'; ``?sentinel_username=…&sentinel_password=…`` are those of the Sentinels,
other parameters the library's, such as ``ssl_ca_certs``. And there is ``redis+cluster://[user:password@]host[:6379][,host…]``,
and ``rediss+cluster://``: some of the nodes, which name the others.
"""

import inspect
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlencode

_SENTINEL_PORT: Final = 26379
"""https://redis.io/docs/latest/operate/oss_and_stack/management/sentinel/"""
_FORM: Final = re.compile(
    r"(?P<tls>rediss?)\+sentinel://(?:(?P<who>[^@/?]*)@)?(?P<hosts>[^@/?]+)/(?P<service>[^/?]+)(?:/(?P<database>[0-9]+))?/?"
    r"(?:\?(?P<query>[^#]*))?",
)
_CLUSTER_PORT: Final = 6379
_CLUSTER: Final = re.compile(
    r"(?P<tls>rediss?)\+cluster://(?:(?P<who>[^@/?]*)@)?(?P<hosts>[^@/?]+)(?:/0?)?(?:\?(?P<query>[^#]*))?"
)
_HOST: Final = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")
_SINGLE: Final = ("redis://", "rediss://", "unix://")


@dataclass(frozen=True, slots=True)
class Sentinels:
    """Who is asked for the master, and how it is reached."""

    hosts: tuple[tuple[str, int], ...]
    service: str
    server: str
    """An address of the form of a single server, with a host that means nothing: user, database, TLS and options."""
    options: Mapping[str, str]
    """User and password of the Sentinels."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """Nodes of a Redis Cluster that are asked for all others, and how they are reached."""

    hosts: tuple[tuple[str, int], ...]
    server: str
    """An address of the form of a single server, with a host that means nothing: user, TLS and options."""


def address_of(url: str) -> Sentinels | Nodes | None:
    """Read an address; None: it is that of a single server. Raises ValueError, which never names a password.

    >>> found = address_of("redis+sentinel://:secret@a,b:26380/mymaster/2")
    >>> found.hosts, found.service, found.server
    ((('a', 26379), ('b', 26380)), 'mymaster', 'redis://:secret@master/2')
    >>> address_of("redis+cluster://:secret@a,b:7000")
    Nodes(hosts=(('a', 6379), ('b', 7000)), server='redis://:secret@node/0')
    """
    if url.startswith(_SINGLE):
        return None
    if form := _CLUSTER.fullmatch(url):
        hosts = _hosts(form["hosts"], port=_CLUSTER_PORT, what="nodes")
        return Nodes(hosts, _server(form, host="node", database="0", query=form["query"] or ""))
    form = _FORM.fullmatch(url)
    if form is None:
        raise ValueError(
            "must be redis://host:6379/0, rediss://…, redis+sentinel://host:26379,host:26379/service/0 or "
            "redis+cluster://host:6379,host:6379"
        )
    query = dict(parse_qsl(form["query"] or "", keep_blank_values=True))
    options = {
        name.removeprefix("sentinel_"): query.pop(name)
        for name in ("sentinel_username", "sentinel_password")
        if name in query
    }
    server = _server(form, host="master", database=form["database"] or "0", query=urlencode(query))
    hosts = _hosts(form["hosts"], port=_SENTINEL_PORT, what="Sentinels")
    return Sentinels(hosts, unquote(form["service"]), server, options)


def _hosts(text: str, *, port: int, what: str) -> tuple[tuple[str, int], ...]:
    hosts = []
    for one in text.split(","):
        host = _HOST.fullmatch(one)
        if host is None or int(host["port"] or 1) not in range(1, 65_536):
            raise ValueError(f"must name its {what} as host:{port},host:{port}")
        hosts.append((host["name"].strip("[]"), int(host["port"] or port)))
    return tuple(hosts)


def _server(form: re.Match[str], *, host: str, database: str, query: str) -> str:
    who = "" if form["who"] is None else f"{form['who']}@"
    return f"{form['tls']}://{who}{host}/{database}{f'?{query}' if query else ''}"


def check_redis_url(url: str) -> str:
    """Return an address as it is. Raises ValueError."""
    address_of(url)
    return url


def open_redis(library: ModuleType, url: str, **options: Any) -> Any:
    """Return a client of ``redis`` or ``redis.asyncio``, which connects with the first command.

    ``options`` are those of its ``from_url``. With Sentinels every new connection asks them for the master: after a failover
    what was under way fails as if the server had been restarted, and the next command finds the new one. So it is with the
    nodes of a Redis Cluster.
    """
    found = address_of(url)
    if found is None:
        return library.Redis.from_url(url, **options)
    if isinstance(found, Nodes):
        said = library.connection.parse_url(found.server)
        said = {name: value for name, value in said.items() if name not in {"host", "port", "db", "connection_class"}}
        nodes = [library.cluster.ClusterNode(*host) for host in found.hosts]
        tls = {"ssl": found.server.startswith("rediss://")}
        return library.cluster.RedisCluster(startup_nodes=nodes, **(said | tls | options))
    pool = library.ConnectionPool.from_url(found.server)
    given: dict[str, Any] = {name: value for name, value in pool.connection_kwargs.items() if name not in {"host", "port"}}
    timeouts = {name: value for name, value in options.items() if name.startswith("socket_")}
    secured = {name: value for name, value in given.items() if name.startswith("ssl")}
    if found.server.startswith("rediss://"):
        secured["ssl"] = True
    asking = library.Sentinel(found.hosts, sentinel_kwargs={**timeouts, **secured, **found.options})
    return asking.master_for(found.service, connection_pool_class=_closing_all(library), **(given | secured | options))


def failures(library: ModuleType) -> tuple[type[Exception], ...]:
    """Return what commands raise when Redis does not answer as it should: the client's own error for a cluster that is gone
    is none of its family of errors. ``library``: ``redis``."""
    return library.exceptions.RedisError, library.exceptions.RedisClusterException, OSError, TimeoutError


def takes_everything_in_pipelines(client: Any) -> bool:
    """Whether pipelines of a client take scripts and PUBLISH: those of a Redis Cluster take neither."""
    return not hasattr(client, "nodes_manager")


@asynccontextmanager
async def subscribed(client: Any, channel: str) -> AsyncIterator[Any]:
    """Listen to a channel; ``client``: of ``redis.asyncio``. Raises what it raises.

    A cluster is asked for its nodes first: the one that was listened to before may be gone. What else the client does
    meanwhile fails then, as after a lost connection.
    """
    if not takes_everything_in_pipelines(client):
        await client.aclose()
        await client.initialize()
    async with client.pubsub() as subscription:
        await subscription.subscribe(channel)
        yield subscription


async def publish(client: Any, channel: str, messages: Sequence[str | bytes]) -> None:
    """Publish in one request; in a cluster one by one. ``client``: of ``redis.asyncio``. Raises what it raises."""
    if not takes_everything_in_pipelines(client):
        for message in messages:
            await client.publish(channel, message)
        return
    async with client.pipeline(transaction=False) as pipeline:
        for message in messages:
            pipeline.publish(channel, message)
        await pipeline.execute()


def _closing_all(library: ModuleType) -> Any:
    """Return the library's pool for Sentinels, which closes the connections to these with its own."""
    known: Any = library.sentinel.SentinelConnectionPool
    if inspect.iscoroutinefunction(known.disconnect):

        async def disconnect_later(self: Any, inuse_connections: bool = True) -> None:
            for pool in (super(made, self), *_pools_of(self)):
                await pool.disconnect(inuse_connections)

        made: Any = type("ClosingPool", (known,), {"disconnect": disconnect_later})
        return made

    def disconnect(self: Any, inuse_connections: bool = True) -> None:
        for pool in (super(made, self), *_pools_of(self)):
            pool.disconnect(inuse_connections)

    made = type("ClosingPool", (known,), {"disconnect": disconnect})
    return made


def _pools_of(pool: Any) -> list[Any]:
    return [sentinel.connection_pool for sentinel in pool.sentinel_manager.sentinels]
