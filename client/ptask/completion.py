"""Names for the shell's completion, and ``kubectl_complete-ptask``, which kubectl asks for that of its plugin."""

import contextlib
import os
import shlex
import sys
from typing import Any, Final

_MOST: Final = 500


def tasks(ctx: Any, incomplete: str) -> list[str]:
    """Return names of tasks of the namespace that the line names. Without a cluster there are none: no errors in a shell."""
    with contextlib.suppress(Exception):
        from ptask.cluster import TASKS, Cluster

        chosen = ctx.params
        cluster = Cluster(chosen.get("kubeconfig"), chosen.get("context"), chosen.get("namespace"))
        there = cluster.items(TASKS, cluster.namespace)
        return sorted(name for task in there if (name := str(task["metadata"]["name"])).startswith(incomplete))[:_MOST]
    return []


def kubectl() -> None:
    """Answer as plugins of kubectl do: a word a line, then a directive for kubectl (4: no files)."""
    from ptask.app import app

    words = ["ptask", *sys.argv[1:]]
    # What the scripts of bash that typer makes set, too.
    os.environ |= {"_PTASK_COMPLETE": "complete_bash", "COMP_WORDS": shlex.join(words), "COMP_CWORD": str(len(words) - 1)}
    with contextlib.suppress(SystemExit):
        app(prog_name="ptask")
    sys.stdout.write(":4\n")
