"""An Elasticsearch with certificates of its own authority is reached with that authority, and not without."""

import ssl

import pytest
import trustme
from aiohttp import web

from job_runner import elasticsearch
from job_runner.settings import Settings
from task_contract.errors import StoreUnavailable

pytestmark = pytest.mark.integration


async def test_a_cluster_with_an_authority_of_its_own_is_trusted_by_it_alone() -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"status": "green"}, headers={"X-Elastic-Product": "Elasticsearch"})

    app = web.Application()
    app.router.add_get("/_cluster/health", health)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    try:
        assert site._server is not None
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        url, pem = f"https://127.0.0.1:{port}", authority.cert_pem.bytes().decode()
        assert await elasticsearch.check(url, None, pem) == "Elasticsearch, state green"
        with pytest.raises(StoreUnavailable):
            await elasticsearch.check(url, None)
        with pytest.raises(StoreUnavailable):
            await elasticsearch.check(url, None, trustme.CA().cert_pem.bytes().decode())
    finally:
        await runner.cleanup()


def test_what_is_no_certificate_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKS_POSTGRES_URL", "postgresql://x@y/z")
    monkeypatch.setenv("TASKS_ELASTICSEARCH_CA", "no certificate")
    with pytest.raises(ValueError, match="elasticsearch_ca"):
        Settings()
