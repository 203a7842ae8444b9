"""The operator's command line: ``python -m task_operator run``, ``migrate``, ``callbacks`` and ``trial``."""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import asyncpg
import kopf
import structlog
import uvloop

from task_contract.callbacks import CALLBACKS_CHANNEL, REPLAY, STATES
from task_contract.names import GROUP, POOL_PLURAL, SCHEDULE_PLURAL
from task_operator.accounts import Accounts
from task_operator.archive import Archive
from task_operator.callbacks import Sender
from task_operator.channel import RedisSink
from task_operator.cloud_events import Publisher, Sink
from task_operator.cluster import USER_AGENT, Cluster, Watches
from task_operator.controller import Controller, VersionsWentBack
from task_operator.election import Alone, Election, LeaseStore
from task_operator.events import Events, of_dead_callback
from task_operator.handlers import build_registry, event_sinks, kopf_settings
from task_operator.health import Health
from task_operator.jobs import common_labels
from task_operator.metrics import Metrics
from task_operator.outbox import LIST, Listener, Outbox
from task_operator.pool_controller import PoolController
from task_operator.pool_metrics import PoolMetrics
from task_operator.pool_queue import PoolQueue
from task_operator.projection import Database
from task_operator.schedule_controller import ScheduleController
from task_operator.schema import migrate
from task_operator.settings import DatabaseSettings, Settings, headers_of
from task_operator.sweeper import Sweeper
from task_operator.targets import api_servers
from task_operator.traces import TraceSink
from task_operator.trial import Trial, TrialFailed
from task_platform.kubernetes import Access, ClusterError, KubeconfigError, Kubernetes
from task_platform.logs import configure_logging
from task_platform.progress import ProgressFeed
from task_platform.settings import SettingsError, load_settings, product_version

_log = structlog.get_logger("task_operator")
NAME: Final = "processing-tasks"
"""For the label app.kubernetes.io/name."""
_STOP_TIMEOUT: Final = 3.0  # seconds for a look in progress to end


