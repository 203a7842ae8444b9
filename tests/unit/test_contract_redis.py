"""Addresses of Redis: of one server, of Sentinels, and of a Redis Cluster."""

import pytest
import redis.asyncio

from task_contract.redis_address import Nodes, Sentinels, address_of, check_redis_url, open_redis


@pytest.mark.parametrize("url", ["redis://:secret@host:6379/0", "rediss://host", "unix:///run/redis.sock?db=1"])
def test_a_single_server_is_the_librarys_own_matter(url: str) -> None:
    assert address_of(url) is None
    assert check_redis_url(url) == url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis+sentinel://a/m", Sentinels((("a", 26379),), "m", "redis://master/0", {})),
        (
            "rediss+sentinel://user:p%40ss@a.example:1,[::1]:2/my-master/3?ssl_ca_certs=/ca.pem&sentinel_password=other",
            Sentinels(
                (("a.example", 1), ("::1", 2)),
                "my-master",
                "rediss://user:p%40ss@master/3?ssl_ca_certs=%2Fca.pem",
                {"password": "other"},
            ),
        ),
        ("redis+cluster://a", Nodes((("a", 6379),), "redis://node/0")),
        (
            "rediss+cluster://user:p%40ss@a.example:1,[::1]/0?ssl_ca_certs=/ca.pem",
            Nodes((("a.example", 1), ("::1", 6379)), "rediss://user:p%40ss@node/0?ssl_ca_certs=/ca.pem"),
        ),
    ],
)
def test_sentinels_and_nodes_are_read(url: str, expected: Sentinels | Nodes) -> None:
    assert address_of(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://host",
        "redis+sentinel://host:26379",
        "redis+sentinel:///mymaster",
        "redis+sentinel://:secret@a b/mymaster",
        "redis+sentinel://:secret@host:0/mymaster",
        "redis+sentinel://:secret@host:99999/mymaster",
        "redis+sentinel://:secret@host,/mymaster",
        "redis+sentinel://:secret@host/mymaster/one",
        "redis+cluster://:secret@host:0",
        "redis+cluster://:secret@host/1",
        "redis+cluster://:secret@",
    ],
)
def test_what_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match=r"must (be redis://|name its (Sentinels|nodes))") as refused:
        check_redis_url(url)
    assert "secret" not in str(refused.value)


async def test_the_master_is_reached_as_the_address_says() -> None:
    url = "rediss+sentinel://user:p%40ss@a:1/m/3?ssl_ca_certs=/ca.pem&sentinel_password=other"
    client = open_redis(redis.asyncio, url, socket_timeout=7, decode_responses=True)
    given = client.connection_pool.connection_kwargs
    assert {name: given[name] for name in ("username", "password", "db", "socket_timeout", "decode_responses")} == {
        "username": "user",
        "password": "p@ss",
        "db": 3,
        "socket_timeout": 7,
        "decode_responses": True,
    }
    assert "host" not in given
    [sentinel] = client.connection_pool.sentinel_manager.sentinels
    asked = sentinel.connection_pool.connection_kwargs
    assert (asked["host"], asked["port"], asked["password"], asked["socket_timeout"]) == ("a", 1, "other", 7)
    assert asked["ssl_ca_certs"] == given["ssl_ca_certs"] == "/ca.pem"
    for pool in (client.connection_pool, sentinel.connection_pool):
        assert "SSL" in pool.connection_class.__name__
    await client.aclose()
    await sentinel.aclose()


async def test_nodes_are_reached_as_the_address_says() -> None:
    url = "rediss+cluster://user:p%40ss@a:1,b/?ssl_ca_certs=/ca.pem"
    client = open_redis(redis.asyncio, url, socket_timeout=7, decode_responses=True)
    given = client.connection_kwargs
    assert {
        name: given[name] for name in ("username", "password", "socket_timeout", "decode_responses", "ssl_ca_certs")
    } == {
        "username": "user",
        "password": "p@ss",
        "socket_timeout": 7,
        "decode_responses": True,
        "ssl_ca_certs": "/ca.pem",
    }
    assert [(node.host, node.port) for node in client.startup_nodes] == [("a", 1), ("b", 6379)]
    assert "SSL" in given["connection_class"].__name__
    await client.aclose()
