"""Long-running processes of the devstack: started detached, found again later, and never mistaken for others.

A process is known by pid, kernel start time and boot id, so a recycled pid, after a reboot or otherwise, is never
taken for ours. The record is written by the new process itself before it becomes the command: whoever dies at
whatever point, a running command has a record.
"""

import contextlib
import hashlib
import json
import os
import pwd
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from devstack.cache import state_dir
from devstack.progress import DevstackError

POLL = 0.05  # seconds

# Standard output is the record and standard error the log, both opened by us: a command that runs as another user
# may write neither folder. `$$` is the pid that the command keeps.
_BECOME = (
    """printf '{"boot": "%s", "stat": "%s", "key": "%s"}\\n' """
    """"$(cat /proc/sys/kernel/random/boot_id)" "$(cat /proc/$$/stat)" "$1" && shift && exec "$@" >&2"""
)


@dataclass(frozen=True)
class Process:
    """One running process: its pid and when it began, in clock ticks after boot (field 22 of /proc/PID/stat)."""

    pid: int
    start: int


def start(
    name: str,
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    user: str | None = None,
    cwd: Path | str | None = None,
    grace: float = 20.0,
) -> bool:
    """Start COMMAND in a session of its own as NAME, with ENV added to our environment, its output in `log_path(NAME)`.

    Nothing happens when it runs already; when it runs with another command, environment or user, it is stopped (with
    GRACE as in `stop`) and replaced. Returns whether it was started. The log of the run before is kept beside as
    NAME.log.old. Raises DevstackError when the process cannot be made; a command that ends at once is for `wait_until`
    to report.
    """
    wanted = json.dumps([list(command), sorted((env or {}).items()), user, str(cwd)])
    key = hashlib.sha256(wanted.encode()).hexdigest()[:16]
    if running(name):
        if _record(name).get("key") == key:
            return False
        stop(name, grace=grace)
    record, log = _record_path(name), log_path(name)
    for folder in (record.parent, log.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_suffix(".log.old"))
    environment = {**os.environ, **(env or {})}
    if user is not None:
        environment = {"HOME": pwd.getpwnam(user).pw_dir, "USER": user, "LOGNAME": user} | dict(env or {})
        environment.setdefault("PATH", os.environ.get("PATH", os.defpath))
    with record.open("wb") as record_file, log.open("wb") as log_file:
        try:
            # setsid --fork leaves the command to init: it is never our zombie, and a test session may end before it.
            subprocess.run(
                ["setsid", "--fork", "sh", "-c", _BECOME, "sh", key, *command],
                stdin=subprocess.DEVNULL,
                stdout=record_file,
                stderr=log_file,
                env=environment,
                cwd=cwd or "/",
                user=user,
                group=pwd.getpwnam(user).pw_gid if user is not None else None,
                extra_groups=[] if user is not None else None,
                check=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise DevstackError(f"cannot start {name}: {error}; {_last_lines(name)}") from error
    deadline = time.monotonic() + 10
    while not _record(name):
        if time.monotonic() > deadline:
            raise DevstackError(f"cannot start {name}: it did not come to life in 10 s; {_last_lines(name)}")
        time.sleep(0.002)
    return True


def running(name: str) -> bool:
    """Whether the process that was started as NAME lives; a zombie does not."""
    return find(name) is not None


def find(name: str) -> Process | None:
    """Return the living process that was started as NAME, or None."""
    return _living(_record(name))


def living(state: Path) -> dict[str, Process]:
    """Return the living processes, by name, of the devstack whose state folder is STATE: ours or another one's."""
    found = {path.stem: _living(_read_record(path)) for path in sorted((state / "pid").glob("*.json"))}
    return {name: process for name, process in found.items() if process is not None}


def _living(record: Mapping[str, str]) -> Process | None:
    if not record or record["boot"] != boot_id():
        return None
    recorded = parse_stat(record["stat"])
    if recorded is None:
        return None
    try:
        now = parse_stat(Path(f"/proc/{recorded.pid}/stat").read_text())
    except OSError:
        return None
    return now if now == recorded else None


def stop(name: str, *, grace: float = 20.0, kill: bool = False) -> None:
    """End the process NAME: SIGTERM, after GRACE seconds SIGKILL (at once with KILL), then its process group.

    Returns once it is gone. Its record is deleted last, so an interrupted stop is repeated in full.
    """
    process = find(name)
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL if kill else signal.SIGTERM)
        if not _gone(name, grace):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            if not _gone(name, 10):
                raise DevstackError(f"cannot stop {name}: process {process.pid} survives SIGKILL; look at `dmesg`")
        # The group's number cannot have been given to others while members live, and we saw its leader a moment ago.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    _record_path(name).unlink(missing_ok=True)


