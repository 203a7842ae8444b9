"""Command line of the runner: ``python -m job_runner --help``."""

import argparse
import asyncio
import contextlib
import faulthandler
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

# Linear algebra libraries read this when numpy is imported, and would start a thread for each CPU. One thread:
# with the packaged model a second one doubles the CPU time of a text, and beside other pods its spinning makes it slower.
for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

from job_runner import logs, search_command, settings  # noqa: E402 - after the variables above
from task_contract.errors import DocumentNotFound, InvalidTask, TaskError  # noqa: E402 - after the variables above
from task_contract.lifecycle import ExitCode, exit_code  # noqa: E402 - after the variables above
from task_contract.messages import AttemptOutcome  # noqa: E402 - after the variables above
from task_contract.names import TERMINATION_LOG  # noqa: E402 - after the variables above

if TYPE_CHECKING:
    from job_runner.settings import Settings

STARTED = time.monotonic()

# A model that computes in one thread waits this long for the interpreter after each step, while another thread imports the
# clients of the stores. 5 ms, the default, are longer than a step.
sys.setswitchinterval(0.0005)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        loaded = settings.load()
    except TaskError as error:
        logs.configure("info")
        if options.command == "run":
            _tell_the_kubelet(error)
        return _failed(error)
    logs.configure(loaded.log_level)
    commands = {
        "run": _run,
        "work": _work,
        "search": search_command.search,
        "quality": search_command.quality,
        "health": _health,
        "sweep": _sweep,
        "verify": _verify,
        "rebuild-ledger": _rebuild_ledger,
    }
    try:
        return asyncio.run(commands[options.command](options, loaded))
    except TaskError as error:
        return _failed(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m job_runner",
        description="Carries out tasks of knowledge bases: documents into Milvus and Elasticsearch.",
        epilog=f"environment:\n{settings.describe()}\n\n"
        "exit codes of run: 0 succeeded, 65 the task cannot succeed, 69 a store cannot be reached, 75 try again,\n"
        "76 canceled or taken over, 143 handed back after SIGTERM\n"
        "exit codes of work: 0 drained, 65 no such model, 69 settings, 75 a task hangs, 143 ended by SIGTERM",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="carry out one task", description="Carries out one attempt at one task.")
    run.add_argument("task", type=Path, metavar="TASK_FILE", help="ProcessingTask manifest, JSON or YAML")
    commands.add_parser(
        "work",
        help="carry out the tasks of a worker pool",
        description="Takes tasks of the pool that TASKS_POOL names, one after the other and several at once, until it is "
        "told to drain or gets SIGTERM.",
    )
    search_command.add_commands(commands)
    sweep = commands.add_parser(
        "sweep",
        help="remove from both stores what nobody will publish",
        description="Removes rows of canceled, failed and replaced versions, and what is left of deleted knowledge bases. "
        "The published version of a document and those that tasks work on stay. May be repeated at any time; the operator "
        "does so every hour and after tasks that ended badly.",
    )
    sweep.add_argument("--namespace", default="default", help="namespace of the tasks [default]")
    sweep.add_argument("--all", action="store_true", help="look at every document, also at those of more than 8 days ago")
    sweep.add_argument("--dry-run", action="store_true", help="only count what would be removed")
    commands.add_parser(
        "health", help="ask all configured components", description="Prints how each configured component answers."
    )
    verify = commands.add_parser(
        "verify",
        help="compare both stores with the ledger",
        description="Reads all rows of a knowledge base in both stores, prints which documents lack chunks or have rows too "
        "many, and enters that in the ledger. Exit code 75 when there are any.",
    )
    verify.add_argument("--namespace", default="default", help="namespace of the tasks [default]")
    verify.add_argument("--kb-id", required=True, help="spec.kbId of the tasks")
    rebuild = commands.add_parser(
        "rebuild-ledger",
        help="restore the ledger from both stores",
        description="For when PostgreSQL and its backups are lost: enters knowledge bases and documents as both stores hold "
        "them. What the ledger says already stays. Knowledge bases of release 0.1.0 do not say their names: give "
        "--namespace and --kb-id, and the model of the settings is taken.",
    )
    rebuild.add_argument("--namespace", help="only knowledge bases of this namespace")
    rebuild.add_argument("--kb-id", help="only this one; needs --namespace")
    rebuild.add_argument("--dry-run", action="store_true", help="only print what would be entered")
    return parser


def _failed(error: TaskError) -> int:
    print(error.message, file=sys.stderr)  # noqa: T201 - the command line's own output
    return exit_code(error)


def _tell_the_kubelet(error: TaskError) -> None:
    """Write the termination message without settings."""
    from job_runner.attempt import write_termination_message

    attempt = os.environ.get("TASKS_ATTEMPT", "1")
    outcome = AttemptOutcome.of_error(error, attempt=int(attempt) if attempt.isdigit() and int(attempt) else 1)
    write_termination_message(outcome, Path(os.environ.get("TASKS_TERMINATION_LOG") or TERMINATION_LOG))


