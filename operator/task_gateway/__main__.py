"""The gateway's command line: ``python -m task_gateway run``."""

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog
import uvloop
from aiohttp import web
from pydantic import SecretStr

from task_gateway.app import Gate, make_app
from task_gateway.batches import Batches
from task_gateway.buckets import DocumentBucket
from task_gateway.callbacks import Callbacks
from task_gateway.callers import ANYBODY, Caller, Callers
from task_gateway.cluster import Cluster
from task_gateway.costs import Costs
from task_gateway.database import Database
from task_gateway.documents import DocumentStore
from task_gateway.following import Watchers
from task_gateway.hub import Hub
from task_gateway.knowledge import Knowledge
from task_gateway.limits import RateLimit
from task_gateway.listener import Listener
from task_gateway.live import Live
from task_gateway.logs import Logs
from task_gateway.metrics import Metrics
from task_gateway.openapi import OpenApi
from task_gateway.probes import Probes
from task_gateway.routes import Part
from task_gateway.settings import Auth, Settings
from task_gateway.stats import Statistics, connects
from task_gateway.tasks import Tasks
from task_gateway.tickets import Tickets
from task_gateway.uploads import Uploads
from task_gateway.vectors import Vectors
from task_gateway.volumes import DocumentVolumes
from task_platform.kubernetes import Access, KubeconfigError
from task_platform.logs import configure_logging
from task_platform.progress import ProgressFeed
from task_platform.settings import SettingsError, load_settings

_log = structlog.get_logger("task_gateway")