async def run(settings: Settings) -> int:
    """Run until a signal or a fault; return the exit code.

    Several operators may run: each watches, and the one that leads acts (:mod:`task_operator.election`). One that is told to
    stop ends its work, writes what waits, and gives its Lease back, in this order.

    kopf gives up on some errors of a watch; then, or when one of the parts fails, the process ends with 1 and is started
    again by its supervisor: everything begins with a full list, so nothing is lost by it.
    """
    access = Access.from_environment()
    metrics = Metrics()
    template = settings.runner_template()
    leases, election = _election(settings, access, metrics, labels=common_labels(template, name=NAME, component="operator"))
    cluster = Cluster(access, selector=settings.selector, observe=metrics.requested, leads=election.leads)
    await cluster.warm_up()
    with_pools = await cluster.has(POOL_PLURAL, settings.namespaces)
    with_schedules = await cluster.has(SCHEDULE_PLURAL, settings.namespaces)
    # Tasks, Jobs, pools and schedules. Without their CRDs kopf would not watch these; they are listed now and then instead.
    watches = Watches(expected=(2 + with_pools + with_schedules) * max(1, len(settings.namespaces)))
    database = None
    if settings.postgres_url is not None:
        database = Database(
            settings.postgres_url,
            metrics=metrics,
            default_callback=settings.default_callback(),
            leads=election.leads,
            rest=settings.timing().margin,
        )
        database.stand_by()
    events = Events(
        cluster.create_event,
        instance=socket.gethostname(),
        labels=common_labels(template, name=NAME, component="operator"),
        metrics=metrics,
    )
    pool_queue = None if settings.redis_url is None else PoolQueue(settings.redis_url)
    pools = PoolController(
        api=cluster,
        queue=pool_queue,
        template=template,
        metrics=PoolMetrics(metrics),
        on_look=lambda pool, look: controller.on_look(pool, look),
        backlog=lambda pool: controller.backlog(pool),
        namespaces=settings.namespaces,
        watched=with_pools,
        resync_seconds=settings.resync_seconds,
    )
    controller = Controller(
        api=cluster,
        template=template,
        metrics=metrics,
        database=database,
        announce=events.submit,
        namespaces=settings.namespaces,
        selected=bool(settings.selector),
        pools=pools,
        pool_queue=pool_queue,
        policy=settings.policy(),
        limits=settings.limits(),
        budget=settings.task_budget,
        leads=election.leads,
        resync_seconds=settings.resync_seconds,
    )

    def archived(uid: str, version: int) -> bool:
        if database is None:
            return True
        stored = database.acknowledged(uid)
        return stored is not None and stored >= version

    schedules = ScheduleController(
        api=cluster,
        metrics=metrics,
        archived=archived,
        namespaces=settings.namespaces,
        selector=settings.selector,
        watched=with_schedules,
        resync_seconds=settings.resync_seconds,
    )
    sweeper = None
    if database is not None and settings.sweep_interval_seconds:
        sweeper = Sweeper(
            create_job=cluster.create_job,
            database=database,
            alive=controller.alive,
            elsewhere=controller.elsewhere,
            template=template,
            metrics=metrics,
            namespaces=settings.namespaces,
            interval=timedelta(seconds=settings.sweep_interval_seconds),
        )
    archive = None
    if database is not None and settings.history_days:
        archive = Archive(database=database, keep=timedelta(days=settings.history_days), metrics=metrics)
    accounts = None if database is None else Accounts(database=database, metrics=metrics)
    sender, listener = None, None
    publishers: list[Publisher] = []
    if database is not None and settings.postgres_url is not None:
        timeout, sampler = timedelta(seconds=settings.callbacks_timeout_seconds), settings.sampler()
        sender = Sender(
            outbox=Outbox(database, lease=timeout + timedelta(seconds=30)),
            targets=settings.callback_targets(api_servers(os.environ, access.server)),
            api=cluster,
            secrets=frozenset(settings.callbacks_secrets),
            metrics=metrics,
            announce=lambda dead: events.submit(of_dead_callback(dead, now=datetime.now(UTC))),
            timeout=timeout,
            authorities=settings.callbacks_ca,
            sampler=sampler,
            user_agent=f"processing-tasks/{product_version() or 'unknown'}",
        )
        listener = Listener(settings.postgres_url, {CALLBACKS_CHANNEL: sender.wake})
        source = f"//{GROUP}/{settings.instance}"
        sinks: list[Sink] = []
        if settings.redis_url is not None:
            sinks.append(RedisSink(settings.redis_url))
        if settings.rabbitmq_url is not None:
            from task_operator.broker import RabbitSink  # a library that few need

            sinks.append(RabbitSink(settings.rabbitmq_url, exchange=settings.rabbitmq_exchange))
        if settings.traces_endpoint is not None and sampler is not None:
            sinks.append(
                TraceSink(
                    database,
                    endpoint=settings.traces_endpoint,
                    headers=headers_of(settings.traces_headers),
                    sampler=sampler,
                    instance=settings.instance,
                    version=product_version(),
                )
            )
        publishers = [Publisher(settings.postgres_url, sink, source=source, metrics=metrics) for sink in sinks]
    health = Health(
        listen=settings.listen,
        watches=watches,
        ready=lambda: controller.synced,
        metrics=metrics,
        leads=election.leads,
    )
    feed = None if settings.redis_url is None else ProgressFeed(settings.redis_url, sink=controller.on_progress)

    def relist() -> None:
        controller.relist()
        pools.relist()
        schedules.relist()

    watches.sinks = event_sinks(controller, pools, schedules)
    watches.on_relist = relist
    watches.on_reopen = controller.check_versions
    if database is not None:
        database.on_incomplete = controller.relist
    if leases is not None:
        await leases.warm_up()
    if database is not None:
        await database.warm_up()
    if sender is not None:
        await sender.warm_up()
    await health.warm_up()

    # Whoever leads writes, and does all of this; whoever stands by does none of it.
    leading: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
        "controller": controller.lead,
        "pools": lambda: pools.run(watches.open),
        "schedules": lambda: schedules.run(watches.open),
        "events": events.run,
        **({} if database is None else {"projection": database.run}),
        **({} if feed is None else {"progress": feed.run}),
        **({} if sweeper is None else {"sweeper": sweeper.run}),
        **({} if archive is None else {"archive": archive.run}),
        **({} if accounts is None else {"accounts": accounts.run}),
        **({} if sender is None else {"callbacks": sender.run}),
        **({} if listener is None else {"listener": listener.run}),
        **{f"publisher {number}": publisher.run for number, publisher in enumerate(publishers)},
    }

    async def lead() -> None:
        if database is not None:
            database.act()
        try:
            async with asyncio.TaskGroup() as group:
                for name, part in leading.items():
                    group.create_task(part(), name=name)
        finally:
            if database is not None and not election.leads():
                database.stand_by()  # else it stops, and writes what waits

    # Both of them watch. Started before kopf: on its way out kopf cancels every task that began after it did.
    parts = [
        _start("health", health.run()),
        _start("election", election.run(lead)),
        _start("watching", controller.observe(watches.open)),
    ]

    async def cleanup() -> None:
        await _stop(parts)  # the work of a leader with them
        if sender is not None:
            await sender.aclose()
        if database is not None:
            await database.aclose()
        await election.release()
        await health.aclose()

    told_to_stop = asyncio.Event()

    def begun() -> None:
        loop = asyncio.get_running_loop()
        for one in (signal.SIGTERM, signal.SIGINT):  # in place of kopf's, which first takes its time
            loop.add_signal_handler(one, told_to_stop.set)

    watching = _start(
        "kopf",
        kopf.operator(
            registry=build_registry(
                watches.sinks,
                access=access,
                watches=watches,
                with_pools=with_pools,
                with_schedules=with_schedules,
                cleanup=cleanup,
                begun=begun,
            ),
            settings=kopf_settings(selector=settings.selector),
            clusterwide=not settings.namespaces,
            namespaces=list(settings.namespaces),
            standalone=True,
            # Without one kopf asks the system for the name of the user; the uid of a container seldom has one.
            identity="task-operator",  # type: ignore[arg-type]  # a NewType of str that kopf does not export
        ),
    )
    stopping = _start("signal", _wait(told_to_stop))
    try:
        _log.info(
            "operator started",
            namespaces=settings.namespaces or "all",
            selector=settings.selector or "none",
            server=access.server,
        )
        await asyncio.wait([watching, stopping, *parts], return_when=asyncio.FIRST_COMPLETED)
        failed = [part for part in parts if part.done() and not part.cancelled()]
        if stopping.done():
            _log.info("told to stop")
            await cleanup()
        if failed or stopping.done():
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
        stopping.cancel()
        await cleanup()
        if feed is not None:
            await feed.aclose()
        for publisher in publishers:
            await publisher.aclose()
        if pool_queue is not None:
            await pool_queue.aclose()
        if leases is not None:
            await leases.aclose()
        await cluster.aclose()
        _log.info("operator stopped")


