"""The child process that reads a file: ``python -m job_runner.parse_child KIND NAME MEMORY CPU_SECONDS THREADS``.

The file is standard input. Standard output carries JSON, one object a line: ``{"progress": [done, total]}`` while it
reads, then the text in pieces, ``{"text": ...}``, and ``{"document": ...}`` with the rest, or at any time ``{"failure":
{"reason": ..., "message": ...}}``. Whatever else happens (a signal, no last line) is a crash, and the parent says so.
"""

import ctypes
import json
import resource
import signal
import sys
import time
from dataclasses import astuple
from typing import Any, Final, TextIO

from job_runner.confine import confine
from job_runner.document import Kind, ParsedDocument
from job_runner.readers import ReadingFailed, read
from job_runner.readers.ocr import PICTURED, recognizer

_PROGRESS_SECONDS: Final = 0.2
_PIECE: Final = 64 * 1024
"""Characters of a piece of text: neither side then holds a large text a second time, as JSON."""
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def limit(*, memory_bytes: int, cpu_seconds: int) -> None:
    """Bound this process and let it reach nothing. Want of memory raises MemoryError or kills, want of CPU time kills."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))  # the soft limit is told from other kills
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # a reader has nothing to write
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a parent that is killed leaves no child behind
    confine()


def encode(document: ParsedDocument) -> dict[str, Any]:
    """Return a document without its text as JSON; the parent's :func:`job_runner.parse.decode_document` reads it."""
    return {
        "kind": document.kind,
        "pages": [astuple(page) for page in document.pages],
        "headings": [astuple(heading) for heading in document.headings],
        "failed_pages": document.failed_pages,
    }


def main(arguments: list[str], output: TextIO) -> None:
    """Read standard input and write the result."""
    kind, name, memory_bytes, cpu_seconds, threads = arguments
    limit(memory_bytes=int(memory_bytes), cpu_seconds=int(cpu_seconds))
    last = 0.0

    def say(**message: Any) -> None:
        output.write(json.dumps(message, ensure_ascii=False) + "\n")
        output.flush()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _PROGRESS_SECONDS:
            last = time.monotonic()
            say(progress=[done, total])

    try:
        with open("/dev/stdin", "rb") as file:  # noqa: PTH123 - a path of its own, not the descriptor: its position is not shared
            recognize = recognizer(threads=int(threads)) if kind in PICTURED else None
            document = read(file, kind=Kind(kind), name=name, on_progress=progress, recognize=recognize)
        for start in range(0, len(document.text), _PIECE):
            say(text=document.text[start : start + _PIECE])
        say(document=encode(document))
    except ReadingFailed as failure:
        say(failure={"reason": failure.reason, "message": failure.message})


if __name__ == "__main__":
    # Surrogates in names of bookmarks or in damaged fonts must not stop the document.
    main(sys.argv[1:], open(1, "w", encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115 - descriptor 1