def wait_until(
    what: str, check: Callable[[], bool], *, seconds: float, processes: Sequence[str] = (), poll: float = POLL
) -> None:
    """Poll CHECK until it is true; an exception of CHECK means "not yet".

    Raises DevstackError when one of PROCESSES has ended, with the end of its log, or when SECONDS have passed.
    """
    deadline = time.monotonic() + seconds
    reason = ""
    while True:
        try:
            if check():
                return
            reason = ""
        except Exception as error:  # noqa: BLE001 - any failure of a server that is starting means: not yet
            reason = f" ({type(error).__name__}: {error})"
        dead = [name for name in processes if not running(name)]
        if dead:
            raise DevstackError(f"cannot get {what}: {dead[0]} has ended; {_last_lines(dead[0])}")
        if time.monotonic() > deadline:
            logs = ", ".join(str(log_path(name)) for name in processes)
            raise DevstackError(f"cannot get {what} within {seconds:.0f} s{reason}; see {logs or 'the logs'}")
        time.sleep(poll)


def run(
    command: Sequence[str | Path],
    *,
    doing: str,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run COMMAND to its end and return its standard output; DevstackError ("cannot DOING: ...") when it fails.

    ENV is added to our environment. The command's output is part of the error, nothing of it is printed otherwise.
    """
    try:
        done = subprocess.run(
            [str(part) for part in command],
            input="" if stdin is None else stdin,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise DevstackError(f"cannot {doing}: {error}") from error
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()[-8:]
        raise DevstackError(
            f"cannot {doing}: {Path(command[0]).name} ended with {done.returncode}:\n  " + "\n  ".join(lines)
        )
    return done.stdout


def log_path(name: str) -> Path:
    """Return the file that holds the output of the process NAME."""
    return state_dir() / "log" / f"{name}.log"


def boot_id() -> str:
    """Return the kernel's random id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def parse_stat(line: str) -> Process | None:
    """Read a line of /proc/PID/stat; None for a zombie or dead process. The name in it may hold spaces and brackets.

    A zombie that has threads left is alive: they may still serve, or hold the ports that a successor needs.
    """
    head, _, tail = line.rpartition(")")
    fields = tail.split()
    if not head or len(fields) < 20 or fields[0] in {"X", "x"} or (fields[0] == "Z" and int(fields[17]) <= 1):
        return None
    return Process(pid=int(head.split(" ", 1)[0]), start=int(fields[19]))


def _gone(name: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while running(name):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _record_path(name: str) -> Path:
    return state_dir() / "pid" / f"{name}.json"


def _record(name: str) -> dict[str, str]:
    """Read the record of NAME; {} when there is none or its writer died at it, before the command began."""
    return _read_record(_record_path(name))


def _read_record(path: Path) -> dict[str, str]:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and {"boot", "stat", "key"} <= record.keys() else {}


def _last_lines(name: str, count: int = 5) -> str:
    try:
        lines = log_path(name).read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return f"{log_path(name)} ends with:\n  " + "\n  ".join(lines[-count:]) if lines else f"{log_path(name)} is empty"
