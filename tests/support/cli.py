"""The command `ptask` as a user runs it."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from ptask.__main__ import arguments_of, run
from ptask.app import app

ROOT = Path(__file__).resolve().parents[2]


class Ptask:
    """`ptask` on a cluster, in a namespace."""

    def __init__(self, kubeconfig: Path, namespace: str) -> None:
        self.kubeconfig = kubeconfig
        self.namespace = namespace

    def start(self, command: str, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        """Start it as a process; errors come with the output."""
        given = {
            "KUBECONFIG": str(self.kubeconfig),
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "crds", "client")),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "ptask", *command.split(), "-n", self.namespace, *arguments],
            env=dict(os.environ) | given | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def attempt(self, command: str, *arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        """Run it in this process, where the client is imported already, and return how it ended. Nobody is at a terminal."""
        given = [*command.split(), "-n", self.namespace, *arguments]
        if "--kubeconfig" not in given:
            given += ["--kubeconfig", str(self.kubeconfig)]
        out, errors = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
        with (
            mock.patch.object(sys, "stdin", io.StringIO(stdin)),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
        ):
            code = run(lambda words: app(words, prog_name="ptask"), arguments_of(given))
        out.seek(0)
        return subprocess.CompletedProcess(given, code, out.read(), errors.getvalue())

    def __call__(self, command: str, *arguments: str, stdin: str = "") -> str:
        """Run it and return its output; AssertionError with its error output when it fails."""
        done = self.attempt(command, *arguments, stdin=stdin)
        assert done.returncode == 0, f"ptask {command} {' '.join(arguments)}: {done.returncode}: {done.stderr}"
        return str(done.stdout)
