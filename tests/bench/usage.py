"""What processes use: CPU time with that of their children, and memory shared fairly (PSS)."""

import contextlib
import json
import os
import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from devstack.progress import DevstackError

_EVERY: Final = 0.02  # seconds between looks at memory: 2 ms of CPU each


@dataclass(frozen=True)
class Used:
    """What a command used until its end."""

    output: str
    wall: float
    cpu: float
    """Seconds in user and kernel, children that were waited for included."""
    memory: float
    """Most MB (10^6 bytes) at once, as the sum of PSS of the process and its descendants, looked at fifty times a second."""

    @property
    def answer(self) -> Any:
        """The last line of its standard output, which is JSON."""
        return json.loads(self.output.splitlines()[-1])


def used_by(
    command: Sequence[str | Path], *, environment: Mapping[str, str] | None = None, cwd: Path, watch: bool = True
) -> Used:
    """Run a command to its end. Raises DevstackError with the end of what it said if it fails."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        began = time.monotonic()
        process = subprocess.Popen(
            [str(part) for part in command], env=environment, cwd=cwd, stdout=output, stderr=errors, text=True
        )
        with watching(process.pid) if watch else contextlib.nullcontext([0.0]) as most:
            _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            said = errors.read()[-3000:] + output.read()[-1000:]
            raise DevstackError(f"cannot measure {' '.join(map(str, command[-4:]))}:\n{said}")
        return Used(output=output.read(), wall=wall, cpu=usage.ru_utime + usage.ru_stime, memory=max(most))


@contextlib.contextmanager
def watching(pid: int) -> Iterator[list[float]]:
    """Look at the memory of a process and its descendants until the end of the block: a figure in MB for each look."""
    seen = [0.0]
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_EVERY):
            seen.append(_pss(pid) / 1e6)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def _pss(pid: int) -> int:
    """Return the bytes of a process and its descendants; pages that they share are counted once."""
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


class Stopwatch:
    """Wall and CPU seconds from construction to :meth:`stop`, of this process and the children that it waited for."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self._wall, self._cpu = time.monotonic(), cpu_so_far()

    def stop(self) -> "Stopwatch":
        self.wall, self.cpu = time.monotonic() - self._wall, cpu_so_far() - self._cpu
        return self


def cpu_so_far() -> float:
    """Return the CPU seconds of this process and of the children that it waited for."""
    parts = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in parts)
