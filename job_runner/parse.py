"""Reading a document in a child process with bounds: memory, CPU time, wall time, size of its answer.

A crash or a kill of the child is :class:`~task_contract.errors.ParserCrashed`, and so is a child that is not done in time:
the node may have been busy. Memory and CPU time are another matter: the same bytes need as much again, so a document that
exceeds their bounds is refused. Errors that the child names keep their type.
"""

import asyncio
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from job_runner.cpus import available_cpus
from job_runner.document import Heading, Kind, Page, ParsedDocument
from job_runner.fetch import Source
from job_runner.readers.ocr import PICTURED
from job_runner.readers.ocr import version as ocr_version
from job_runner.settings import Settings
from job_runner.watchdog import beat
from task_contract.errors import (
    DocumentEmpty,
    DocumentRefused,
    DocumentUnreadable,
    ParserCrashed,
    TaskError,
)

_FAILURES: Final[Mapping[str, type[TaskError]]] = {
    error.reason: error for error in (DocumentEmpty, DocumentRefused, DocumentUnreadable)
}
_OCR_THREADS: Final = 4
"""Threads of OCR at most: each has buffers of its own in the memory that is bounded."""
_STDERR_LIMIT: Final = 4096
_READ_BYTES: Final = 1 << 20
_NO_MEMORY: Final = ("MemoryError", "memory allocation of", "bad_alloc", "Failed to allocate memory", "Insufficient memory")
"""What Python, Rust's, C++'s and OCR's libraries write to standard error when they find no memory."""
_BOUNDED: Final = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
"""Environment of the child: libraries that start a thread for each CPU, and 64 MiB of address space for each thread, would
fit into its memory on one machine and not on another."""


@dataclass(frozen=True, slots=True)
class ParserLimits:
    """Bounds of the child process."""

    memory_bytes: int
    """Address space; the interpreter and PDFium need about 200 MiB of it."""
    seconds: int
    """Wall time."""
    cpu_seconds: int
    """CPU time; at half of the wall time it is reached first, unless the child had to wait for a CPU."""
    output_bytes: int
    """Size of the answer: the text, pages and headings as JSON."""
    threads: int = 1
    """Threads of OCR, the only library that has any."""
    variables: str = "TASKS_PARSER"
    """What the names of the settings begin with that these bounds of memory and time come from."""