async def _run(options: argparse.Namespace, loaded: "Settings") -> int:
    from job_runner.attempt import read_task, run_attempt, write_termination_message

    def end(outcome: AttemptOutcome, code: ExitCode) -> NoReturn:
        write_termination_message(outcome, loaded.termination_log)
        print(outcome.model_dump_json(by_alias=True, exclude_none=True), flush=True)  # noqa: T201 - the command's output
        sys.stderr.flush()
        # Everything is said. A thread that is stuck in a library, or in a store that does not answer, must not keep the pod.
        os._exit(code)

    try:
        task = await asyncio.to_thread(read_task, options.task)
    except TaskError as error:
        outcome, code = AttemptOutcome.of_error(error, attempt=loaded.attempt), exit_code(error)
    else:
        outcome, code = await run_attempt(task, settings=loaded, started=STARTED, last_resort=end)
    end(outcome, code)


async def _work(options: argparse.Namespace, loaded: "Settings") -> int:
    from job_runner.worker import Worker

    code = await Worker(loaded, started=STARTED).run()
    sys.stderr.flush()
    # As of run: nothing that is stuck must keep the pod.
    os._exit(code)


async def _sweep(options: argparse.Namespace, loaded: "Settings") -> int:
    from job_runner.ledger import Ledger
    from job_runner.stores import opener
    from job_runner.sweep import sweep

    ledger = Ledger(loaded.postgres_url.get_secret_value())
    try:
        summary = await sweep(
            options.namespace,
            ledger=ledger,
            open_stores=opener(loaded, dimension=0),  # nothing is created
            dry_run=options.dry_run,
            everything=options.all,
        )
    finally:
        await ledger.aclose()
    print(summary.as_text(options.namespace))  # noqa: T201 - the command's output
    return 0


async def _health(options: argparse.Namespace, loaded: "Settings") -> int:
    from job_runner import health
    from job_runner.embed import make_embedder
    from job_runner.ledger import Ledger

    ledger = Ledger(loaded.postgres_url.get_secret_value())
    try:
        embedder = await asyncio.to_thread(make_embedder, loaded.embedding_model)
        asked = health.checks(None, settings=loaded, ledger=ledger, embedder=embedder)
        await health.warm_up(asked, embedder=embedder)
        result = await health.check(asked)
    finally:
        await ledger.aclose()
    for component in result.components or ():
        state = "healthy" if component.healthy else "UNHEALTHY"
        print(f"{component.name:<14} {state:<10} {component.milliseconds:>6} ms  {component.message}")  # noqa: T201 - output
    error = health.unhealthy(result)
    return 0 if error is None else exit_code(error)


async def _verify(options: argparse.Namespace, loaded: "Settings") -> int:
    from job_runner.consistency import verify
    from job_runner.index import Generation
    from job_runner.ledger import Ledger
    from job_runner.stores import opener

    async with contextlib.AsyncExitStack() as stack:
        ledger = Ledger(loaded.postgres_url.get_secret_value())
        stack.push_async_callback(ledger.aclose)
        found = await ledger.knowledge_base(namespace=options.namespace, kb_id=options.kb_id)
        if found is None:
            raise DocumentNotFound(
                f"cannot verify {options.kb_id}: namespace {options.namespace} has no such knowledge base; check both names"
            )
        generation, fingerprint, dimension = found
        open_stores = opener(loaded, dimension=dimension, model_fingerprint=fingerprint)
        checked = Generation(options.namespace, options.kb_id, generation)
        stores = open_stores(checked)
        stack.push_async_callback(stores.aclose)
        report = await verify(checked, ledger=ledger, stores=stores)
    print(report.as_text())  # noqa: T201 - the command's output
    return ExitCode.SUCCEEDED if report.consistent else ExitCode.RETRYABLE


async def _rebuild_ledger(options: argparse.Namespace, loaded: "Settings") -> int:
    from job_runner.embed import make_embedder
    from job_runner.index import Label
    from job_runner.ledger import Ledger
    from job_runner.rebuild import rebuild, serving
    from job_runner.stores import labelled_opener, labels, opener

    if options.kb_id and not options.namespace:
        raise InvalidTask("cannot tell which knowledge base is meant: give --namespace with --kb-id")
    wanted = [
        label
        for label in await labels(loaded)
        if options.namespace in {None, label.namespace} and options.kb_id in {None, label.kb_id}
    ]
    if not wanted and options.kb_id:
        embedder = await asyncio.to_thread(make_embedder, loaded.embedding_model)
        wanted = [Label(options.namespace, options.kb_id, 1, embedder.fingerprint, embedder.dimension)]
    code = ExitCode.SUCCEEDED
    async with contextlib.AsyncExitStack() as stack:
        ledger = Ledger(loaded.postgres_url.get_secret_value())
        stack.push_async_callback(ledger.aclose)
        for label in await serving(wanted, labelled_opener(loaded)):
            open_stores = opener(loaded, dimension=label.dimension, model_fingerprint=label.model_fingerprint)
            stores = open_stores(label.names)
            stack.push_async_callback(stores.aclose)
            try:
                rebuilt = await rebuild(label, ledger=ledger, stores=stores, dry_run=options.dry_run)
            except TaskError as error:  # the others are not to wait for this one
                code = ExitCode(_failed(error))
            else:
                print(rebuilt.as_text(label))  # noqa: T201 - the command's output
    if not wanted:
        print("neither store has a knowledge base of ours that says its name; give --namespace and --kb-id")  # noqa: T201 - output
    return code


if __name__ == "__main__":
    faulthandler.enable()  # a crash in a library leaves the stacks at the end of the log, which outlives the pod
    sys.exit(main())
