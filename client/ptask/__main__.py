"""Entry point of ``ptask`` and ``kubectl ptask``: whatever goes wrong ends in one sentence and an exit code."""

import os
import sys
from pathlib import Path

from ptask.outcomes import CommandError, Exit


def main() -> None:
    """Run a command."""
    from ptask.app import app

    name = "kubectl ptask" if Path(sys.argv[0]).name.startswith("kubectl-") else "ptask"
    sys.exit(run(lambda arguments: app(arguments, prog_name=name), arguments_of(sys.argv[1:])))


def arguments_of(given: list[str]) -> list[str]:
    """Return the arguments, with what is short for something in full: ``--dry-run`` alone is ``--dry-run=client``.

    >>> arguments_of(["submit", "--dry-run", "-f", "a.yaml"])
    ['submit', '--dry-run=client', '-f', 'a.yaml']
    """
    arguments = list(given)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    for index, argument in enumerate(arguments[:end]):
        following = arguments[index + 1] if index + 1 < end else ""
        if argument == "--dry-run" and following not in {"client", "server", "none"}:
            arguments[index] = "--dry-run=client"
    return arguments


def run(app: "object", arguments: list[str]) -> int:
    """Run the application; return the exit code, with the error as one sentence on standard error."""
    try:
        app(arguments)  # type: ignore[operator]  # a callable that ends by SystemExit
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(Exit.DONE if end.code is None else Exit.FAILED)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # Who reads has gone, such as head: no error. Else the interpreter would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.DONE
    except Exception as error:  # the last resort of a command line
        if os.environ.get("PTASK_DEBUG"):
            raise
        message, code = _told(error)
        print(f"error: {message}", file=sys.stderr)  # noqa: T201 - the command line's own output
        return code
    return Exit.DONE


def _told(error: Exception) -> tuple[str, Exit]:
    if isinstance(error, CommandError):
        return error.message, error.code
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in {"kubernetes", "httpx", "yaml"}:
        return f"cannot work without the library {error.name}: install processing-tasks[cli]", Exit.FAILED
    module = sys.modules.get("service_client.errors")
    if module is not None and isinstance(error, module.TaskClientError):
        return _of_client(error)
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"this is a defect of ptask: {said}; run it again with PTASK_DEBUG=1 and report what it prints", Exit.FAILED


def _of_client(error: Exception) -> tuple[str, Exit]:
    from service_client.errors import TaskForbidden, TaskRefused, TaskUnavailable

    message = str(error)
    if isinstance(error, TaskUnavailable):
        return message, Exit.UNREACHABLE
    if isinstance(error, TaskForbidden):
        remedy = "ask for the role view or edit of the namespace, or try another --context; `ptask doctor` lists your rights"
        return f"{message}; {remedy}", Exit.FAILED
    return message, Exit.USAGE if isinstance(error, TaskRefused) else Exit.FAILED


if __name__ == "__main__":
    main()