def _election(
    settings: Settings, access: Access, metrics: Metrics, *, labels: Mapping[str, str]
) -> tuple[LeaseStore | None, Election | Alone]:
    if not settings.lease_name:
        return None, Alone()
    store = LeaseStore(
        access,
        user_agent=USER_AGENT,
        namespace=settings.lease_namespace or access.own_namespace(),
        name=settings.lease_name,
        labels=labels,
    )
    me = f"{socket.gethostname()}_{uuid.uuid4().hex[:12]}"  # a process of its own, also in the same pod
    return store, Election(store, me=me, timing=settings.timing(), metrics=metrics)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


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


async def run_callbacks(settings: DatabaseSettings, options: argparse.Namespace) -> int:
    """List callbacks, or have them sent again; return the exit code."""
    if settings.postgres_url is None:
        _log.error("cannot look at callbacks: OPERATOR_POSTGRES_URL is not set")
        return 2
    try:
        connection = await asyncpg.connect(settings.postgres_url, timeout=10, command_timeout=60)
        try:
            if options.action == "list":
                for row in await connection.fetch(LIST, options.state, options.namespace, options.limit):
                    sys.stdout.write(json.dumps(dict(row), default=str, ensure_ascii=False) + "\n")
                return 0
            state = None if options.names else "dead"
            number = await connection.fetchval(REPLAY, state, options.namespace, options.names or None)
        finally:
            await connection.close()
    except (OSError, asyncpg.PostgresError, TimeoutError) as error:
        _log.error("cannot look at callbacks: cannot use PostgreSQL", error=repr(error))
        return 1
    _log.info("callbacks are sent again", number=number)
    return 0 if number or not options.names else 1