async def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code.

    A signal makes the replica unready; it goes on taking requests until every proxy has heard of that, and then ends those
    that are under way.
    """
    metrics = Metrics()
    listener = Listener(settings.postgres_url)
    hub = Hub(listener)
    feed = None if settings.redis_url is None else ProgressFeed(settings.redis_url, sink=hub.on_progress)
    cluster, database = Cluster(Access.from_environment()), Database(settings.postgres_url)
    trusting = settings.auth is Auth.TRUST_THE_NETWORK
    callers = Callers(
        reviews=cluster,
        tickets=database,
        trusting=trusting,
        namespaces=settings.namespaces,
        default_namespace=settings.default_namespace,
        audiences=settings.audiences,
        believe=settings.auth_cache_seconds,
    )
    gate = Gate(
        callers=callers,
        limit=RateLimit(rate=settings.rate, burst=settings.burst),
        metrics=metrics,
        cors_origins=settings.cors_origins,
    )
    tasks = Tasks(cluster=cluster, database=database, callers=callers, metrics=metrics, settings=settings, latest=hub.latest)
    live = Live(Watchers(hub=hub, past=database, callers=callers, most=settings.live_clients), origins=settings.cors_origins)
    documents = _documents(settings)
    uploads = Uploads(tasks=tasks, callers=callers, store=documents, most_bytes=settings.upload_bytes)
    metrics.watch_hub(hub)
    probes = Probes(
        checks={"kubernetes": cluster.ping, "postgres": database.ping, "redis": None if feed is None else feed.ping},
        vital="kubernetes",
        metrics=metrics,
        ready=lambda: not gate.draining,
    )
    parts: list[Part] = [
        tasks,
        Batches(tasks=tasks, callers=callers, charge=gate.charge, settings=settings),
        Logs(tasks=tasks, cluster=cluster, database=database),
        Vectors(tasks=tasks, database=database),
        Callbacks(tasks=tasks, database=database, callers=callers),
        Tickets(callers),
        live,
        uploads,
        Knowledge(database=database, callers=callers),
        Costs(accounts=database, callers=callers),
        Statistics(
            counts=database,
            callers=callers,
            stores={
                "postgres": database.ping,
                "redis": None if feed is None else feed.ping,
                "milvus": None if settings.milvus_url is None else connects(settings.milvus_url),
                "elasticsearch": None if settings.elasticsearch_url is None else connects(settings.elasticsearch_url),
            },
        ),
        probes,
    ]
    app = make_app(gate, [*parts, OpenApi(parts)])
    if trusting:
        _log.warning(
            "GATEWAY_AUTH is trust-the-network: nobody is asked for a token, and whoever reaches this gateway may create, "
            "read and delete every task in its namespaces; keep others away with a NetworkPolicy",
            namespaces=settings.namespaces or "all",
        )
    await cluster.warm_up()
    await database.warm_up()
    work = [asyncio.create_task(hub.run(), name="hub"), asyncio.create_task(uploads.tidy(), name="uploads")]
    if feed is not None:
        work.append(asyncio.create_task(feed.run(), name="progress"))
    if settings.rabbitmq_url is not None:
        from task_gateway.submissions import Submissions  # a library that few need

        submissions = Submissions(
            settings.rabbitmq_url,
            queue=settings.rabbitmq_queue,
            caller=Caller(settings.rabbitmq_account) if settings.rabbitmq_account else ANYBODY,
            tasks=tasks,
            callers=callers,
            metrics=metrics,
            prefetch=settings.rabbitmq_prefetch,
        )
        work.append(asyncio.create_task(submissions.run(), name="submissions"))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=settings.stop_seconds, handler_cancellation=True)
    try:
        await runner.setup()
        for listen in (settings.listen, settings.front_listen):
            if listen:
                host, _, port = listen.rpartition(":")
                await web.TCPSite(runner, host.strip("[]"), int(port), reuse_address=True).start()
        _log.info("gateway started", listen=settings.listen, front=settings.front_listen)
        stop = asyncio.create_task(_signalled())
        await asyncio.wait([stop, *work], return_when=asyncio.FIRST_COMPLETED)
        gate.draining = True
        if not stop.done():
            for failed in (one for one in work if one.done()):
                _log.error("a part of the gateway failed", part=failed.get_name(), error=repr(failed.exception()))
            return 1
        _log.info("gateway is about to stop", seconds=settings.drain_seconds)
        await asyncio.sleep(settings.drain_seconds)
    except OSError as error:
        _log.error("cannot listen", error=str(error))
        return 1
    finally:
        hub.close()
        await runner.cleanup()
        for one in work:
            one.cancel()
        await asyncio.wait(work)
        await listener.aclose()
        if feed is not None:
            await feed.aclose()
        if documents is not None:
            await documents.aclose()
        await cluster.aclose()
        await database.aclose()
        _log.info("gateway stopped")
    return 0


def _documents(settings: Settings) -> DocumentStore | None:
    """Return where uploads are put; None: there are none."""
    if settings.documents is None:
        return None
    if not settings.documents.startswith("s3://"):
        return DocumentVolumes(Path(settings.documents))
    return DocumentBucket(
        settings.documents,
        endpoint=settings.s3_endpoint,
        region=settings.s3_region,
        virtual=settings.s3_addressing == "virtual",
        account=(_revealed(settings.s3_access_key_id), _revealed(settings.s3_secret_access_key)),
        session_token=_revealed(settings.s3_session_token) or None,
        certificates=settings.s3_ca,
    )


def _revealed(secret: SecretStr | None) -> str:
    return "" if secret is None else secret.get_secret_value()


async def _signalled() -> None:
    """Wait for SIGTERM or SIGINT."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m task_gateway",
        description="ProcessingTasks over HTTP. Settings are environment variables GATEWAY_…: see docs/gateway.md.",
    )
    parser.add_subparsers(dest="command", required=True).add_parser("run", help="serve until SIGTERM")
    parser.parse_args(arguments)
    configure_logging("INFO")
    try:
        settings = load_settings(Settings, program="gateway")
        configure_logging(settings.log_level)
        return uvloop.run(run(settings))
    except (SettingsError, KubeconfigError) as error:
        _log.error(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
