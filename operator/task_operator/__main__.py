"""The operator's command line: ``python -m task_operator run`` and ``python -m task_operator migrate``."""

import argparse
import asyncio
import contextlib
import socket
import sys
from collections.abc import Coroutine, Sequence
from datetime import timedelta
from typing import Any, Final

import asyncpg
import kopf
import structlog
import uvloop

from task_operator.archive import Archive
from task_operator.cluster import Cluster, Watches
from task_operator.controller import Controller, VersionsWentBack
from task_operator.events import Events
from task_operator.handlers import build_registry, event_sinks, kopf_settings
from task_operator.health import Health
from task_operator.jobs import common_labels
from task_operator.metrics import Metrics
from task_operator.projection import Database
from task_operator.schema import migrate
from task_operator.settings import DatabaseSettings, Settings
from task_operator.sweeper import Sweeper
from task_platform.kubernetes import Access, ClusterError, KubeconfigError
from task_platform.logs import configure_logging
from task_platform.progress import ProgressFeed
from task_platform.settings import SettingsError, load_settings

_log = structlog.get_logger("task_operator")
_STOP_TIMEOUT: Final = 3.0  # seconds for a look in progress to end


async def run(settings: Settings) -> int:
    """Run until a signal or a fault; return the exit code.

    kopf gives up on some errors of a watch; then, or when one of the parts fails, the process ends with 1 and is started
    again by its supervisor: everything begins with a full list, so nothing is lost by it.
    """
    access = Access.from_environment()
    metrics = Metrics()
    watches = Watches(expected=2 * max(1, len(settings.namespaces)))  # tasks and Jobs
    cluster = Cluster(access)
    database = None if settings.postgres_url is None else Database(settings.postgres_url, metrics=metrics)
    template = settings.runner_template()
    events = Events(
        cluster.create_event,
        instance=socket.gethostname(),
        labels=common_labels(template, name="processing-tasks", component="operator"),
        metrics=metrics,
    )
    controller = Controller(
        api=cluster,
        template=template,
        metrics=metrics,
        database=database,
        announce=events.submit,
        namespaces=settings.namespaces,
        policy=settings.policy(),
        limits=settings.limits(),
        budget=settings.task_budget,
        resync_seconds=settings.resync_seconds,
    )
    sweeper = None
    if database is not None and settings.sweep_interval_seconds:
        sweeper = Sweeper(
            create_job=cluster.create_job,
            database=database,
            alive=controller.alive,
            template=template,
            metrics=metrics,
            namespaces=settings.namespaces,
            interval=timedelta(seconds=settings.sweep_interval_seconds),
        )
    archive = None
    if database is not None and settings.history_days:
        archive = Archive(database=database, keep=timedelta(days=settings.history_days), metrics=metrics)
    health = Health(
        listen=settings.listen,
        watches=watches,
        ready=lambda: controller.synced,
        metrics=metrics,
    )
    feed = None if settings.redis_url is None else ProgressFeed(settings.redis_url, sink=controller.on_progress)

    watches.sinks = event_sinks(controller)
    watches.on_relist = controller.relist
    watches.on_reopen = controller.check_versions
    if database is not None:
        database.on_incomplete = controller.relist
    await cluster.warm_up()
    if database is not None:
        await database.warm_up()
    await health.warm_up()
    # Started before kopf: on its way out kopf cancels every task that began after it did.
    parts = [
        _start("controller", controller.run(watches.open)),
        _start("health", health.run()),
        _start("events", events.run()),
        *([] if database is None else [_start("projection", database.run())]),
        *([] if feed is None else [_start("progress", feed.run())]),
        *([] if sweeper is None else [_start("sweeper", sweeper.run())]),
        *([] if archive is None else [_start("archive", archive.run())]),
    ]

    async def cleanup() -> None:
        await _stop(parts)
        await health.aclose()

    watching = _start(
        "kopf",
        kopf.operator(
            registry=build_registry(controller, access=access, watches=watches, cleanup=cleanup),
            settings=kopf_settings(),
            clusterwide=not settings.namespaces,
            namespaces=list(settings.namespaces),
            standalone=True,
            # Without one kopf asks the system for the name of the user; the uid of a container seldom has one.
            identity="task-operator",  # type: ignore[arg-type]  # a NewType of str that kopf does not export
        ),
    )
    try:
        _log.info("operator started", namespaces=settings.namespaces or "all", server=access.server)
        await asyncio.wait([watching, *parts], return_when=asyncio.FIRST_COMPLETED)
        failed = [part for part in parts if part.done() and not part.cancelled()]
        if failed:
            watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        for part in failed:
            if (error := part.exception()) is not None:
                _log.error("a part of the operator failed", part=part.get_name(), error=_explain(error))
        return 1 if failed else 0
    except Exception as error:  # noqa: BLE001 - the supervisor starts the operator again; the log says why
        _log.error("watching failed", error=_explain(error))
        return 1
    finally:
        await cleanup()
        if feed is not None:
            await feed.aclose()
        if database is not None:
            await database.aclose()
        await cluster.aclose()
        _log.info("operator stopped")


def _start(name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    return asyncio.create_task(work, name=name)


async def _stop(parts: Sequence[asyncio.Task[None]]) -> None:
    for part in parts:
        part.cancel()
    await asyncio.wait(parts, timeout=_STOP_TIMEOUT)


def _explain(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_explain(one) for one in error.exceptions)
    if isinstance(error, VersionsWentBack):
        return str(error)
    return error.message if isinstance(error, ClusterError) else repr(error)


async def run_migrations(settings: DatabaseSettings) -> int:
    """Bring the database up to date; return the exit code."""
    if settings.postgres_url is None:
        _log.error("cannot migrate: OPERATOR_POSTGRES_URL is not set")
        return 2
    try:
        applied = await migrate(settings.postgres_url)
    except (OSError, asyncpg.PostgresError, TimeoutError) as error:
        _log.error("cannot migrate: cannot connect to PostgreSQL", error=repr(error))
        return 1
    _log.info("the database is up to date", applied=applied)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m task_operator",
        description="Operator of ProcessingTasks. Settings are environment variables OPERATOR_…: see docs/operator.md.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="watch tasks and run them as Jobs")
    commands.add_parser("migrate", help="create or update the tables in PostgreSQL, and exit")
    command = parser.parse_args(arguments).command
    configure_logging("INFO")
    try:
        if command == "migrate":
            database = load_settings(DatabaseSettings, program="operator")
            configure_logging(database.log_level)
            return uvloop.run(run_migrations(database))
        settings = load_settings(Settings, program="operator")
        configure_logging(settings.log_level)
        return uvloop.run(run(settings))
    except (SettingsError, KubeconfigError) as error:
        _log.error(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
