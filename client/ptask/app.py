"""Which commands there are. What one does is imported when it is run, so that ``--help`` and completion are quick."""

import os
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ptask import completion
from ptask.outcomes import CommandError, Exit

if TYPE_CHECKING:
    from ptask.cluster import Cluster
    from ptask.live import Key
    from ptask.manifests import Draft
    from ptask.screen import Screen

_CODES = """Exit codes: 0 done or Completed, 1 failed, 2 wrong command line or manifest, 3 canceled or deleted, 4 timeout,
5 no usable answer (try again), 130 interrupted."""

app = typer.Typer(
    name="ptask",
    help="Document and embedding tasks of knowledge bases, from a terminal.",
    epilog=_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
kb = typer.Typer(
    help="Knowledge bases: list, look, delete, purge, verify.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(kb, name="kb")


class Output(StrEnum):
    """What -o takes; the same words as :class:`ptask.tables.Output`, which costs rich."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


class DryRun(StrEnum):
    """What --dry-run takes."""

    NONE = "none"
    CLIENT = "client"
    SERVER = "server"


_WHERE = "Cluster"
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", "-n", help="Namespace of the tasks; default: that of the context.", rich_help_panel=_WHERE),
]
Context = Annotated[str | None, typer.Option("--context", help="Context of the kubeconfig.", rich_help_panel=_WHERE)]
Kubeconfig = Annotated[
    str | None,
    typer.Option(
        "--kubeconfig", help="Path of the kubeconfig; default: KUBECONFIG, ~/.kube/config.", rich_help_panel=_WHERE
    ),
]
Everywhere = Annotated[bool, typer.Option("--all-namespaces", "-A", help="Tasks of all namespaces.", rich_help_panel=_WHERE)]
Selector = Annotated[str | None, typer.Option("--selector", "-l", help="Labels, such as team=search or 'team in (a,b)'.")]
Format = Annotated[Output, typer.Option("--output", "-o", help="Form of the output: table, wide, json, yaml or name.")]
Wait = Annotated[bool, typer.Option("--wait", "-w", help="Wait until all have ended, and show it; the exit code says how.")]
Timeout = Annotated[str | None, typer.Option("--timeout", help="Longest wait, such as 10m; the tasks go on. Default: none.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a task.", autocompletion=completion.tasks)]
Names = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Names of tasks.", autocompletion=completion.tasks)
]
KbId = Annotated[str, typer.Argument(metavar="KB", help="spec.kbId of the tasks.")]
OfKb = Annotated[str | None, typer.Option("--kb", help="Only of this knowledge base.")]
OfType = Annotated[str | None, typer.Option("--type", help="Only of this type, such as document_processing.")]
OfPhase = Annotated[
    str | None, typer.Option("--phase", help="Only in this phase: Queued, Processing, Retrying, Completed, …")
]
OfPriority = Annotated[str | None, typer.Option("--priority", help="Only of this priority: high, normal, low.")]
Gateway = Annotated[
    str | None,
    typer.Option("--gateway", envvar="PTASK_GATEWAY", help="URL of the gateway; its token is read from PTASK_TOKEN."),
]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"ptask {version('processing-tasks')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    pass


def _cluster(kubeconfig: str | None, context: str | None, namespace: str | None) -> "Cluster":
    from ptask.cluster import Cluster

    return Cluster(kubeconfig, context, namespace)


def _screen() -> "Screen":
    from ptask.screen import Screen

    return Screen()


def _selected(kb_id: str | None, kind: str | None, phase: str | None, priority: str | None) -> str | None:
    """Return the field selector."""
    chosen = {
        "spec.kbId": kb_id,
        "spec.type": kind,
        "status.phase": None if phase is None else phase.capitalize(),
        "spec.priority": priority,
    }
    return ",".join(f"{field}={value}" for field, value in chosen.items() if value is not None) or None


# ----------------------------------------------------------------------------------------------------------------- submit


@app.command(
    epilog="""\b
Examples:
  ptask submit -f handbook.yaml --wait
  ptask submit -f 'tasks/*.yaml' -f more/ -o name
  kubectl get ptask old -o yaml | ptask submit -f - --dry-run=server
  ptask submit --kb kb-42 --document /data/handbook.pdf --priority high --set chunkSize=500 --wait --timeout 10m"""
)
def submit(
    manifests: Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", help="The same as --filename.")] = None,
    filename: Annotated[
        list[str] | None,
        typer.Option("--filename", "-f", help="Manifests: a file, a folder, a pattern in quotes, or - for standard input."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--type", help="Type of the task; default with --document: document_processing.")
    ] = None,
    kb_id: Annotated[str | None, typer.Option("--kb", help="Its knowledge base.")] = None,
    document: Annotated[
        list[str] | None,
        typer.Option(
            "--document",
            "-d",
            help="payload.filePath: a path of the document volume, s3:// or https://. Repeated: a task each.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the task; default: made of document or type.")] = None,
    priority: Annotated[str | None, typer.Option("--priority", help="high, normal or low.")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="FIELD=VALUE of the spec, or of the payload: timeout=5m, chunkSize=500, metadata.team=a."
        ),
    ] = None,
    label: Annotated[list[str] | None, typer.Option("--label", help="KEY=VALUE, on every task.")] = None,
    dry_run: Annotated[
        DryRun, typer.Option("--dry-run", help="Create nothing. client: check the fields; server: let the cluster judge.")
    ] = DryRun.NONE,
    wait: Wait = False,
    follow: Annotated[bool, typer.Option("--follow", help="Print the log of the one task until it has ended.")] = False,
    timeout: Timeout = None,
    output: Format = Output.TABLE,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Create tasks, from manifests or from flags.

    A manifest that exists already with the same spec is left as it is, so a command may be repeated; one of another spec is
    refused. Files are all checked before the first task is made.
    """
    from ptask import manifests as files
    from ptask.live import seconds_of

    screen, limit = _screen(), seconds_of(timeout)
    sources = [*(manifests or ()), *(filename or ())]
    flags = [flag for flag, value in {"--type": kind, "--kb": kb_id, "--document": document, "--set": sets}.items() if value]
    labels = files.labels_of(label or ())
    if sources:
        if flags or name or priority:
            raise files.refused(f"cannot use {(flags or ['--name', '--priority'])[0]} with manifests: say it in the file")
        drafts = [files.labelled(draft, labels) for draft in files.read(sources)]
    else:
        drafts = files.from_flags(
            kind=kind, kb=kb_id, documents=document or (), name=name, priority=priority, sets=sets or (), labels=labels
        )
    if follow and len(drafts) != 1:
        raise files.refused(f"cannot follow {len(drafts)} tasks: --follow is for one; take --wait")
    if dry_run is DryRun.CLIENT:
        where = namespace or "default"
        _created(screen, [draft.manifest(where) for draft in drafts], output, " (dry run, fields checked)")
        return
    cluster = _cluster(kubeconfig, context, namespace)
    _send(cluster, screen, drafts, namespace, output=output, dry_run=dry_run is DryRun.SERVER)
    if dry_run is DryRun.SERVER:
        return
    keys = [(draft.namespace or cluster.namespace, draft.name) for draft in drafts]
    if follow:
        cluster.namespace = keys[0][0]
        _end(_logs(cluster, screen, keys[0][1]))
    elif wait:
        _end(_await(cluster, screen, keys, limit, output))


def _send(
    cluster: "Cluster", screen: "Screen", drafts: "list[Draft]", namespace: str | None, *, output: Output, dry_run: bool
) -> None:
    """Create the tasks, and say what has become of each. Raises the error when one is refused, after all were tried."""
    from ptask.manifests import refused
    from service_client.views import Order

    for draft in drafts:
        if namespace is not None and draft.namespace not in {None, namespace}:
            raise refused(
                f"cannot submit {draft.where}: its namespace is {draft.namespace} and not {namespace}; leave one out"
            )
    errors: list[tuple[Draft, Exception]] = []
    for where in dict.fromkeys(draft.namespace or cluster.namespace for draft in drafts):
        own = [draft for draft in drafts if (draft.namespace or cluster.namespace) == where]
        orders = [
            Order(
                task=draft.spec,
                key=draft.name,
                labels=draft.labels,
                namespace=None,
                name=draft.name,
                annotations=draft.annotations,
                dry_run=dry_run,
            )
            for draft in own
        ]
        done = []
        for item in cluster.run(cluster.transport(where).submit_batch(orders)):
            if item.error is not None:
                errors.append((own[item.index], item.error))
                continue
            replayed = item.task is not None and item.task.replayed
            done.append((own[item.index], " unchanged" if replayed else " created"))
        suffix = " (server dry run)" if dry_run else ""
        for draft, word in done:
            shown = draft.manifest(where)
            if output not in {Output.TABLE, Output.WIDE, Output.NAME} and not dry_run:
                shown = cluster.task(draft.name, where)
            _created(screen, [shown], output, word + suffix)
    for draft, error in errors:
        screen.note(f"error: {draft.where}: {error}")
    if errors:
        from service_client.errors import TaskRefused, TaskUnavailable

        kinds = [error for _, error in errors]
        if any(isinstance(error, TaskUnavailable) for error in kinds):
            raise typer.Exit(Exit.UNREACHABLE)
        raise typer.Exit(Exit.USAGE if all(isinstance(error, TaskRefused) for error in kinds) else Exit.FAILED)


def _created(screen: "Screen", tasks: list[dict[str, Any]], output: Output, word: str) -> None:
    from ptask.tables import Output as Printed
    from ptask.tables import resource_name

    if output in {Output.TABLE, Output.WIDE}:
        for task in tasks:
            screen.raw(f"{resource_name(task)}{word}")
    else:
        screen.tasks(tasks, Printed(output), single=len(tasks) == 1)


def _await(
    cluster: "Cluster", screen: "Screen", keys: "list[Key]", limit: float | None, output: Output = Output.TABLE
) -> Exit:
    """Wait for tasks of one namespace or several."""
    from ptask.live import watch as follow

    spaces = {namespace for namespace, _ in keys}
    code = follow(
        cluster,
        screen,
        namespace=next(iter(spaces)) if len(spaces) == 1 else None,
        wanted=keys,
        timeout=limit,
        quiet=output in {Output.NAME, Output.YAML},
        as_json=output is Output.JSON,
    )
    if code is Exit.TIMEOUT:
        screen.note("error: not all have ended in time; they go on: `ptask watch`, or `ptask cancel`")
    return code


def _end(code: Exit) -> None:
    if code is not Exit.DONE:
        raise typer.Exit(code)


# ------------------------------------------------------------------------------------------------------------------ look


@app.command(
    "list",
    epilog="""\b
Examples:
  ptask list
  ptask list -A -o wide --phase Failed
  ptask list --kb kb-42 -l team=search -o name""",
)
def list_tasks(
    kb_id: OfKb = None,
    kind: OfType = None,
    phase: OfPhase = None,
    priority: OfPriority = None,
    selector: Selector = None,
    output: Format = Output.TABLE,
    everywhere: Everywhere = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """List tasks, the youngest first."""
    from ptask.cluster import TASKS
    from ptask.tables import Output as Printed
    from ptask.tables import newest_first

    cluster, screen = _cluster(kubeconfig, context, namespace), _screen()
    fields = _selected(kb_id, kind, phase, priority)
    tasks = newest_first(cluster.items(TASKS, None if everywhere else cluster.namespace, labels=selector, fields=fields))
    if not tasks and output in {Output.TABLE, Output.WIDE}:
        where = "in any namespace" if everywhere else f"in namespace {cluster.namespace}"
        screen.note(f"no tasks {'like that ' if fields or selector else ''}{where}")
        return
    screen.tasks(tasks, Printed(output), namespaces=everywhere)


@app.command(
    epilog="""\b
Examples:
  ptask get handbook
  ptask get handbook -o yaml"""
)
def get(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of tasks.", autocompletion=completion.tasks)],
    output: Annotated[
        Output | None, typer.Option("--output", "-o", help="Form of the output; default: all there is to know, as text.")
    ] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show tasks: state, result, error, attempts."""
    from datetime import UTC, datetime

    from ptask.tables import Cell, detail
    from ptask.tables import Output as Printed

    cluster, screen = _cluster(kubeconfig, context, namespace), _screen()
    tasks = [cluster.task(_bare(name)) for name in names]
    if output is not None:
        screen.tasks(tasks, Printed(output), single=len(tasks) == 1)
        return
    for index, task in enumerate(tasks):
        if index:
            screen.raw("")
        for title, cell in detail(task, now=datetime.now(UTC)):
            screen.lines([[Cell(f"{title + ':' if title else '':16}", "bold"), cell]])


def _bare(name: str) -> str:
    """Return a name without the kind that -o name puts before it."""
    return name.rpartition("/")[2]


@app.command(
    epilog="""\b
Examples:
  ptask watch
  ptask watch handbook --timeout 10m && echo published
  ptask watch -A -o json | jq .status.phase"""
)
def watch(
    names: Names = None,
    kb_id: OfKb = None,
    selector: Selector = None,
    timeout: Timeout = None,
    output: Annotated[
        Output, typer.Option("--output", "-o", help="table, or json: an object a line, for each change.")
    ] = Output.TABLE,
    everywhere: Everywhere = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Watch tasks as they change.

    A live table on a terminal, else a line for each change.
    With names it ends when all of them have ended, and the exit code says how; else with Ctrl-C or --timeout.
    """
    from ptask.live import seconds_of
    from ptask.live import watch as follow

    cluster, screen, limit = _cluster(kubeconfig, context, namespace), _screen(), seconds_of(timeout)
    if output not in {Output.TABLE, Output.JSON}:
        raise CommandError(f"cannot watch with -o {output}: take table or json", code=Exit.USAGE)
    if names:
        if everywhere:
            raise CommandError("cannot watch names in all namespaces: take -n instead of -A", code=Exit.USAGE)
        keys = [(cluster.namespace, _bare(name)) for name in names]
        for _, name in keys:
            cluster.task(name)
        _end(_await(cluster, screen, keys, limit, output))
        return
    _end(
        follow(
            cluster,
            screen,
            namespace=None if everywhere else cluster.namespace,
            labels=selector,
            fields=_selected(kb_id, None, None, None),
            timeout=limit,
            as_json=output is Output.JSON,
        )
    )


@app.command(
    epilog="""\b
Examples:
  ptask logs handbook
  ptask logs -f handbook
  ptask logs handbook --attempt 1 --tail 50"""
)
def logs(
    name: Name,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the task has ended, over all its attempts.")
    ] = False,
    tail: Annotated[int | None, typer.Option("--tail", min=0, help="Only the last lines.")] = None,
    attempt: Annotated[int | None, typer.Option("--attempt", min=1, help="Of this attempt; default: the latest.")] = None,
    prefix: Annotated[bool, typer.Option("--prefix", help="Begin each line with its pod, as with several pods.")] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print the log of a task.

    That of its pods; when they are gone, the last lines that were kept of a failure.
    With --follow the exit code is that of a wait.
    """
    from ptask.logs import show

    cluster, screen = _cluster(kubeconfig, context, namespace), _screen()
    if follow and attempt is not None:
        raise CommandError("cannot follow one attempt: leave out --attempt or --follow", code=Exit.USAGE)
    _end(show(cluster, screen, _bare(name), follow=follow, tail=tail, attempt=attempt, prefix=prefix))


def _logs(cluster: "Cluster", screen: "Screen", name: str) -> Exit:
    from ptask.logs import show

    return show(cluster, screen, name, follow=True, tail=None, attempt=None, prefix=False)


@app.command(
    epilog="""\b
Examples:
  ptask why handbook"""
)
def why(
    name: Name,
    output: Annotated[
        Output, typer.Option("--output", "-o", help="table: the paragraph; json, yaml: in parts.")
    ] = Output.TABLE,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Explain what a task waits for.

    One paragraph: why it does not run, or why it ended as it did, and what to do. Pods, Events, pools and the task that it
    needs are looked at as far as you may read them."""
    from ptask.explaining import gather
    from ptask.tables import as_json, as_yaml, phase_of, status_of, waiting_for
    from ptask.why import explain

    cluster, screen = _cluster(kubeconfig, context, namespace), _screen()
    known = gather(cluster, _bare(name))
    said = explain(known)
    if output in {Output.JSON, Output.YAML}:
        reason = waiting_for(known.task) or (status_of(known.task).get("error") or {}).get("reason")
        parts = {"name": _bare(name), "phase": phase_of(known.task), "reason": reason, "explanation": said}
        screen.raw(as_json(parts) if output is Output.JSON else as_yaml(parts))
    else:
        screen.say(said)


@app.command(
    epilog="""\b
Examples:
  ptask top
  ptask top -A"""
)
def top(
    everywhere: Everywhere = False,
    output: Annotated[Output, typer.Option("--output", "-o", help="table, wide, json or yaml.")] = Output.TABLE,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show pools, queue and running tasks.

    Worker pools with their figures, the tasks that wait by priority and reason, and those that run.
    """
    from ptask import top as views
    from ptask.cluster import POOLS, TASKS
    from ptask.tables import LIVE_COLUMNS, as_json, as_yaml, columns_for
    from service_client.errors import TaskForbidden, TaskNotFound

    cluster, screen = _cluster(kubeconfig, context, namespace), _screen()
    space = None if everywhere else cluster.namespace
    tasks = cluster.items(TASKS, space)
    pools: list[dict[str, Any]] = []
    remark = ""
    try:
        pools = cluster.items(POOLS, space)
        remark = "" if pools else "no worker pools: every task has a Job of its own"
    except TaskNotFound:
        remark = "the cluster has no WorkerPools (CRD workerpools.tasks.zzdsj.io): every task has a Job of its own"
    except TaskForbidden:
        remark = "you may not list WorkerPools: ask for the role view of the namespace"
    if output in {Output.JSON, Output.YAML}:
        running = [{"namespace": t["metadata"]["namespace"], "name": t["metadata"]["name"]} for t in views.running(tasks)]
        whole = {
            "pools": [{"name": p["metadata"]["name"], **(p.get("status") or {})} for p in pools],
            "queue": views.queue_rows(tasks),
            "running": running,
        }
        screen.raw(as_json(whole) if output is Output.JSON else as_yaml(whole))
        return
    wide = output is Output.WIDE
    if pools:
        screen.rows(columns_for(views.POOL_COLUMNS, wide=wide, namespaces=everywhere), pools)
    else:
        screen.say(remark, "dim")
    screen.raw("")
    rows = views.queue_rows(tasks)
    if rows:
        screen.rows(views.QUEUE_COLUMNS, rows)
    else:
        screen.say("nothing waits", "dim")
    screen.raw("")
    if running_tasks := views.running(tasks):
        screen.rows(columns_for(LIVE_COLUMNS, wide=wide, namespaces=everywhere), running_tasks)
    else:
        screen.say("nothing runs", "dim")
    screen.raw("")
    screen.say(views.summary(tasks), "bold")


# ---------------------------------------------------------------------------------------------------------------- change


@app.command(
    epilog="""\b
Examples:
  ptask cancel handbook
  ptask cancel -l batch=nightly --yes --wait --timeout 2m"""
)
def cancel(
    names: Names = None,
    selector: Selector = None,
    every: Annotated[bool, typer.Option("--all", help="Every task of the namespace that has not ended.")] = False,
    yes: Yes = False,
    wait: Wait = False,
    timeout: Timeout = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """End tasks.

    They end as Canceled, or as Completed if they had been published before. It cannot be taken back.
    With --wait the exit code is 0 when all have ended, however they ended.
    """
    from ptask.live import seconds_of
    from ptask.tables import FINISHED, phase_of

    cluster, screen, limit = _cluster(kubeconfig, context, namespace), _screen(), seconds_of(timeout)
    tasks = [task for task in _chosen(cluster, names, selector, every=every) if phase_of(task) not in FINISHED or names]
    if not names:
        screen.confirm(f"Cancel {len(tasks)} tasks of namespace {cluster.namespace}?", yes=yes or not tasks)
    if not tasks:
        screen.note(f"nothing to cancel in namespace {cluster.namespace}")
    canceled = []
    for task in tasks:
        name = task["metadata"]["name"]
        if phase_of(task) in FINISHED:
            screen.raw(f"processingtask.tasks.zzdsj.io/{name} has ended already ({phase_of(task)})")
            continue
        cluster.run(cluster.transport().cancel(name))
        canceled.append((cluster.namespace, name))
        screen.raw(f"processingtask.tasks.zzdsj.io/{name} is being canceled")
    if wait and canceled and _await(cluster, screen, canceled, limit) is Exit.TIMEOUT:
        raise typer.Exit(Exit.TIMEOUT)


@app.command(
    epilog="""\b
Examples:
  ptask retry handbook --wait
  ptask retry --all --yes"""
)
def retry(
    names: Names = None,
    selector: Selector = None,
    every: Annotated[bool, typer.Option("--all", help="Every task of the namespace that is Failed or Canceled.")] = False,
    yes: Yes = False,
    wait: Wait = False,
    timeout: Timeout = None,
    output: Annotated[Output, typer.Option("--output", "-o", help="table or name.")] = Output.TABLE,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Create tasks that do again what ended ones did.

    With a selector or --all: what those did that are Failed or Canceled.
    """
    from ptask.live import seconds_of
    from ptask.tables import phase_of
    from service_client.calls import new_key

    cluster, screen, limit = _cluster(kubeconfig, context, namespace), _screen(), seconds_of(timeout)
    tasks = _chosen(cluster, names, selector, every=every)
    if not names:
        tasks = [task for task in tasks if phase_of(task) in {"Failed", "Canceled"}]
        screen.confirm(f"Retry {len(tasks)} tasks of namespace {cluster.namespace}?", yes=yes or not tasks)
    if not tasks:
        screen.note(f"nothing to retry in namespace {cluster.namespace}")
    made = []
    for task in tasks:
        old = task["metadata"]["name"]
        fresh = cluster.run(cluster.transport().retry(old, key=new_key()))
        made.append((cluster.namespace, fresh.id))
        line = f"processingtask.tasks.zzdsj.io/{fresh.id}"
        screen.raw(line if output is Output.NAME else f"{line} created, does {old} again")
    if wait and made:
        _end(_await(cluster, screen, made, limit, output))


def _chosen(cluster: "Cluster", names: list[str] | None, selector: str | None, *, every: bool) -> list[dict[str, Any]]:
    from ptask.cluster import TASKS

    ways = [bool(names), selector is not None, every]
    if sum(ways) != 1:
        raise CommandError("cannot tell which tasks are meant: give names, or --selector, or --all", code=Exit.USAGE)
    if names:
        return [cluster.task(_bare(name)) for name in dict.fromkeys(names)]
    return cluster.items(TASKS, cluster.namespace, labels=selector)


# ------------------------------------------------------------------------------------------------------- knowledge bases


@kb.command(
    "list",
    epilog="""\b
Examples:
  ptask kb list
  PTASK_TOKEN=$(kubectl create token me) ptask kb list --gateway http://localhost:8084""",
)
def kb_list(
    gateway: Gateway = None,
    output: Annotated[Output, typer.Option("--output", "-o", help="table, json, yaml or name.")] = Output.TABLE,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """List knowledge bases: all, from the gateway; without one those of which there are tasks, as far as these tell."""
    from ptask import knowledge
    from ptask.tables import as_json, as_yaml

    cluster, screen = _cluster(kubeconfig, context, namespace), _screen()
    bases, whole = knowledge.listed(cluster, gateway, os.environ.get("PTASK_TOKEN"))
    match output:
        case Output.JSON:
            screen.raw(as_json({"source": "gateway" if whole else "tasks", "items": bases}))
        case Output.YAML:
            screen.raw(as_yaml({"source": "gateway" if whole else "tasks", "items": bases}))
        case Output.NAME:
            for base in bases:
                screen.raw(str(base["kb_id"]))
        case _:
            screen.rows(knowledge.KB_COLUMNS if whole else knowledge.TASK_KB_COLUMNS, bases)
    if not whole:
        screen.note(
            f"from {cluster.namespace}'s tasks, which are deleted a day after their end: a part of the truth; "
            "--gateway has all of it"
        )


@kb.command("get")
def kb_get(
    kb_id: KbId,
    gateway: Gateway = None,
    output: Annotated[Output, typer.Option("--output", "-o", help="table, json or yaml.")] = Output.TABLE,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show a knowledge base, from the gateway: state, documents, chunks, generations, what checks of the stores found."""
    from ptask import knowledge
    from ptask.tables import Cell, as_json, as_yaml, plain

    if gateway is None:
        raise CommandError(
            "cannot show a knowledge base without the gateway, which has the ledger: give --gateway or PTASK_GATEWAY; "
            "`ptask kb list` shows what tasks tell",
            code=Exit.USAGE,
        )
    cluster, screen = _cluster(kubeconfig, context, namespace), _screen()
    base = knowledge.Gateway(gateway, token=os.environ.get("PTASK_TOKEN")).base(kb_id, cluster.namespace)
    if output in {Output.JSON, Output.YAML}:
        screen.raw(as_json(base) if output is Output.JSON else as_yaml(base))
        return
    for title, value in knowledge.as_lines(base):
        screen.lines([[Cell(f"{title + ':':18}", "bold"), Cell(plain(value))]])


def _on_kb(
    command: str,
    kb_id: str,
    *,
    yes: bool,
    wait: bool,
    timeout: str | None,
    where: tuple[str | None, str | None, str | None],
) -> None:
    from ptask import manifests as files
    from ptask.knowledge import ACTIONS, spec_of
    from ptask.live import seconds_of

    cluster, screen, limit = _cluster(*where), _screen(), seconds_of(timeout)
    name = f"{command}-{files.readable(kb_id)}-{files.suffix()}"
    draft = files.checked(files.Draft(where=f"kb {command}", name=name, namespace=None, spec=spec_of(command, kb_id)))
    words = ACTIONS[command][2]
    warning = "" if command == "verify" else " This cannot be undone."
    screen.confirm(f"{words.capitalize()} knowledge base {kb_id} of namespace {cluster.namespace}?{warning}", yes=yes)
    _send(cluster, screen, [draft], None, output=Output.TABLE, dry_run=False)
    if wait:
        _end(_await(cluster, screen, [(cluster.namespace, name)], limit))


_ON_KB: Final = {
    "delete": "Remove all documents of a knowledge base, by a task (document_processing, action delete_knowledge_base).",
    "purge": "Remove a knowledge base everywhere, with all its generations, by a task (knowledge_indexing, action purge).",
    "verify": """Compare both stores with the ledger and mend what differs, by a task (knowledge_indexing, action repair).

    The task's result says in repaired how much that was.
    """,
}
"""What is done to a whole knowledge base by a task, and what the help says of it."""


def _kb_command(action: str, says: str) -> None:
    def command(
        kb_id: KbId,
        yes: Yes = False,
        wait: Wait = False,
        timeout: Timeout = None,
        namespace: Namespace = None,
        context: Context = None,
        kubeconfig: Kubeconfig = None,
    ) -> None:
        _on_kb(action, kb_id, yes=yes, wait=wait, timeout=timeout, where=(kubeconfig, context, namespace))

    kb.command(action, help=says)(command)


for _action, _says in _ON_KB.items():
    _kb_command(_action, _says)


# ----------------------------------------------------------------------------------------------------------------- others


@app.command(
    epilog="""\b
Examples:
  ptask doctor
  ptask doctor --check -n knowledge -o json"""
)
def doctor(
    check: Annotated[
        bool, typer.Option("--check", help="Also run a health_check task, which asks every store from a pod.")
    ] = False,
    timeout: Annotated[str, typer.Option("--timeout", help="Longest wait for that task.")] = "3m",
    system: Annotated[
        str | None, typer.Option("--system-namespace", help="Namespace of the operator; default: looked for everywhere.")
    ] = None,
    output: Annotated[Output, typer.Option("--output", "-o", help="table, json or yaml.")] = Output.TABLE,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Check an installation.

    Each thing that is wrong comes with a remedy.

    CRDs, operator, leader, PriorityClasses, your rights; in each task namespace ServiceAccount, Secret, claim, and what is
    stuck of pods and tasks. The exit code is 1 when there is a problem; warnings, and what you may not read, leave it 0.
    """
    from ptask import examination

    cluster, screen = _cluster(kubeconfig, context, namespace), _screen()
    _end(
        examination.examine(
            cluster, screen, namespace=namespace, system=system, check=check, timeout=timeout, output=str(output)
        )
    )


@app.command(
    epilog="""\b
Examples:
  TASKS_POSTGRES_URL=… TASKS_MILVUS_URL=… TASKS_ELASTICSEARCH_URL=… ptask run --local handbook.yaml"""
)
def run(
    manifest: Annotated[str, typer.Argument(metavar="FILE", help="One manifest, or - for standard input.")],
    local: Annotated[bool, typer.Option("--local", help="In this environment, without a cluster.")] = False,
    output: Annotated[Output, typer.Option("--output", "-o", help="table, json or yaml: the outcome.")] = Output.TABLE,
) -> None:
    """Carry out one manifest without a cluster.

    The runner of this environment does it (processing-tasks[runner]).
    Its stores are those of the variables that `python -m job_runner --help` lists.
    """
    if not local:
        raise CommandError(
            "cannot run a task elsewhere: give --local, or send it to a cluster with `ptask submit`", code=Exit.USAGE
        )
    from ptask.local import run as carry_out
    from ptask.tables import Output as Printed

    _end(carry_out(_screen(), manifest, output=Printed(output)))