async def run_trial(options: argparse.Namespace) -> int:
    """Try the installation as a caller; return the exit code."""
    api = Kubernetes(Access.from_environment(), user_agent=USER_AGENT)
    await api.warm_up()
    try:
        await Trial(
            api=api,
            namespace=options.namespace,
            name=options.name,
            seconds=options.seconds,
            folder=options.folder,
            document=options.document,
            labels=dict(options.label),
        ).run()
    except (TrialFailed, ClusterError) as error:
        _log.error("the trial failed", error=str(error))
        return 1
    finally:
        await api.aclose()
    _log.info("the installation works")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m task_operator",
        description="Operator of ProcessingTasks. Settings are environment variables OPERATOR_…: see docs/operator.md.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="watch tasks and run them as Jobs")
    commands.add_parser("migrate", help="create or update the tables in PostgreSQL, and exit")
    callbacks = commands.add_parser("callbacks", help="list callbacks, or have them sent again: see docs/callbacks.md")
    actions = callbacks.add_subparsers(dest="action", required=True)
    show = actions.add_parser("list", help="one JSON object a line, the youngest first")
    show.add_argument("--state", choices=STATES, default="dead")
    show.add_argument("--namespace")
    show.add_argument("--limit", type=int, default=100)
    replay = actions.add_parser("replay", help="send callbacks again, with the id that they had")
    replay.add_argument("--namespace", required=True)
    which = replay.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "names", nargs="*", default=[], metavar="TASK", help="tasks whose callbacks are sent, in whatever state"
    )
    which.add_argument("--dead", action="store_true", help="all that are dead")
    trial = commands.add_parser("trial", help="try the installation with a health check and a page: what `helm test` runs")
    trial.add_argument("--namespace", required=True, help="of the tasks")
    trial.add_argument(
        "--name", required=True, help="begins the names of the tasks; the knowledge base, which is deleted again"
    )
    trial.add_argument("--seconds", type=float, default=240, help="for all of it")
    trial.add_argument(
        "--label", action="append", default=[], type=_label, metavar="KEY=VALUE", help="of its tasks; may be repeated"
    )
    source = trial.add_mutually_exclusive_group()
    source.add_argument("--folder", type=Path, help="where the document volume is mounted: a page is written there")
    source.add_argument("--document", help="path or URL of a document that is there")
    return parser


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is no label; write KEY=VALUE")
    return key, value


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; return the exit code."""
    options = _parser().parse_args(arguments)
    configure_logging("INFO")
    try:
        if options.command == "trial":
            return uvloop.run(run_trial(options))
        if options.command != "run":
            database = load_settings(DatabaseSettings, program="operator")
            configure_logging(database.log_level)
            work = run_migrations(database) if options.command == "migrate" else run_callbacks(database, options)
            return uvloop.run(work)
        settings = load_settings(Settings, program="operator")
        configure_logging(settings.log_level)
        return uvloop.run(run(settings))
    except (SettingsError, KubeconfigError) as error:
        _log.error(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