def parser_limits(settings: Settings, kind: Kind) -> ParserLimits:
    """Return the bounds for a kind of file: wider ones where pictures in it may have to be recognised."""
    if kind in PICTURED and ocr_version() is not None:
        threads = min(available_cpus(), _OCR_THREADS)
        return ParserLimits(
            memory_bytes=max(settings.ocr_memory_bytes, settings.parser_memory_bytes),
            seconds=max(settings.ocr_seconds, settings.parser_seconds),
            cpu_seconds=max(settings.ocr_seconds * threads, settings.parser_seconds // 2, 1),
            output_bytes=settings.parser_output_bytes,
            threads=threads,
            variables="TASKS_OCR",
        )
    return ParserLimits(
        memory_bytes=settings.parser_memory_bytes,
        seconds=settings.parser_seconds,
        cpu_seconds=max(1, settings.parser_seconds // 2),
        output_bytes=settings.parser_output_bytes,
    )


async def parse(source: Source, *, limits: ParserLimits, on_progress: Callable[[int, int], None]) -> ParsedDocument:
    """Read an opened document. ``on_progress`` gets (pages done, pages in all).

    Raises DocumentUnreadable, DocumentEmpty, DocumentRefused and ParserCrashed. The child is gone when this returns,
    raises, or is canceled.
    """
    os.lseek(source.descriptor, 0, os.SEEK_SET)
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # modules come from PYTHONPATH below, never from the working directory
        "-m",
        "job_runner.parse_child",
        source.kind,
        source.name,
        str(limits.memory_bytes),
        str(limits.cpu_seconds),
        str(limits.threads),
        stdin=source.descriptor,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=_READ_BYTES,
        # A crafted file that takes over the child finds no passwords in its environment.
        env={"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), "LC_ALL": "C.UTF-8"} | _BOUNDED,
        start_new_session=True,
    )
    errors = asyncio.create_task(_stderr(child))
    try:
        async with asyncio.timeout(limits.seconds):
            answer, text = await _answer(child, name=source.name, limits=limits, on_progress=on_progress)
            status = await child.wait()
    except TimeoutError:
        raise ParserCrashed(
            f"cannot parse {source.name} within {limits.seconds} s; raise {limits.variables}_SECONDS or split the document"
        ) from None
    finally:
        if child.returncode is None:  # it may be gone before the loop has heard of it
            with contextlib.suppress(ProcessLookupError):
                child.kill()
        # wait() waits for the ends of both pipes, and a pipe that is full is not read by itself.
        await asyncio.gather(_drain(child.stdout), errors, child.wait())
    if "failure" in answer:
        failure = answer["failure"]
        raise _FAILURES.get(failure["reason"], DocumentUnreadable)(failure["message"])
    if "document" not in answer or status != 0:
        raise _crash(source.name, status=status, errors=errors.result(), limits=limits)
    return decode_document(answer["document"], text=text)


async def _answer(
    child: asyncio.subprocess.Process, *, name: str, limits: ParserLimits, on_progress: Callable[[int, int], None]
) -> tuple[dict[str, Any], str]:
    """Read the child's lines; return the last one, empty if there was none, and the text that came in pieces before it."""
    assert child.stdout is not None  # noqa: S101 - for the type checker: it was asked for above
    answer: dict[str, Any] = {}
    text = io.StringIO()
    rest = bytearray()
    size = 0
    while data := await child.stdout.read(_READ_BYTES):
        size += len(data)
        beat()
        if size > limits.output_bytes:
            raise DocumentRefused(
                f"cannot parse {name}: its text is larger than {limits.output_bytes} bytes; "
                "split the document, or raise TASKS_PARSER_OUTPUT_BYTES"
            )
        rest += data
        if b"\n" not in data:
            continue
        *lines, rest = rest.split(b"\n")
        for line in lines:
            # Tables of a large document take a while to decode; progress and SIGTERM must not wait for it.
            answer = await asyncio.to_thread(json.loads, line) if len(line) > _READ_BYTES else json.loads(line)
            if "progress" in answer:
                on_progress(*answer["progress"])
            elif "text" in answer:
                text.write(answer["text"])
    return ({} if rest else answer), text.getvalue()  # cut off in the middle: a crash, which the exit status explains


async def _drain(stream: asyncio.StreamReader | None) -> None:
    while stream is not None and await stream.read(_READ_BYTES):
        pass


async def _stderr(child: asyncio.subprocess.Process) -> str:
    """Return the end of what the child said; keep reading, so that it never waits for us."""
    assert child.stderr is not None  # noqa: S101 - for the type checker: it was asked for above
    kept = b""
    while data := await child.stderr.read(_STDERR_LIMIT):
        kept = (kept + data)[-_STDERR_LIMIT:]
    return kept.decode(errors="replace")


def _crash(name: str, *, status: int, errors: str, limits: ParserLimits) -> TaskError:
    """Return the error for a child that has ended without an answer."""
    memory = f"{limits.memory_bytes // 2**20} MiB"
    more_memory = f"raise {limits.variables}_MEMORY_BYTES and the pod's memory, or split the document"
    if any(mark in errors for mark in _NO_MEMORY):
        return DocumentRefused(f"cannot parse {name} within {memory} of memory; {more_memory}")
    if status == -signal.SIGXCPU:
        more_time = f"raise {limits.variables}_SECONDS or split the document"
        return DocumentRefused(f"cannot parse {name} within {limits.cpu_seconds} CPU seconds; {more_time}")
    if status == -signal.SIGKILL:
        return ParserCrashed(f"cannot parse {name}: the parser was killed, most likely for want of memory; {more_memory}")
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    last = errors.strip().splitlines()[-1:] or [""]
    return ParserCrashed(f"cannot parse {name}: the parser crashed ({how}, memory limit {memory}) {last[0]}".rstrip())


def decode_document(document: Mapping[str, Any], *, text: str) -> ParsedDocument:
    """Read what :func:`job_runner.parse_child.encode` wrote."""
    return ParsedDocument(
        kind=Kind(document["kind"]),
        text=text,
        pages=tuple(Page(*page) for page in document["pages"]),
        headings=tuple(Heading(*heading) for heading in document["headings"]),
        failed_pages=tuple(document["failed_pages"]),
    )
