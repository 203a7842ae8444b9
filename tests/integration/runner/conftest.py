"""Stores for the runner's tests: the devstack's, or those that TASKS_* variables in the environment name."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from pymilvus import MilvusClient

from tests.support.databases import fresh_database
from tests.support.runner_lab import KnowledgeBases, Lab
from tests.support.servers import free_port, serving

_NEEDED = ("TASKS_POSTGRES_URL", "TASKS_MILVUS_URL", "TASKS_ELASTICSEARCH_URL")

_PATIENCE = 60.0  # seconds until milvus-lite answers


@pytest.fixture(scope="session")
def store_urls(request: pytest.FixtureRequest) -> dict[str, str]:
    """TASKS_* variables of real stores."""
    if all(name in os.environ for name in _NEEDED):
        return {name: value for name, value in os.environ.items() if name.startswith("TASKS_")}
    urls: dict[str, str] = request.getfixturevalue("stores").host_urls
    return urls


@pytest.fixture(scope="module")
def database(store_urls: dict[str, str]) -> Iterator[str]:
    """URL of a fresh database with the tables in it; dropped after the module."""
    with fresh_database(store_urls["TASKS_POSTGRES_URL"], prefix="test") as url:
        yield url


@pytest.fixture(scope="session")
def milvus_lite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a milvus-lite server of this session."""
    port = free_port()
    folder = tmp_path_factory.mktemp("milvus-lite")
    command = [str(Path(sys.executable).with_name("milvus-lite")), "server", "--data-dir", str(folder), "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with serving(command, port=port, log=folder / "log"):
        # It listens long before it answers, on a busy machine longer than the runner has patience.
        MilvusClient(url, timeout=_PATIENCE).close()
        yield url


@pytest.fixture(scope="module")
def knowledge_bases(store_urls: dict[str, str]) -> Iterator[KnowledgeBases]:
    """Knowledge bases that the tests of a module share."""
    knowledge_bases = KnowledgeBases(store_urls)
    yield knowledge_bases
    asyncio.run(knowledge_bases.drop())


@pytest.fixture
async def lab(
    store_urls: dict[str, str], database: str, tmp_path: Path, knowledge_bases: KnowledgeBases
) -> AsyncIterator[Lab]:
    """Documents and tasks of a test, on the real stores."""
    lab = Lab({**store_urls, "TASKS_POSTGRES_URL": database}, folder=tmp_path, knowledge_bases=knowledge_bases)
    yield lab
    await lab.aclose()
